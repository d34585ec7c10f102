"""Few examples on top of a head of names: Tip-Adapter, its keys trained, and learned prompts, against other code."""

import json
import re

import clip_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import close
from test_zero_shot import CLASSES, by_transformers, file_of, names, photos, pixels_of, run_of  # noqa: F401

import tl_jax
from tl_jax import __main__ as command
from tl_jax.methods import tip_adapter
from tl_jax.models import head
from tl_jax.weights import load, zero_shot

torch, transformers = clip_files.torch_reference.torch, clip_files.transformers
ORDER = sorted(CLASSES)


def by_hand(zero, keys, labels, x, alpha, beta):
    """Equations 5 and 6, example by example."""
    found = np.array(zero, np.float64)
    for row, f in zip(found, x, strict=True):
        for key, label in zip(keys, labels, strict=True):
            row[label] += alpha * np.exp(-beta * (1 - float(f @ key)))
    return found


def test_tip_adapter_is_that_of_the_paper_and_its_values_are_the_best_of_the_grid_on_val():
    rng = np.random.default_rng(0)
    head = {
        "dense0": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)},
        "out": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
    }

    def embedded(x):
        x = x @ head["dense0"]["kernel"] + head["dense0"]["bias"]
        return x / np.sqrt((x**2).sum(axis=1))[:, None]

    sets = {
        name: (rng.normal(size=(n, 6)), rng.integers(0, 3, n)) for name, n in {"train": 12, "val": 9, "test": 7}.items()
    }
    x = {name: embedded(features) for name, (features, _) in sets.items()}
    zero = {name: rows @ head["out"]["kernel"] + head["out"]["bias"] for name, rows in x.items()}
    fitted = tip_adapter.fit(head, sets["train"], sets["val"])
    scores = {}
    for row in fitted.tried:
        logits = by_hand(zero["val"], x["train"], sets["train"][1], x["val"], *row["value"])
        right = logits[np.arange(9), sets["val"][1]]
        nll = np.mean(np.log(np.exp(logits).sum(axis=1)) - right)
        assert row["val/accuracy"] == np.mean(logits.argmax(axis=1) == sets["val"][1])
        assert row["val/nll"] == pytest.approx(nll)
        scores[tuple(row["value"])] = row["val/accuracy"], -nll
    assert len(scores) == len(tip_adapter.ALPHAS) * len(tip_adapter.BETAS)
    assert scores[tuple(fitted.chosen)] == max(scores.values()) > min(scores.values())
    expected = by_hand(zero["test"], x["train"], sets["train"][1], x["test"], *fitted.chosen)
    close(fitted.predict(sets["test"][0]), expected, 1e-6)
    given = tip_adapter.fit(head, sets["train"], None, (2.0, 3.0))
    close(given.predict(sets["test"][0]), by_hand(zero["test"], x["train"], sets["train"][1], x["test"], 2, 3), 1e-6)
    for val, grid, message in ((None, (), "there is none"), (sets["val"], (1.0,), "two numbers above 0")):
        with pytest.raises(ValueError, match=message):
            tip_adapter.fit(head, sets["train"], val, grid)


@pytest.mark.slow
def test_tip_adapter_runs_on_shots_and_is_a_network_whose_keys_may_train(run_of, file_of, photos, tmp_path, capsys):  # noqa: F811
    folder = run_of("tip", "--config.method.name=tip_adapter", "--config.data.shots=2")
    result = json.loads((folder / "result.json").read_text())
    assert "tip_adapter with alpha = " in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    source = tl_jax.load_data(f"folder:{photos}", "train")
    model = clip_files.whole("clip")

    def embed(pixels):
        with torch.no_grad():
            found = model.get_image_features(pixels)
            found = getattr(found, "pooler_output", found).double().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    saved = load.load("", folder / "model.safetensors")
    keys = np.asarray(saved.variables["params"]["head"]["keys2"]["kernel"]).T
    labels = np.asarray(saved.variables["params"]["head"]["out"]["kernel"])[clip_files.EMBEDDING :].argmax(axis=1)
    every = embed(pixels_of(photos, "train")[0])
    near = keys @ every.T
    assert sorted(labels) == [0, 0, 1, 1, 2, 2] and np.abs(near.max(axis=1) - 1).max() < 1e-5
    assert (source.labels[near.argmax(axis=1)] == labels).all() and config["data.shots"] == 2
    pixels, _ = pixels_of(photos)
    zero = by_transformers("clip", file_of("clip").parent, pixels, ORDER)
    expected = by_hand(zero, keys, labels, embed(pixels), *result["chosen"])
    close(tl_jax.load_predictions(folder / "predictions.npz").values, expected, 1e-4)
    files = [path for name in ORDER for path in sorted((photos / "test" / name).iterdir())]
    close(tl_jax.outputs(tl_jax.load_run(folder), files), expected, 1e-4)
    rules = "--config.method.rules=(('head/keys.*', 'keys'), ('.*', 'frozen'))"
    train = [
        "train", f"configs/transfer.py:model=small_clip,weights={folder},data=folder:{photos},method=rules", rules,
        "--config.data.train=train", "--config.data.val=val", "--config.data.test=test", "--config.data.shots=2",
        "--config.model.keep_head=True", "--config.total=(3, 'steps')", "--config.resamples=20",
        "--workdir", str(tmp_path / "f"),
    ]  # fmt: skip
    assert command.main(train) == 0
    after = load.load("", tmp_path / "f" / "model.safetensors").variables["params"]["head"]
    assert np.abs(np.asarray(after["keys2"]["kernel"]).T - keys).max() > 1e-4
    np.testing.assert_array_equal(after["out"]["kernel"], saved.variables["params"]["head"]["out"]["kernel"])


