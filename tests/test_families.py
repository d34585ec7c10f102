"""Every family of networks passes the same tests: what trains and what stays, norm policies, the frozen prefix and its
cache, added parameters, resuming, precision, devices, heads and phases, sizes; and the rules, on every name."""

import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import close, images, random_variables

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.data.text import tokenizer
from tl_jax.methods import recipes, rules
from tl_jax.models import conversion, inception, peft
from tl_jax.models.convnext import ConvNeXt
from tl_jax.models.densenet import DenseNet
from tl_jax.models.inception import Inception
from tl_jax.models.kernels import convolve
from tl_jax.models.lenet import LeNet
from tl_jax.models.mlp import MLP
from tl_jax.models.mobile import TF, MobileNet, Row
from tl_jax.models.recurrent import Recurrent
from tl_jax.models.resnet import ResNet
from tl_jax.models.squeezenet import SqueezeNet
from tl_jax.models.swin import Swin
from tl_jax.models.text import Transformer
from tl_jax.models.variant import ConvNet, Variant
from tl_jax.models.vgg import VGG
from tl_jax.models.vit import ViT
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import audit, build, single
from tl_jax.training.train import never, train
from tl_jax.weights import load

CLASSES = 10
ROOT = pathlib.Path(__file__).resolve().parents[1]
# A network of two to four blocks of each kind that a family has, and the side of its images, 0 for texts.
INVERTED = ((Row("inverted", 3, 1, 1, 8),), (Row("inverted", 3, 2, 3, 8, 2),))
SQUEEZED = ((Row("inverted", 5, 1, 1, 8, 1, True),), (Row("inverted", 3, 2, 2, 8, 2, True),))
HARD = ((Row("inverted", 3, 2, 1, 8, 1, True, "relu"),), (Row("inverted", 5, 1, 2.5, 8, 2, True),))
FUSED = ((Row("fused", 3, 1, 1, 8),), (Row("fused", 3, 2, 2, 8),), (Row("inverted", 3, 1, 2, 8, 1, True),))
SEPARABLE = ((Row("separable", 3, 1, 1, 8),), (Row("separable", 3, 2, 1, 16, 2),))
VGG_SIZES = {"depths": (2, 1, 1), "widths": (4, 6, 8), "features": 12}
WORDS = {"width": 4, "layers": 2, "vocab_size": 40, "embed_dim": 6}
VIT_SIZES = {"patch_size": 8, "width": 12, "depth": 3, "heads": 2, "image_size": 24}
TOWER = {"width": 12, "depth": 3, "heads": 2, "vocab_size": 40, "positions": 16, "pre_norm": True, "pooling": "last"}
FAMILIES = {
    "resnet": (ResNet, {"depths": (1, 2), "widths": (4, 8)}, 24),
    "bottleneck": (ResNet, {"depths": (2, 1), "widths": (4, 4), "bottleneck": True}, 24),
    "vgg": (VGG, VGG_SIZES, 24),
    "vgg_bn": (VGG, {**VGG_SIZES, "norm": True}, 24),
    "inception": (Inception, {}, 75),
    "densenet": (DenseNet, {"depths": (1, 2), "growth": 4}, 24),
    "squeezenet": (SqueezeNet, {"stem": (4, 3), "depths": (1, 1, 1)}, 32),
    "mobilenetv1": (MobileNet, {"stages": SEPARABLE, "stem": 8}, 24),
    "mobilenetv2": (MobileNet, {"stages": INVERTED, "stem": 8, "final": 16}, 24),
    "mobilenetv3": (
        MobileNet,
        {"stages": HARD, "stem": 8, "final": 16, "dense": 12, "act": "hard_swish", "hard": True},
        24,
    ),
    "efficientnet": (MobileNet, {"stages": SQUEEZED, "stem": 8, "final": 16, "act": "silu"}, 24),
    "efficientnetv2": (MobileNet, {"stages": FUSED, "stem": 8, "final": 16, "act": "silu"}, 24),
    "tf": (MobileNet, {"stages": SQUEEZED, "stem": 8, "final": 16, "act": "silu", **TF}, 24),
    "convnext": (ConvNeXt, {"depths": (1, 2), "widths": (4, 8), "scale_init": 0.5}, 32),
    "swin": (Swin, {"depths": (1, 2), "width": 4, "head_size": 2, "window": 3}, 32),
    "vit": (ViT, VIT_SIZES, 24),
    "dinov2": (ViT, {**VIT_SIZES, "layer_scale": 0.5, "registers": 2, "class_position": False}, 24),
    "clip": (ViT, {**VIT_SIZES, "pre_norm": True, "act": "quick_gelu", "norm_eps": 1e-5}, 24),
    "siglip": (ViT, {**VIT_SIZES, "pool": "map"}, 24),
    "lenet": (LeNet, {"widths": (4, 6, 10)}, 28),
    "mlp": (MLP, {"widths": (12, 12, 12), "norm": True, "channels": 3}, 8),
    "lstm": (Recurrent, {"cell": "lstm", "bidirectional": True, **WORDS}, 0),
    "gru": (Recurrent, {"cell": "gru", **WORDS}, 0),
    "clip_text": (Transformer, {**TOWER, "norm_eps": 1e-5, "act": "quick_gelu", "causal": True}, 0),
    "siglip_text": (Transformer, {**TOWER, "norm_eps": 1e-6, "act": "gelu_tanh", "fill": 1}, 0),
}
TEXTS = tuple(name for name, (*_, size) in FAMILIES.items() if not size)  # which read tokens
IMAGES = tuple(name for name in FAMILIES if name not in TEXTS)
SMALL_INCEPTION = ({"Mixed_5b": inception._five(8)}, {"Mixed_6a": inception._TO_17, "Mixed_6b": inception._seven(8)})


