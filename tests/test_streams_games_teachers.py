"""What terms compute and what they are given: games and distillation as their papers say, streams, and teachers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from walks import (
    SHORT,
    assert_same_training,
    config_of,
    kind_of,
    losses_on_one_batch,
    make_tables,  # noqa: F401
    make_teacher,  # noqa: F401
    walk,
)

from configs import distill_digits, ink_regression
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.methods import TERMS, distill, domain
from tl_jax.methods.term import MAIN, Context, Result, Term
from tl_jax.runtime import sharding
from tl_jax.training import build, single, steps
from tl_jax.training.settings import read
from tl_jax.training.train import never, train
from tl_jax.weights import load

# The terms against what their papers say.


def context(outputs, forward, progress=0.5, **fields):
    empty = {name: {} for name in Context._fields}
    return Context(**{**empty, "outputs": outputs, "forward": forward, "progress": progress, "key": None, **fields})


def test_dann_is_the_mean_of_both_domains_cross_entropies():
    """The value of facts_domain_adaptation.md, with a linear discriminator; then of unequal batches, in numpy."""
    i, j = np.meshgrid(np.arange(60), np.arange(8), indexing="ij")
    features = np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.11 * i * (j + 1)) + 0.3 * np.cos(2 * (i % 3) + j)
    w = 0.1 * (np.arange(8) + 1) * (-1.0) ** np.arange(8)

    def forward(network, f, *, train, key):
        assert network == "discriminator" and train
        return {"logits": (f @ jnp.asarray(w, jnp.float32))[:, None]}, {}

    def loss(source, target):
        outputs = {MAIN: {"embedding": jnp.asarray(source)}, "target": {"embedding": jnp.asarray(target)}}
        return domain.dann().loss(context(outputs, forward))

    assert float(loss(features[:30], features[30:]).loss) == pytest.approx(0.7413748042, rel=1e-6)
    found = loss(features[:20], features[20:])
    z = features @ w
    expected = (np.logaddexp(0, -z[:20]).mean() + np.logaddexp(0, z[20:]).mean()) / 2
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    assert float(found.logs["accuracy"]) == pytest.approx(((z[:20] > 0).mean() + (z[20:] <= 0).mean()) / 2)
    assert float(found.logs["strength"]) == pytest.approx(2 / (1 + np.exp(-5)) - 1, rel=1e-6)


@pytest.mark.thin(1)
@pytest.mark.parametrize(("player", "sign"), [("discriminator", -1), ("backbone", 1)])
def test_the_discriminator_lowers_its_loss_and_the_backbone_raises_it(player, sign, tables):
    still = {group: {"lr_mult": 0.0} for group in {"discriminator", "backbone"} - {player}}
    terms = {"task": {"weight": 0.0}, "dann": {"width": 16, "strength": 0.5}}
    config = kind_of("adaptation", tables, terms=terms, groups=still, optimizer_args={}, lr=0.01, clip=0.0)
    losses = losses_on_one_batch(config)
    assert (sign * np.diff(losses) > 0).all(), losses


def test_distillation_is_the_divergence_of_softened_answers():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 12, 5))
    found = distill.kd(temperature=4.0).loss(
        context({MAIN: {"logits": jnp.asarray(student)}}, lambda network, of: ({"logits": jnp.asarray(teacher)}, {}))
    )
    p, q = (scipy.special.log_softmax(x / 4.0, axis=-1) for x in (teacher, student))
    assert float(found.loss) == pytest.approx(16 * (np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-5)
    assert float(found.logs["agreement"]) == (student.argmax(axis=-1) == teacher.argmax(axis=-1)).mean()


def test_weights_of_classes_act_in_the_loss(tables):
    run, before, _, rows = walk(config_of("classification", tables, task_args={"class_weight": "balanced"}), count=1)
    batch, labels = run.material.streams[MAIN][0], run.material.data[MAIN].labels
    weight = len(labels) / (3 * np.bincount(labels))
    logits = run.material.model.apply(
        {"params": before.params}, steps.normalise(batch["table"], run.material.card), train=False
    )[0]
    expected = -scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(16), batch["label"]]
    expected = (weight[batch["label"]] * expected).mean()
    assert rows[0]["loss"] / rows[0]["examples"] == pytest.approx(expected, rel=1e-5)


# Streams and data through the trainer.


def test_a_term_that_reads_labels_of_the_unlabelled_stream_meets_a_key_error(tables, monkeypatch):
    def peek() -> Term:
        return Term(lambda context: Result(context.batch["target"]["label"].mean()), on=(MAIN, "target"))

    def peek_encoded() -> Term:
        return Term(lambda context: Result(context.encoded["target"].mean()), on=(MAIN, "target"))

    for name, term in {"peek": peek, "peek_encoded": peek_encoded}.items():
        monkeypatch.setitem(TERMS, name, term)
        with pytest.raises(KeyError, match="label" if name == "peek" else "target"):
            walk(kind_of("adaptation", tables, terms={name: {}}), count=1)


@pytest.mark.slow
def test_poisoned_labels_of_the_target_change_no_number(tables, tmp_path):
    """The labels of the unlabelled stream turned round: training leaves the same weights, bit for bit."""
    lines = (tables / "target_classification.csv").read_text().splitlines()
    swap = str.maketrans("abc", "bca")
    (tmp_path / "target.csv").write_text("\n".join([lines[0], *(line.translate(swap) for line in lines[1:])]))
    target = {"source": f"table:{tmp_path}/target.csv", "split": "train", "batch_size": 8}
    config = kind_of("adaptation", tables)
    one, other = walk(config), walk(options.override(config, {"streams": {"target": target}}))
    assert not np.array_equal(*(each.run.material.data["target"].labels for each in (one, other)))
    assert trees.leaf_hashes(one.after) == trees.leaf_hashes(other.after)


def test_classes_are_balanced_and_domains_are_equal_parts_of_every_batch(tables):
    sources = tuple(f"table:{tables}/{name}_classification.csv" for name in ("source", "target"))
    changes = {"data.source": sources, "data.sampling": "class_balanced", "batch_size": 12, "total": (2.0, "steps")}
    run, *_, rows = walk(config_of("classification", tables, **changes))
    counts = np.zeros((2, 3), int)
    for step in range(5):
        batch = run.material.streams[MAIN][step]
        np.testing.assert_array_equal(np.bincount(batch["domain"]), [6, 6])
        for d, label in zip(batch["domain"], batch["label"], strict=True):
            counts[d, label] += 1
    np.testing.assert_array_equal(counts, 10)  # every class equally often, in each domain
    assert len(rows) == 2 and rows[0]["examples"] == 12


@pytest.mark.slow
def test_training_on_what_is_scored_needs_leave_and_is_reported(tables, tmp_path, capsys):
    source = f"table:{tables}/target_classification.csv"
    changes = {"data.extra_eval": (("target_test", source, "train[50%:]"),)}
    with pytest.raises(
        ValueError, match=r"40 of 40 examples of target_test, which is scored, .*data.transductive=True"
    ):
        train(kind_of("adaptation", tables, **changes), tmp_path / "refused", verbose=False)
    result = train(kind_of("adaptation", tables, **changes, **{"data.transductive": True}), tmp_path / "w")
    assert "40 examples of target_test, which is scored, are in the training stream 'target'" in capsys.readouterr().out
    assert result["transductive"] == [{"stream": "target", "scored": "target_test", "examples": 40}]


@pytest.mark.slow
def test_photos_with_columns_of_counts_are_a_regression(shared, tmp_path):
    """Blood smears and the counts of their cells, a file of comma-separated values, through the whole trainer."""
    config = options.override(ink_regression.get_config(), {
        **SHORT, "data.source": f"csv:{shared}/data/bccd_320/labels.csv", "data.labels": ("red_cells", "white_cells"),
        "data.train": "train[:20%]", "data.val": "val[:30%]", "data.test": "test[:20%]", "method.name": "linear_probe",
    })  # fmt: skip
    result = train(config, tmp_path / "w", verbose=False)
    assert result["task"] == "regression" and result["metrics"]["rmse"]["value"] > 0
    card = json.loads((tmp_path / "w" / "audit.json").read_text())["phases"][0]["card"]
    assert card["class_names"] == ["red_cells", "white_cells"] and len(card["target_mean"]) == 2
    assert [row["target"] for row in result["metrics"]["per_target"]] == ["red_cells", "white_cells"]


# Teachers.
TEACHER = {"name": "resnet8_cifar", "weights": ""}


def test_a_teacher_is_the_network_of_its_file_and_no_part_of_what_is_counted(tables, teacher):
    run, before, _, _ = walk(kind_of("distillation", tables, teacher))
    loaded = load.load("mlp_medium", teacher)
    for path, leaf in trees.flatten(loaded.variables["params"]).items():
        np.testing.assert_array_equal(trees.flatten(before.params["teacher"])[path], leaf)
    report = run.phases[0].audit
    own = sum(x.size for path, x in trees.flatten(before.params).items() if not path.startswith("teacher/"))
    assert report["totals"]["parameters"] == report["totals"]["trainable"] == own
    rows = {row["path"]: row for row in report["parameters"]}
    assert rows["teacher/head/kernel"]["origin"] == str(teacher)
    assert rows["teacher/head/kernel"]["optimizer_values"] == 0


def test_cached_answers_of_a_teacher_are_its_live_ones(tables, teacher, tmp_path):
    networks = {"teacher": {"name": "mlp_medium", "weights": str(teacher), "cache": "features"}}
    config = kind_of("distillation", tables, teacher, networks=networks, cache_dir=str(tmp_path))
    assert_same_training(walk(kind_of("distillation", tables, teacher)), walk(config))
    loaded, run = load.load("mlp_medium", teacher), walk(config).run
    program = single.Single(run, sharding.make_parallel("jit", jax.devices()[:1]))
    batch = program.batches(0, program.initial(0), [MAIN], never)[MAIN][0]
    x = steps.normalise(jnp.asarray(run.material.data[MAIN].inputs[batch["index"]]), loaded.card)
    expected = loaded.model.apply(loaded.variables, x, train=False)[0]
    np.testing.assert_allclose(batch["teacher"], expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_another_size_sees_the_crop_of_the_student():
    config = options.override(distill_digits.get_config(), {
        **SHORT, "data.shots": 0, "model.image_size": 8, "networks": {"teacher": {**TEACHER, "image_size": 16}},
        "data.augment": (("random_resized_crop", {"scale": (0.2, 0.9)}), ("flip", {})),
    })  # fmt: skip
    material = build.prepare(read(config), sharding.make_parallel("jit", jax.devices()[:1]))
    assert material.readers["teacher"].field == "image:teacher" and material.readers["model"].field == "image"
    stream, pictures = material.streams[MAIN], set()
    for step in range(4):
        batch = stream[step]
        assert batch["image"].shape == (8, 8, 8, 3) and batch["image:teacher"].shape == (8, 16, 16, 3)
        halved = batch["image:teacher"].astype(float).reshape(8, 8, 2, 8, 2, 3).mean((2, 4))
        for small, large, other in zip(batch["image"], halved, np.roll(halved, 1, axis=0), strict=True):
            near, far = (np.abs(small - x).mean() for x in (large, other))
            assert near < 0.5 * far
            pictures.add(small.tobytes())
    assert len(pictures) == 32
