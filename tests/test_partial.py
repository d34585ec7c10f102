"""Files that lack a part: what may be missing, what is drawn in its place, and what every later step does with it."""

import jax
import numpy as np
import pytest
from test_pretrained import add_variants, random_variables, small_resnet  # noqa: F401
from twins import images

import tl_jax
from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import files, trees
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import soups
from tl_jax.studies.report import report, results
from tl_jax.training import audit, build
from tl_jax.training.single import Single
from tl_jax.training.train import train
from tl_jax.weights import delta, formats, load

LAYER3 = "weights/resnet18_imagenet_to_layer3/resnet18_stem_to_layer3_folded_bn.safetensors"
GLYPHS = "tl_jax/assets/glyphs.safetensors"


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def without(lost, source, path):
    """Writes the tensors of a file but those whose names begin with one of `lost`, without a card."""
    tensors = formats.read(source)[0]
    formats.write_safetensors(path, {k: x for k, x in tensors.items() if not k.startswith(lost)}, {})
    return path


@pytest.fixture
def make(small_resnet, tmp_path):  # noqa: F811
    """A function that makes a file of the small ResNet without the keys that begin so."""
    card, whole = models.get(small_resnet).card, tmp_path / "whole.safetensors"
    load.export(random_variables(small_resnet), small_resnet, whole, card=card)

    def make(*lost):
        return without(lost, whole, tmp_path / "part.safetensors")

    return make


@pytest.mark.slow
def test_resnet18_to_layer3_loads_and_its_stage3_is_torchvisions(shared, tmp_path):
    reference = pytest.importorskip("torch_reference")
    torchvision = pytest.importorskip("torchvision")
    twin = torchvision.models.resnet18(weights=None).eval()
    tensors = {key: reference.torch.from_numpy(x) for key, x in formats.read(shared / LAYER3)[0].items()}
    lacking = twin.load_state_dict(tensors, strict=False)
    weights = {key for key in lacking.missing_keys if not key.endswith("num_batches_tracked")}
    assert {key.partition(".")[0] for key in weights} == {"layer4", "fc"} and not lacking.unexpected_keys
    x = images(96, batch=2)
    _, features = reference.record(twin, {"stage1": twin.layer1, "stage2": twin.layer2, "stage3": twin.layer3}, x)

    loaded = load.load("resnet18", shared / LAYER3, 2, partial=("stage4/.*",), seed=3)
    _, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    for cut, expected in features.items():
        assert np.abs(out[cut] - expected).max() <= 1e-4 * np.abs(expected).max()
    missing = {path for path, origin in loaded.origins.items() if origin == "missing"}
    assert missing == {path for path in loaded.origins if "/stage4/" in path}
    short = load.load("resnet18.stage3", shared / LAYER3, 2)
    logits, ends = jax.jit(short.model.apply)(short.variables, x)
    assert logits.shape == (2, 2) and not {"missing"} & {*short.origins.values()}
    np.testing.assert_allclose(ends["stage3"], out["stage3"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ends["pre_logits"], np.mean(ends["stage3"], axis=(1, 2)), rtol=0, atol=1e-5)
    whole = load.load("resnet18.stage3", reference.save(twin, tmp_path / "whole.pth"), 2)
    assert equal(whole.variables, short.variables), "layer4 is passed over"
    new = load.load("resnet18", "", 2, seed=3)
    flat, fresh = trees.flatten(loaded.variables), trees.flatten(new.variables)
    assert all(np.array_equal(flat[path], fresh[path]) for path in missing)
    assert not any(
        np.array_equal(flat[path], fresh[path])
        for path in flat
        if path.endswith("conv1/kernel") and path not in missing
    )


@pytest.mark.slow
def test_what_partial_may_not_excuse_is_one_error(make):
    path = make("layer3", "layer1.0.bn1.weight")
    with pytest.raises(ValueError) as error:
        load.load("small_resnet", path, 3, partial=("stage3/.*", "stage9/.*", "stage2/.*", "stage3"))
    for text in (
        "'stage9/.*' (did you mean 'stage3/.*'?)",
        "'stage3': it matches only the beginning of 'stage3/",
        "1 regexes of partial for what the file has ['stage2/.*']",
        "1 unfilled leaves [params/backbone/stage1/block0/norm1/scale (no layer1.0.bn1.weight)]",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"partial=\('stage3/.*',\) is about a weight file, and there is none"):
        load.load("small_resnet", "", 3, partial=("stage3/.*",))


@pytest.mark.slow
def test_an_error_says_which_partial_would_excuse_what_is_missing(make):
    path = make("layer3", "layer2.0.conv2")
    with pytest.raises(ValueError) as error:
        load.load("small_resnet", path, 3)
    partial = ("stage2/block0/conv2/.*", "stage3/.*")
    assert str(error.value).endswith(f"if it is known to lack them: partial={partial}")
    loaded = load.load("small_resnet", path, 3, partial=partial)
    assert equal(loaded.variables, tl_jax.load("small_resnet", path, num_classes=3, partial=partial).variables)


def test_a_shape_is_never_excused(make):
    path = make()
    tensors = formats.read(path)[0]
    formats.write_safetensors(path, {**tensors, "layer3.0.conv2.weight": np.zeros((3, 3, 3, 3), np.float32)}, {})
    with pytest.raises(
        ValueError, match=r"1 regexes of partial for what the file has .* 1 wrong shapes \[layer3.0.conv2"
    ):
        load.load("small_resnet", path, 3, partial=("stage3/.*",))


def test_half_a_norm_is_excused_by_what_matches_all_of_it_alone(make):
    path = make("layer3.0.bn1.running")
    half = r"layers that the file half fills.* \[stage3/block0/norm1: the file has bias, scale and lacks mean, var\]"
    with pytest.raises(ValueError, match=half):
        load.load("small_resnet", path, 3, partial=("stage3/.*/(mean|var)",))
    loaded = load.load("small_resnet", path, 3, partial=("stage3/block0/norm1/.*",))
    layer = "backbone/stage3/block0/norm1"
    assert {path for path, x in loaded.origins.items() if x == "missing"} == {
        f"batch_stats/{layer}/mean", f"batch_stats/{layer}/var",
    }  # fmt: skip
    assert loaded.origins[f"params/{layer}/scale"] == "layer3.0.bn1.weight"


@pytest.mark.slow
def test_a_kernel_of_which_a_file_has_a_part_is_not_missing(monkeypatch, tmp_path):
    from test_pretrained import TINY_VIT, vit

    name = add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))
    path = tmp_path / "w.safetensors"
    load.export(random_variables(name), name, path, card=models.get(name).card, layout="hf")
    without(("vit.encoder.layer.1.attention.attention.key",), path, path)
    with pytest.raises(ValueError, match=r"2 unfilled leaves .*block1/attn/qkv"):
        load.load(name, path, 3, partial=("block1/.*",))