def make(family, **fields):
    kind, own, _ = FAMILIES[family]
    return kind(**{"num_classes": CLASSES, **own, **fields})


def write_texts(folder):
    """Texts of other lengths with the word of their class somewhere, and the tokenizer that knows their words."""
    rng, rows = np.random.default_rng(0), []
    for i in range(100):
        words = [*rng.choice([f"w{j}" for j in range(20)], i % 11), f"class{i % CLASSES}"]
        rows.append(("train" if i < 60 else "test", " ".join(rng.permutation(words)), i % CLASSES))
    (folder / "texts.csv").write_text("split,text,label\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    tokenizer.train("words", (row[1] for row in rows)).save(folder)


@contextlib.contextmanager
def small_files(folder):
    """Gives the weight file of a small network of a family, random numbers; it is in the table of models meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "STAGES", SMALL_INCEPTION)
        write_texts(pathlib.Path(folder))

        @functools.cache
        def file_of(family):
            kind, fields, size = FAMILIES[family]
            card = Card(f"small_{family}", CLASSES, size or 224, crop=1.0)
            if family in TEXTS:
                text = {"input": "text", "vocab": WORDS["vocab_size"], "max_length": 16, "pooling": "last"}
                card = card.replace(mean=(), std=(), **text)
            variant = Variant(functools.partial(kind, **fields), card, {"native": conversion.NATIVE}, {})
            patch.setitem(models.MODELS, card.model, variant)
            path = pathlib.Path(folder, f"{family}.safetensors")
            load.export(variables_of(family), card.model, path, card=card)
            return path

        yield file_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with small_files(tmp_path_factory.mktemp("weights")) as file_of:
        yield file_of


def config_of(family, files, **changes):
    path = files(family)
    own = {"data.source": f"text:{path.parent / 'texts.csv'}", "data.train": "train", "data.test": "test"}
    changes = {**(own if family in TEXTS else {}), **changes}
    return options.override(smoke.get_config(), {
        "model.name": f"small_{family}", "model.weights": str(path), "model.head_init": "lecun",
        "data.train": "train[:5%]", "data.val": "", "data.test": "test[:8%]", "data.shots": 0, "select": "last",
        "batch_size": 8, "eval_batch_size": 64, "log_every": (1.0, "steps"), "eval_every": (1.0, "epochs"),
        "lr": 0.02, "optimizer": "sgd", "total": (2.0, "steps"), "resamples": 5, **changes,
    })  # fmt: skip


def walk(config, devices=1, change=lambda plan: plan):
    """Two steps of a run: what was built, its variables before and behind them, and the loss of each."""
    parallel = sharding.make_parallel("jit", jax.devices()[:devices])
    run = build.build(config, parallel)
    run = run._replace(phases=tuple(phase._replace(plan=change(phase.plan)) for phase in run.phases))
    program = single.Single(run, parallel)
    state, losses, compiled = program.initial(0), [], {}
    before = jax.device_get(single.current_variables(state))
    sets = program.batches(0, state, list(run.phases[0].plan.streams), never)
    for done, batch in enumerate(program.iterate(sets, 0, run.total_steps), 1):
        shapes = single.shapes_of(batch)
        if shapes not in compiled:
            compiled[shapes], _ = program.compile(0, state, batch)
        state, line = program.take_line(0, jax.block_until_ready(compiled[shapes](state, batch)), done)
        sums = program.read_line(line)[0][0]
        losses.append(sums["loss"] / sums["examples"])
    return run, before, jax.device_get(single.current_variables(state)), losses


def moved(before, after):
    hashes = trees.leaf_hashes(before)
    return {path for path, value in trees.leaf_hashes(after).items() if value != hashes[path]}


def each_family(first, names=tuple(FAMILIES)):
    """All families as cases, from `first` on, which is checked by default; the next are CI's, see conftest.py."""
    order = [*names[names.index(first) :], *names[: names.index(first)]]
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=() if name == first else pytest.mark.slow) for name in order]
    )