def by_torch(kind, folder, pixels, truth):
    """Cross entropy of prompts that begin with "a photo of a", and its gradient by the vectors of these four tokens."""
    model, longest = clip_files.whole(kind), clip_files.LONGEST[kind]
    read = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="</s>")
    first = 1 if kind == "clip" else 0
    ids = [read(f"a photo of a {name.replace('_', ' ')}.")["input_ids"] for name in ORDER]
    context = model.text_model.embeddings.token_embedding.weight[ids[0][first : first + 4]].detach().requires_grad_()
    hook = model.text_model.embeddings.token_embedding.register_forward_hook(
        lambda module, given, out: torch.cat([out[:, :first], context.expand(3, 4, -1), out[:, first + 4 :]], dim=1)
    )
    padded = torch.tensor([row + [1] * (longest - len(row)) for row in ids])
    mask = {"attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])}
    more = mask if kind == "clip" else {}
    logits = model(input_ids=padded, pixel_values=pixels, **more).logits_per_image
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(truth))
    (gradient,) = torch.autograd.grad(loss, context)
    hook.remove()
    return logits.detach().numpy(), float(loss.detach()), gradient.numpy()


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", clip_files.KINDS)
def test_learned_prompts_begin_as_a_text_and_their_gradient_is_that_of_torch(kind, file_of, photos):  # noqa: F811
    pixels, truth = pixels_of(photos)
    truth = [ORDER.index(name) for name in truth]
    logits, loss, gradient = by_torch(kind, file_of(kind).parent, pixels, truth)
    loaded = zero_shot.load_prompts(f"small_{kind}", file_of(kind), ORDER, "a photo of a")
    x, params = np.moveaxis(pixels.numpy(), 1, -1), loaded.variables["params"]
    place = f"prompts{1 + (kind == 'clip')}"

    def loss_of(context):
        head = {**params["head"], place: {**params["head"][place], "context": context}}
        found = loaded.model.apply({"params": {**params, "head": head}}, x, train=True)[0]
        picked = jnp.take_along_axis(jax.nn.log_softmax(found), jnp.array(truth)[:, None], axis=1)
        return -picked.mean(), found

    (own, found), slope = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params["head"][place]["context"])
    close(found, logits, 1e-5)
    assert float(own) == pytest.approx(loss, rel=1e-5)
    close(slope, gradient, 1e-4)


@pytest.mark.slow
def test_only_the_vectors_before_the_name_train_and_the_audit_lists_the_text_tower(run_of, photos):  # noqa: F811
    rules = "--config.method.rules=(('head/prompts.*/context', 'context'), ('.*', 'frozen'))"
    steps = "--config.total=(30, 'steps')", "--config.lr=0.02", "--config.batch_size=12"
    init = "--config.model.head_init=prompts:4"
    folder = run_of("coop", "--config.method.name=rules", rules, *steps, init)
    audit = json.loads((folder / "audit.json").read_text())
    rows = {row["path"]: row for row in audit["phases"][0]["parameters"]}
    assert [path for path, row in rows.items() if row["trainable"]] == ["head/prompts2/context"]
    tower = [path for path in rows if re.match("head/prompts2/(block|norm|head)", path)]
    assert rows["head/prompts2/context"]["origin"] == "new" and audit["totals"]["new"] == 4 * 32
    assert len(tower) > 20 and audit["totals"]["trainable"] == 4 * 32 and audit["proof"]["bit_equal"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    files = [path for name in ORDER for path in sorted((photos / "test" / name).iterdir())]
    saved = tl_jax.load_predictions(folder / "predictions.npz")
    close(tl_jax.outputs(tl_jax.load_run(folder), files), saved.values, 1e-5)


def test_layers_of_few_shot_heads_are_checked():
    with pytest.raises(ValueError, match="it gives the logits, so it must be the last layer"):
        head.check([("l2_norm", {}), ("prompts", {"tower": "clip_text_base"}), ("relu", {})])
    with pytest.raises(ValueError, match="size = 0, expected an integer of at least 1"):
        head.check([("cache", {"size": 0})])
    row = head.LAYERS["l2_norm"](None, 0, jnp.array([[3.0, 4.0], [0.0, 0.0]]), True)
    np.testing.assert_allclose(row, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    slope = jax.grad(lambda x: head.LAYERS["l2_norm"](None, 0, x, True).sum())(jnp.zeros((1, 2)))
    assert np.isfinite(slope).all()