def test_a_report_names_what_began_at_random(tmp_path):
    run = results.Run("key", ("a",), (0, ""), "done", tmp_path, weights=("r.pth", "12"), missing=("stage4/.*",))
    study = results.Results("", "", {"arm": {"a": {}}}, {}, [0], ["accuracy"], "holdout", {("a",): {(0, ""): run}})
    _, lines = report._design(study)
    assert lines[-1] == "partial weights: r.pth lacks stage4/.*, which began at random"


@pytest.fixture
def config(tmp_path):
    """The smoke test's run on its weight file without stage3, where all trains."""
    part = without(("layer3",), GLYPHS, tmp_path / "part.safetensors")
    changes = {"model.weights": str(part), "model.partial": ("stage3/.*",), "method.name": "full", "resamples": 10}
    return options.override(smoke.get_config(), changes)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_on_a_partial_file_resumes_and_leaves_what_loads_without_it(config, tmp_path, capsys):
    folder = tmp_path / "w"
    with pytest.raises(Preempted):
        train(config, folder, verbose=True, stop_requested=lambda done: done == 2)
    shown = capsys.readouterr().out
    assert "missing in the weight file, so random: 10 leaves" in shown and "WARNING" not in shown
    result = train(config, folder, verbose=False)
    assert result == train(config, tmp_path / "whole", verbose=False) and result["missing_weights"] == ["stage3/.*"]
    one, other = (load.load("", place) for place in (folder, tmp_path / "whole"))
    assert equal(one.variables, other.variables) and equal(
        one.variables, delta.load(folder / "trained.safetensors").variables
    )
    told = files.read_json(folder / "audit.json")["phases"][0]
    origins = {row["path"]: row["origin"] for row in (*told["parameters"], *told["statistics"])}
    assert {path for path, x in origins.items() if x == "missing"} == {x for x in origins if "/stage3/" in x}
    assert not any("stage3" in name for names in told["sanity"]["model"]["suspicious"].values() for name in names)

    begun = trees.flatten(soups.load_start(soups.load(folder)).variables)
    material = build.prepare(build.read(config), sharding.make_parallel())
    for path, leaf in trees.flatten(material.variables).items():
        assert "/head/" in path or np.array_equal(begun[path], leaf)


def test_missing_parts_that_rest_are_warned_of_written_and_come_back(config, tmp_path):
    config = options.override(config, {"method.name": "linear_probe"})
    run = build.build(config, sharding.make_parallel())
    (phase,), variables = run.phases, run.material.variables
    lines = audit.missing_lines(phase.audit)
    assert lines[1].startswith("WARNING: frozen though missing in the weight file [stage3/.*]: random numbers")
    constant = Single(run, sharding.make_parallel()).constant_hashes()
    assert constant and not any("/stage3/" in path for path in constant), "what was drawn is in the checkpoints"
    proved = audit.prove([phase.audit], variables, variables)
    about = {"model": "resnet8_cifar", "weights": run.material.base, "seed": config.seed}
    path = tmp_path / "trained.safetensors"
    delta.save(path, variables, proved, run.material.card, partial=config.model.partial, **about)
    assert equal(delta.load(path).variables, variables)
    statistics = options.override(config, {"method.name": "full", "method.norm": ((".*", "frozen"),)})
    lines = audit.missing_lines(build.build(statistics, sharding.make_parallel()).phases[0].audit)
    assert "[stage3/block0/norm1/mean, " in lines[1]