def norms_of(family):
    """The paths of layers with running statistics."""
    statistics = jax.eval_shape(make(family).init, jax.random.key(0), input_of(family)).get("batch_stats", {})
    return tuple(sorted({path.rpartition("/")[0] for path in trees.flatten(statistics)}))


def input_of(family, batch=4, seed=0):
    if family not in TEXTS:
        return images(FAMILIES[family][2], batch, seed)
    x = np.random.default_rng(seed).integers(0, WORDS["vocab_size"], (batch, 6, 2)).astype(np.int32)
    x[..., 1], x[1, 3:, 0], x[2, :2, 0] = 0, -1, -1
    return x


def variables_of(family, model=None):
    """Random values for every leaf."""
    return random_variables(model or make(family), FAMILIES[family][2], x=input_of(family))


def has_batch_norm(family):
    return family == "mlp" or (issubclass(FAMILIES[family][0], ConvNet) and family not in ("vgg", "squeezenet"))


WAYS = {
    "head": {"method.name": "linear_probe"},
    "last 1": {"method.name": "last_k", "method.k": 1},
    "last 2": {"method.name": "last_k", "method.k": 2},
    "norms": {"method.name": "norm_only"},
}


@each_family("siglip")
@pytest.mark.parametrize("way", ["last 1", *(pytest.param(x, marks=pytest.mark.slow) for x in WAYS if x != "last 1")])
def test_what_is_frozen_stays_bit_equal_and_all_else_moves(family, way, files):
    if way == "norms" and family in ("vgg", "squeezenet", "lenet", "lstm", "gru"):
        with pytest.raises(ValueError, match="decides no parameter"):
            walk(config_of(family, files, **WAYS[way]))
        return
    run, before, after, losses = walk(config_of(family, files, **WAYS[way]))
    paths = list(trees.flatten(before["params"]))
    blocks = rules.block_names(paths, run.material.model.cuts)
    last = "|".join(blocks[-1:] if way == "last 1" else blocks[-2:])
    parts = {"head": r"(?!)", "norms": ".*"}.get(way, f"backbone/({last}|norm|final)(/.*)?")
    chosen = {"head": parts, "norms": r"backbone/(.*/)?norm\d*/(scale|bias)"}.get(way, parts)
    expected = {f"params/{path}" for path in paths if re.fullmatch(f"head/.*|{chosen}", path)}
    statistics = {f"batch_stats/{path}" for path in trees.flatten(before["batch_stats"])}
    updated = {path for path in statistics if re.fullmatch(f"batch_stats/({parts})/(mean|var)", path)}
    changed = moved(before, after)
    # A bias before a BatchNorm that subtracts the mean of the batch has no gradient.
    without = {path for path in expected if path.endswith("/bias")} if has_batch_norm(family) else set()
    assert changed <= expected | updated and changed >= (expected | updated) - without
    assert np.isfinite(losses).all()


NORMS = tuple(name for name in FAMILIES if has_batch_norm(name))


