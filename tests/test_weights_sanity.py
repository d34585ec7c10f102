"""Weight files: damaged values are named and genuine ones are not; bytes are those that config, name and study say."""

import itertools
import json
import re
import shutil
import time

import jax
import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import files, trees
from tl_jax.models import conversion, vit
from tl_jax.models import get as get_variant
from tl_jax.runtime import workdir
from tl_jax.studies import store, worker
from tl_jax.studies.report import results
from tl_jax.studies.study import Study
from tl_jax.training.train import train
from tl_jax.weights import formats, hub, load, sanity

SQUARE = "transposed square kernels"
STEM, CONV = "params/backbone/stem/conv/kernel", "params/backbone/stage3/block0/conv2/kernel"
SCALE = "params/backbone/stage1/block0/norm1/scale"
GENUINE = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors",
    "resnet20_cifar": "cifar10_resnet/resnet20-12fca82f.th",
    "resnet32_cifar": "cifar10_resnet/resnet32-d509ac18.th",
    "resnet18": "resnet18_imagenet_to_layer3/resnet18_stem_to_layer3_folded_bn.safetensors",
}
MISSED = {"resnet32_cifar": 1}  # of 28: 16 channels whose variance says nothing; no kernel of another file


def host(loaded):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(loaded.variables).items()}


@pytest.fixture(scope="module")
def glyphs():
    return host(load.load("", "builtin:glyphs"))


def squares(flat):
    """(path, slice of a qkv kernel or None) of every square kernel."""
    for path, x in flat.items():
        if path.endswith("attn/qkv/kernel"):
            yield from ((path, i) for i in range(3))
        elif path.endswith("/kernel") and x.shape[-1] == x.shape[-2]:
            yield path, None


def transpose(flat, *places):
    flat = dict(flat)
    for path, i in places:
        parts = [flat[path]] if i is None else np.split(flat[path], 3, axis=1)
        parts[i or 0] = np.swapaxes(parts[i or 0], -1, -2)
        flat[path] = np.ascontiguousarray(parts[0] if i is None else np.concatenate(parts, axis=1))
    return flat


def name_of(place):
    return place[0] if place[1] is None else f"{place[0]}: {'qkv'[place[1]]}"


def around(flat, place):
    """The leaves beside a kernel, so that not all others are judged again."""
    folder = re.sub(r"(attn/\w+|\w+)/kernel$", "", place[0].removeprefix("params/"))
    return {path: x for path, x in flat.items() if path.partition("/")[2].startswith(folder)}


def check_transposed(flat, missed=0):
    """Each square kernel transposed alone is named, and nothing with it; then all at once; `missed` may be unseen."""
    places = list(squares(flat))
    assert sanity.transposed(flat) == []
    alone = [sanity.transposed(transpose(around(flat, place), place)) for place in places]
    assert all(set(found) <= {name_of(place)} for found, place in zip(alone, places, strict=True))
    assert sum(map(bool, alone)) >= len(places) - missed
    together = sanity.transposed(transpose(flat, *places))
    assert set(together) <= set(map(name_of, places)) and len(together) >= len(places) - missed


def attention_block(rng, width=64, structure=True):
    """A block whose residual channels and pairs of kernels have norms in common, as trained ones have, or none."""
    stream, *inner = (np.exp(structure * rng.standard_normal(width)) for _ in range(3))

    def kernel(*norms):
        return (rng.standard_normal([len(n) for n in norms]) * norms[0][:, None] * norms[1]).astype(np.float32)

    wide = np.ones(4 * width)
    qkv = [kernel(stream, inner[0]), kernel(stream, inner[0]), kernel(stream, inner[1])]
    values = [stream, 1 / stream, kernel(stream, wide), kernel(wide, stream), np.concatenate(qkv, axis=1)]
    return {
        f"params/b/{name}": x for name, x in zip(sanity.ATTENTION, [*values, kernel(inner[1], stream)], strict=True)
    }