@each_family("mobilenetv3", NORMS)
def test_norm_policies_decide_the_statistics_and_folding_changes_no_number(family, files):
    model, x = make(family), input_of(family)
    variables, norms = variables_of(family, model), norms_of(family)
    plain, _ = jax.jit(model.clone(fold=False).apply)(variables, x)
    close(jax.jit(model.apply)(variables, x)[0], plain, 1e-4)
    for policy, frozen in {"frozen": norms, "update": ()}.items():
        train = functools.partial(model.clone(frozen_norms=frozen).apply, train=True, mutable=["batch_stats"])
        (logits, _), state = jax.jit(train)(variables, x)
        same = {
            path: np.array_equal(leaf, trees.flatten(variables)[path]) for path, leaf in trees.flatten(state).items()
        }
        assert set(same.values()) == {policy == "frozen"}
        if frozen:
            close(logits, plain, 1e-4)
        else:
            assert np.abs(logits - plain).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", NORMS)
def test_norm_policies_of_a_run_take_the_place_of_those_of_the_blocks(family, files):
    for method, policy in {"full": "frozen", "linear_probe": "update"}.items():
        run, before, after, _ = walk(
            config_of(family, files, **{"method.name": method, "method.norm": ((".*", policy),)})
        )
        statistics = {path for path in moved(before, after) if path.startswith("batch_stats/")}
        everything = {f"batch_stats/{path}" for path in trees.flatten(before["batch_stats"])}
        assert statistics == (everything if policy == "update" else set())
        assert run.phases[0].plan.prefix is None


def test_a_norm_policy_without_running_statistics_is_refused(files):
    with pytest.raises(ValueError, match=r"method\.norm.*the network has no running statistics"):
        walk(config_of("convnext", files, **{"method.norm": ((".*", "frozen"),)}))


def cuts_of(family):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "STAGES", SMALL_INCEPTION)
        return make(family).deterministic_cuts


PLACES = [(family, cut) for family in FAMILIES for cut in cuts_of(family)]
NOW = ("mlp", "stem")


@pytest.mark.parametrize(
    ("family", "cut"),
    [NOW, *(pytest.param(*place, marks=pytest.mark.slow) for place in PLACES if place != NOW)],
)
def test_the_frozen_prefix_and_cached_features_up_to_any_cut_give_the_same_losses(family, cut, files, tmp_path):
    model = make(family)
    paths = (
        [path for path in load.default_shapes(f"small_{family}") if path.startswith("params/backbone/")]
        if files(family)
        else []
    )
    places = rules.places([path.removeprefix("params/") for path in paths], model.cuts)
    behind = [path for path, place in places.items() if place > model.cuts.index(cut)]
    chosen = (("head/.*", "head"), *((re.escape(path), "backbone") for path in behind))
    config = config_of(
        family,
        files,
        **{
            "method.name": "rules",
            "method.rules": (*chosen, *([(".*", "frozen")] if len(behind) < len(paths) else [])),
        },
    )
    run, _, _, live = walk(config)
    prefix = run.phases[0].plan.prefix.cut
    assert prefix == cut or not any(places[path] == model.cuts.index(cut) + 1 for path in behind)
    *_, whole = walk(config, change=lambda plan: plan._replace(prefix=None))
    cached = {"cache": "features", "cache_dir": str(tmp_path)}
    run, *_, stored = walk(options.override(config, cached))
    assert run.phases[0].plan.prefix.cached
    np.testing.assert_allclose(live, whole, rtol=1e-5)
    np.testing.assert_allclose(stored, whole, rtol=1e-5)


VITS = tuple(name for name, (kind, *_) in FAMILIES.items() if kind is ViT)
ADDED = {
    "lora": {"rank": 2},
    "ssf": {},
    "adapter": {"bottleneck": 2},
    "prompt": {"tokens": 2, "deep": True},
}


@each_family("lenet")
@pytest.mark.parametrize("name", ["lora", *(pytest.param(x, marks=pytest.mark.slow) for x in ADDED if x != "lora")])
def test_added_parameters_train_and_what_merges_gives_the_same_logits(family, name, files):
    model, x, addition = make(family), input_of(family), (name, ADDED[name])
    variables = variables_of(family, model)
    takes = {"adapter": (*VITS, "clip_text", "siglip_text"), "prompt": VITS}
    if family not in takes.get(name, FAMILIES):
        needs = {"adapter": "a transformer", "prompt": "a ViT"}[name]
        with pytest.raises(ValueError, match=f"{name} needs {needs}, and this is a .*; lora and ssf serve every"):
            peft.init(model, variables, [addition], jax.random.key(0))
        return
    added = peft.init(model, variables, [addition], jax.random.key(0))
    adapted = peft.Adapted(model, (addition,))
    if name != "prompt":
        both = {**variables, "params": {**variables["params"], **added}}
        close(jax.jit(adapted.apply)(both, x)[0], jax.jit(model.apply)(variables, x)[0], 1e-4)
    rng = np.random.default_rng(0)
    added = jax.tree.map(lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape)), added)
    both = {**variables, "params": {**variables["params"], **added}}
    logits = jax.jit(adapted.apply)(both, x)[0]
    if peft.can_merge((addition,)):
        close(jax.jit(model.apply)(peft.merge(both, (addition,)), x)[0], logits, 1e-4)
    else:
        with pytest.raises(ValueError, match=f"{name} cannot be merged"):
            peft.merge(both, (addition,))
    # The gradient of an a that acts on states is small: in two steps of the usual rate it is rounded away.
    rate = {"lr": 1.0} if family in TEXTS else {}
    _, before, after, losses = walk(config_of(family, files, **{"method.add": (addition,)}, **rate))
    paths = {path for path in trees.flatten(before["params"]) if path.startswith((f"{name}/", "head/"))}
    changed = moved(before, after)
    assert changed <= {f"params/{path}" for path in paths} and np.isfinite(losses).all()
    # The gradient of a is zero in the first step, since b is; and no number of the last block's other tokens counts.
    assert len(changed) == len(paths), sorted({f"params/{path}" for path in paths} - changed)


def remains(folder):
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    names = ("metrics.jsonl", "result.json", "model.safetensors", "audit.json")
    return {"predictions": arrays} | {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@each_family("vgg_bn")
def test_a_run_that_stopped_in_the_middle_ends_bit_equal(family, files, tmp_path):
    more = {"ema": 0.5, "model.dropout": 0.2, "optimizer": "adamw"}
    more |= {"method.mixup": 0.2} if family in IMAGES else {}  # tokens are no numbers to mix
    more |= {"model.drop_path": 0.3} if family in PATHS else {}
    more |= {"model.hidden_dropout": 0.1} if make(family).drops_inside else {}
    config = config_of(family, files, **WAYS["last 2"], **more)
    train(config, tmp_path / "whole", verbose=False)
    with pytest.raises(Preempted, match="after step 1 of 2"):
        train(config, tmp_path / "stopped", verbose=False, stop_requested=lambda done: done == 1)
    train(config, tmp_path / "stopped", verbose=False)
    assert remains(tmp_path / "stopped") == remains(tmp_path / "whole")


PATHS = (
    "resnet",
    "bottleneck",
    "mobilenetv2",
    "mobilenetv3",
    "efficientnet",
    "efficientnetv2",
    "tf",
    "convnext",
    "swin",
    *VITS,
    "clip_text",
    "siglip_text",
)


@each_family("mlp")
def test_half_precision_recomputing_and_stochastic_depth(family, files):
    model, x = make(family), input_of(family)
    variables = variables_of(family, model)
    logits, _ = jax.jit(model.apply)(variables, x)
    half, out = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, x)
    assert half.dtype == out["pre_logits"].dtype == jnp.float32 and out[model.cuts[1]].dtype == jnp.bfloat16
    close(half, logits, 0.1)

    def gradient(**fields):
        own = model.clone(frozen_norms=norms_of(family), **fields)

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            (logits, _), _ = own.apply({**variables, "params": params}, x, True, rngs=rngs, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    plain = gradient()
    for remat in ("block", "dots"):
        jax.tree.map(functools.partial(close, tolerance=1e-4), gradient(remat=remat), plain)
    if family in PATHS:
        (_, dropped), _ = gradient(drop_path=0.9)
        assert np.abs(dropped - plain[0][1]).max() > 1e-3
        close(jax.jit(model.clone(drop_path=0.9).apply)(variables, x)[0], logits, 1e-6)
        assert model.clone(drop_path=0.9).deterministic_cuts == model.cuts[:2]
    elif family != "mobilenetv1":
        with pytest.raises(ValueError, match=r"drop_path=0\.9: .* has no residual branches to drop"):
            model.clone(drop_path=0.9).apply(variables, x)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forms_of_a_cpu_have_the_numbers_of_xlas(family, files, monkeypatch):
    """On one CPU device a network takes other ways through its convolutions and norms than on the four of the tests."""
    model, x = make(family), input_of(family)
    variables = variables_of(family, model)

    def both(by_hand):
        monkeypatch.setattr(convolve, "by_hand", lambda dtype: by_hand)

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            (logits, _), state = model.apply(
                {**variables, "params": params}, x, True, rngs=rngs, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), (logits, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), both(True), both(False))