DAMAGE = {
    "of float16's precision": (STEM, lambda x: x.astype(np.float16).astype(np.float32)),
    "of bfloat16's precision": (CONV, lambda x: (x.view(np.uint32) & 0xFFFF0000).view(np.float32)),
    "all zero": (STEM, np.zeros_like),
    "constant": (SCALE, lambda x: np.full_like(x, 0.7)),
    SQUARE: (CONV, lambda x: np.ascontiguousarray(np.swapaxes(x, 2, 3))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_named_with_its_tensor_and_nothing_else_is(glyphs, kind):
    path, change = DAMAGE[kind]
    found = sanity.examine({**glyphs, path: change(glyphs[path])})
    assert found["suspicious"] == {kind: [path]}
    assert f"SUSPICIOUS: 1 {kind} [{path}]" in sanity.line(found)


def test_a_norm_is_compared_with_those_of_equal_shape_in_the_file_alone():
    rng = np.random.default_rng(0)
    flat = {f"params/{name}/kernel": rng.standard_normal((4, 8)).astype(np.float32) for name in "abc"}
    flat["params/d/kernel"] = 1000 * rng.standard_normal((4, 9)).astype(np.float32)  # no other has its shape
    assert sanity.examine(flat)["suspicious"] == {}
    for factor in (30, 1 / 30):
        (found,) = sanity.examine({**flat, "params/b/kernel": flat["params/b/kernel"] * factor})["suspicious"].items()
        assert found == ("norms over 10 times from those of equal shape", ["params/b/kernel"])


def test_the_facts_are_those_of_all_values(glyphs):
    found, values = sanity.examine(glyphs), np.concatenate([x.ravel() for x in glyphs.values()])
    assert found["suspicious"] == {} and sanity.line(found).endswith("nothing suspicious")
    assert (found["values"], found["range"]) == (values.size, [values.min(), values.max()])
    assert found["zeros"] == pytest.approx((values == 0).mean()) and json.loads(json.dumps(found)) == found


def test_transposed_kernels_of_the_builtin_network_are_found(glyphs):
    assert len(list(squares(glyphs))) == 4
    check_transposed(glyphs)


def test_transposed_projections_are_found_alone_and_in_every_combination():
    block = attention_block(np.random.default_rng(1))
    places = list(squares(block))
    for count in range(5):
        for chosen in itertools.combinations(places, count):
            assert set(sanity.transposed(transpose(block, *chosen))) == set(map(name_of, chosen))


def test_where_values_are_random_nothing_is_said_to_be_transposed():
    rng = np.random.default_rng(2)
    blocks = [attention_block(rng, 32, structure=False) for _ in range(200)]
    named = [sanity.transposed(transpose(block, *squares(block))) for block in blocks]
    assert sum(map(bool, named)) == 0
    named = 0
    for _ in range(500):
        flat = {f"batch_stats/a/norm/{name}": rng.random(16) for name in ("mean", "var")}
        flat |= {"params/a/norm/bias": rng.random(16), "params/a/conv/kernel": rng.standard_normal((3, 3, 16, 16))}
        named += len(sanity.transposed(flat))
    assert named <= 1
    part = {path: x for path, x in blocks[0].items() if "fc1" not in path}  # model.reinit made it new
    assert sanity.transposed(part) == []


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "resnext50_32x4d", "vit_tiny_patch16_224")]


@pytest.mark.parametrize("name", ["resnet8_cifar", "mlp_small", *LARGE])
def test_an_initialisation_is_not_suspicious(name):
    columns = ("a", "b", "c") if name.startswith("mlp") else ()
    assert sanity.examine(host(load.load(name, columns=columns)))["suspicious"] == {}


@pytest.mark.slow
def test_an_initialised_transformer_is_not_suspicious():
    sizes = {"patch_size": 16, "width": 48, "depth": 2, "heads": 3, "image_size": 32}
    network = vit.ViT(num_classes=3, **sizes)
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    flat = {path: np.asarray(x) for path, x in trees.flatten(variables).items()}
    assert len(list(squares(flat))) == 8 and sanity.examine(flat)["suspicious"] == {}


def genuine(shared, name):
    """The leaves of a genuine file; of resnet18 there are those up to stage3, with BatchNorm folded."""
    path = shared / "weights" / GENUINE[name]
    if name != "resnet18":
        return host(load.load(name, path))
    shapes = {p: s for p, s in load.default_shapes(name).items() if "stage4" not in p and not p.startswith(load.HEAD)}
    flat, _, problems = conversion.fill(get_variant(name).layouts["timm"], shapes, formats.read(path)[0])
    assert not problems
    return flat


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files_raise_no_alarm_and_their_transposed_kernels_are_found(shared, name):
    flat = genuine(shared, name)
    began = time.perf_counter()
    assert sanity.examine(flat)["suspicious"] == {}
    assert time.perf_counter() - began < 1.5  # 0.08 s on an idle core
    check_transposed(flat, MISSED.get(name, 0))


def test_negative_variances_are_refused_with_all_other_faults(glyphs):
    var, mean = "batch_stats/backbone/stem/norm/var", "batch_stats/backbone/stem/norm/mean"
    damaged = {**glyphs, var: -glyphs[var], mean: glyphs[mean] * np.nan}
    _, _, problems = conversion.fill(conversion.NATIVE, {path: x.shape for path, x in glyphs.items()}, damaged)
    assert problems == {"negative variances": [f"{var} (16 of 16)"], "non-finite values": [f"{mean} (16 of 16)"]}
    with pytest.raises(ValueError, match=rf"cannot export .*1 negative variances \[{var}\]"):
        load.export(trees.unflatten(damaged), "resnet8_cifar", "", card=load.load("", "builtin:glyphs").card)


# What a publisher's name promises, and names that only look like it.