def check_devices(family, files, devices):
    """Losses and parameters of some steps; of full training without stochastic parts."""
    config = config_of(family, files, **{"method.name": "full", "lr": 1e-3, "model.dropout": 0.0})
    (_, _, one, losses), (_, _, many, theirs) = (walk(config, count) for count in (1, devices))
    np.testing.assert_allclose(theirs, losses, rtol=3e-5)
    for path, leaf in trees.flatten(one).items():
        np.testing.assert_allclose(trees.flatten(many)[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


def eight_devices(*families):
    """Run in a process of its own, as the number of simulated devices is fixed when jax starts."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as folder, small_files(folder) as files:
        for family in families:
            check_devices(family, files, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "families", [("efficientnet", "dinov2"), pytest.param(tuple(FAMILIES), marks=pytest.mark.exhaustive)], ids=len
)
@pytest.mark.exhaustive
def test_eight_devices_train_as_one_does(families):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = f"import sys; sys.path[:0] = ['tests', '.']; import test_families; test_families.eight_devices(*{families})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FLAT = (("flatten", {}), ("dense", {"features": 256}), ("relu", {}), ("dropout", {"rate": 0.5}))
POOLED = (("pool", {}), *FLAT[1:])


@pytest.mark.slow
@each_family("vgg", IMAGES)
@pytest.mark.parametrize("layers", [FLAT, pytest.param(POOLED, marks=pytest.mark.slow)], ids=["flatten", "pool"])
def test_heads_of_the_tutorials_with_softmax_and_with_a_sigmoid(family, layers, files):
    for task in ({}, {"task": "binary", "data.source": "digits:parity"}):
        config = config_of(family, files, **{"model.head": layers, "method.name": "linear_probe", **task})
        if family in ("lenet", "mlp") and layers == POOLED:
            with pytest.raises(ValueError, match=r"begins with pool, but the backbone's output .* has no positions"):
                walk(config)
            continue
        run, before, after, losses = walk(config)
        model = run.material.model.model  # the prefix ends at the map, or before what is random, as in LeNet
        last = [cut for cut in model.cuts[:-1] if cut in model.deterministic_cuts][-1]
        assert np.isfinite(losses).all() and run.phases[0].plan.prefix.cut == last
        own = {f"params/{path}" for path in trees.flatten(before["params"]) if path.startswith("head/")}
        assert {path.split("/")[2] for path in own} == {"dense1", "out"} and moved(before, after) == own
        params = before["params"]["head"]
        assert params["dense1"]["kernel"].shape[1] == 256
        assert params["out"]["kernel"].shape == (256, 1 if task else CLASSES)


@pytest.mark.slow
@each_family("mobilenetv2")
def test_the_head_and_then_the_last_blocks_train_in_two_phases(family, files, tmp_path):
    layers = FLAT[1:] if family in TEXTS else FLAT if family in ("lenet", "mlp") else POOLED
    config = config_of(family, files, **{"model.head": layers})
    config = options.override(config, recipes.methods(4, "steps")["head_then_last"])
    result = train(config, tmp_path / "w", verbose=False)
    report = json.loads((tmp_path / "w" / "audit.json").read_text())
    first, second = ({row["path"] for row in phase["parameters"] if row["trainable"]} for phase in report["phases"])
    paths = [row["path"] for row in report["phases"][0]["parameters"]]
    blocks = "|".join(rules.block_names(paths, make(family).cuts)[-2:])
    assert first == {path for path in paths if path.startswith("head/")}
    assert second == first | {path for path in paths if re.match(f"backbone/({blocks}|norm|final)/", path)}
    assert report["proof"]["bit_equal"] and result["metrics"]["count"]


def shape_of(family, height, width):
    """The nearest that the family takes: a ViT whole patches, Inception no less than 75 pixels."""
    if family in VITS:
        return height // 8 * 8, width // 8 * 8
    return (height + 42, width + 42) if family == "inception" else (height, width)


@each_family("tf", IMAGES)
def test_images_of_odd_sides_that_are_no_squares(family, files):
    shape = shape_of(family, 37, 50)
    model = make(family, **({"image_size": shape} if family in VITS else {}))
    x, variables = images(shape), random_variables(model, shape)
    if family not in (*VITS, "lenet", "mlp"):  # whose parameters depend on the size
        jax.tree.map(np.testing.assert_array_equal, variables, random_variables(model, FAMILIES[family][2]))
    logits, out = jax.jit(model.apply)(variables, x)
    assert set(out) == {*model.cuts, "embedding", "logits"} and logits.shape == (4, CLASSES)
    assert np.isfinite(logits).all() and len(set(np.asarray(logits)[:, 0])) == 4
    cut = model.cuts[-2]
    close(jax.jit(functools.partial(model.apply, start=cut))(variables, out[cut])[0], logits, 1e-5)


# The rules on the names of the real networks, whose parameters are traced and not made.

NAMES = (
    "vgg11_bn", "inception_v3", "squeezenet1_1", "mobilenetv3_small_100", "convnext_atto",
    "vit_base_patch16_siglip_224", "lenet", "mlp_small", "bert_tiny", "distilgpt2",
)  # fmt: skip
EVERY = [
    *NAMES,
    *(
        pytest.param(name, marks=(pytest.mark.slow, pytest.mark.exhaustive))
        for name in models.MODELS
        if name not in NAMES
    ),
]


def leaves_of(name):
    """The parameter paths of a network, and those of its running statistics, as it stands in the table."""
    variant = models.get(name)
    columns = {"columns": ("x",), "mean": (0.0,), "std": (1.0,)} if variant.card.input == "table" else {}
    card = variant.card.replace(num_classes=variant.card.num_classes or 2, **columns)
    shapes = load._network_shapes(variant.module, card.to_json())
    return [[x.partition("/")[2] for x in shapes if x.startswith(kind)] for kind in ("params/", "batch_stats/")]


def trained(name, cuts, paths, *args):
    matches = trees.match_rules(paths, rules.make_rules(name, paths, cuts, *args))
    return {path for path in paths if matches[path].value != "frozen"}


@pytest.mark.parametrize("name", EVERY)
def test_rules_know_every_part_of_every_network_by_its_path(name):
    (paths, statistics), cuts = leaves_of(name), models.get(name).module(num_classes=2).cuts
    head, backbone = ({x for x in paths if x.startswith(kind)} for kind in ("head/", "backbone/"))
    assert head | backbone == set(paths) and head == trained("linear_probe", cuts, paths)
    parts, blocks = rules.parts(paths), rules.block_names(paths, cuts)
    assert set(parts) == backbone and set(parts.values()) - set(blocks) <= {"stem", "norm", "final"}
    # Each block ends at a cut of its own, which its stage's name stands for where it is the last one.
    ends = [block if block in cuts else block.partition("/")[0] for block in blocks]
    silent = {"stage1"} if re.match(r"vgg11", name) else set()  # VGG-11's first stage is a pool
    assert ends == [cut for cut in cuts[1:-1] if cut not in (*silent, "norm", "final")]
    assert cuts[0] == "stem" and cuts[-1] == "pre_logits" and "stem" in parts.values()
    if not blocks:  # a mean of word vectors, which is its stem
        return
    pieces = [trained("blocks", cuts, paths, 0, (part,)) - head for part in dict.fromkeys(parts.values())]
    assert sum(map(len, pieces)) == len(backbone) and set().union(*pieces) == backbone
    behind = {path for path, part in parts.items() if part in ("norm", "final")}
    for k in {1, min(2, len(blocks)), len(blocks)}:
        last = {path for path, part in parts.items() if part in blocks[-k:]} | behind
        assert trained("last_k", cuts, paths, k) - head == last
        assert cuts[rules.frozen_cuts(last, cuts) :][:1] == (ends[-k],)
    # Scales are those of norms alone, and running statistics lie beside scales.
    norms = {path.removesuffix("/scale") for path in backbone if path.endswith("/scale")}
    assert {path.rpartition("/")[0] for path in statistics} <= norms
    if norms:
        assert trained("norm_only", cuts, paths) - head == {
            f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")
        }
    zeros = trees.unflatten({path: np.zeros(1) for path in statistics})
    last = trained("last_k", cuts, paths, 1)
    labels = {path: "backbone" if path in last else "frozen" for path in paths}
    policies = audit.norm_policies(zeros, labels, ())
    updated = {norm for norm, policy in policies.items() if policy == "update"}
    assert updated == {
        path.rpartition("/")[0] for path in statistics if rules.parts([path])[path] in (blocks[-1], "norm", "final")
    }