def test_a_hash_in_the_name_of_a_torch_file_must_be_that_of_its_bytes(tmp_path):
    content, found = b"some bytes", "0d22cdcc"
    for name in (
        f"net-{found}.pth",
        f"net_{found}10.th",
        "net-0badc0de.safetensors",
        "net_20210101.pth",
        "x-defaced0.pt1",
    ):
        (tmp_path / name).write_bytes(content)
        assert hub.check_name(tmp_path / name) == files.sha256(tmp_path / name)
    for name in ("net-badcafed.pth", "net-0d22cdd.pth", "0badc0de.pth", "0badc0de-net.pth"):  # a word, seven, no - or _
        (tmp_path / name).write_bytes(content)
        hub.check_name(tmp_path / name)
    for name in ("net-0badc0de.pth", "net_0badc0de.pt", f"net-{found}0.bin"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"has sha256 {found}.*expected one that begins with .*rename the file"):
            hub.check_name(tmp_path / name)


def test_a_genuine_file_under_the_hash_of_another_is_refused(shared, tmp_path):
    shutil.copy(shared / "weights" / GENUINE["resnet20_cifar"], tmp_path / "resnet20-d509ac18.th")
    with pytest.raises(ValueError, match=r"has sha256 12fca82f.*begins with d509ac18"):
        load.load("resnet20_cifar", tmp_path / "resnet20-d509ac18.th")


# The bytes that a run was trained on.


@pytest.fixture
def net(glyphs, tmp_path):
    """A file of the builtin network, and a function that writes other weights into it."""
    path = tmp_path / "net.safetensors"

    def write(factor):
        flat = {p: x * np.float32(factor) if p == "params/head/bias" else x for p, x in glyphs.items()}
        load.export(trees.unflatten(flat), "resnet8_cifar", path, card=load.load("", "builtin:glyphs").card)
        return files.sha256(path)

    return path, write


def make_config(**changes):
    short = {"total": (1.0, "steps"), "log_every": (1.0, "steps"), "eval_every": (1.0, "steps"), "resamples": 2}
    return options.override(smoke.get_config(), {**short, **changes})


@pytest.mark.slow
def test_a_run_records_the_bytes_of_its_weights_and_asks_for_them_when_run_again(net, tmp_path, capsys):
    path, write = net
    sha256 = write(1.0)
    config = make_config(**{"model.weights": str(path)})
    result = train(config, tmp_path / "w")
    table = files.read_json(tmp_path / "w" / "config.json")
    assert result["weights_sha256"] == table["model.weights_sha256"] == sha256
    assert load.load("", tmp_path / "w").card.sha256 == sha256
    facts = files.read_json(tmp_path / "w" / "audit.json")["phases"][0]["sanity"]["model"]
    assert facts["suspicious"] == {} and f"weights of model: {sanity.line(facts)}" in capsys.readouterr().out
    # The same options, with or without the hash, are the same run; the recorded ones are checked elsewhere.
    again = options.from_flat(table)
    assert options.fingerprint(again) == options.fingerprint(config)
    workdir.check_options(tmp_path / "w", options.flatten(config))
    assert train(config, tmp_path / "w", verbose=False) == train(again, tmp_path / "w", verbose=False)
    other = write(2.0)
    teacher = {"name": "resnet8_cifar", "weights": str(path), "sha256": "0" * 64}
    again = options.override(again, {"networks": {"teacher": teacher}, "terms": {"kd": {}}, "data.source": "no such"})
    with pytest.raises(ValueError) as error:
        train(again, tmp_path / "again", verbose=False)
    for text in (f"model.weights_sha256: {path} has sha256 {other}, expected {sha256}", "networks.teacher.sha256: "):
        assert text in str(error.value)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("value", ["0123", "A" * 64])
def test_what_is_no_sha256_is_refused_with_its_option(value):
    changes = {"model.weights_sha256": value, "networks": {"teacher": {"name": "x", "weights": "y", "sha256": value}}}
    with pytest.raises(ValueError, match=r"model.weights_sha256 = .*: expected 64 lower-case hex"):
        options.check(make_config(**{**changes, "networks": {}}))
    with pytest.raises(ValueError, match=r"networks.teacher: sha256 = .*, expected 64 lower-case hex"):
        options.check(make_config(**{**changes, "model.weights_sha256": ""}))


@pytest.mark.slow
def test_a_study_whose_runs_had_other_bytes_under_one_name_has_no_report(net, tmp_path):
    path, write = net
    hashes, home = [write(1.0)], tmp_path / "study"
    study = Study(
        make_config(**{"model.weights": str(path)}), {"rate": {"low": {"lr": 1e-3}}}, {}, (0, 1), together="none"
    )
    first, second = store.plan(home, "rates", "Which?", study)
    worker.work(home, only=[first.key])
    folder = store.run_folder(home, first.key)
    assert store.read_config(folder).model.weights_sha256 == hashes[0]  # its key is still the folder's name
    store.plan(home, "rates", "Which?", study)
    assert {run.state for run in results.load(home).runs()} == {"done", "todo"}
    hashes.append(write(2.0))
    worker.work(home, only=[second.key])
    with pytest.raises(ValueError) as error:
        results.load(home)
    for text in (str(path), *(f"sha256 {h[:12]} in {run.key}" for h, run in zip(hashes, (first, second), strict=True))):
        assert text in str(error.value)
    assert re.search("trained on different bytes; bring back", str(error.value))
