"""One flipped bit in any file that runs, studies, caches, packs and exports leave is refused, mended or without effect.

A flip is drawn in the kind of file, then file, byte and bit. What reads the file then either raises one message that
names it, or gives what it gives of sound files, bit by bit; in the second case a line of the log must name the file,
unless MUTE says why none is needed. So a new kind of file that nothing protects fails here.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from faults import effort
from PIL import Image
from test_study import make_study

import tl_jax
from configs import smoke
from tl_jax import config as options
from tl_jax.api.inputs import write_arrays
from tl_jax.core import files, trees
from tl_jax.data import sources
from tl_jax.data.readers import pack, packed
from tl_jax.runtime import compile_cache, leaves, sharding
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess, soups, store, together, worker
from tl_jax.studies.report import report, results
from tl_jax.training import build, feature_cache, finished, frozen_columns, replicas, settings, train
from tl_jax.training.single import Single
from tl_jax.weights import delta, formats
from tl_jax.weights import load as pretrained

pytestmark = pytest.mark.battery
ONE = (1.0, "steps")
SMALL = {
    "model.image_size": 16, "data.train": "train[:5%]", "data.val": "train[97%:]", "data.test": "test[:8%]",
    "data.shots": 0, "batch_size": 8, "eval_batch_size": 64, "resamples": 2, "total": (3.0, "steps"),
    "log_every": ONE, "eval_every": ONE,
}  # fmt: skip
LAST = {"method.name": "last_k", "method.k": 1, "groups": {"backbone": {"lr_mult": 0.1}}}
PHASES = (tuple({"total": ONE}.items()), tuple({"total": (2.0, "steps"), **LAST}.items()))
ALPHAS, COLUMNS = 3, 2

# Kinds of files whose flips may pass without a word, as patterns, and why.
MUTE = {
    r".*/log\.txt|.*\.png|.*\.svg": "read by people",
    r"study/w/report\..*": "read by people, and written anew from the checked files",
    r".*\.npz": "dates and the like in the headers of zip; all else has a checksum",
    r"(half|begun)/w/.*(config|audit)\.json|(half|begun)/w/.*metrics\.jsonl": "written anew when the run goes on",
    r"(half|begun)/w/.*timing\.jsonl": "times alone",
    r"begun/w/runs/#/cost\.json": "as that of half",
    r"begun/w/runs/#/claim\.json": "counts attempts; a damaged one counts none",
    r"half/w/checkpoints/1/.*": "read where the newer one is damaged",
    r".*/_CHECKPOINT_METADATA|.*/commit_success\.txt": "of orbax: times, and a file that only has to be there",
    r"half_caches/.*/features\.bin": "rows that are still to be computed",
    r".*pack/.*/pixels\.bin": "zeros between images",
    r"half_pack/.*/journal": "what a damaged line told is packed again",
    r"programs/.*": "damaged programs are compiled anew; when jax last read them",
}  # fmt: skip


def make_config(**changes):
    return options.override(smoke.get_config(), {**SMALL, **changes})


def stopper(after: int):
    """A `stop_requested` that is true from its call number `after` on."""
    calls: list[int] = []
    return lambda step=0: calls.append(step) or len(calls) >= after


def digest(value: Any) -> str:
    """One text for tables, arrays and trees of them."""
    if isinstance(value, dict):
        return repr({key: digest(inner) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return repr([digest(inner) for inner in value])
    if isinstance(value, np.ndarray | jax.Array):
        array = np.ascontiguousarray(value)
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return repr(value)


def kind_of(name: pathlib.Path) -> str:
    """A path without what differs from one file of a kind to the next."""
    kind = re.sub(r"[0-9a-f]{12,}|(?<=replicas/)\d+-[^/]*|(?<=/)[^/]*(?=\.(png|svg)$)", "#", str(name))
    return kind if kind.startswith("half/") else re.sub(r"checkpoints/\d+", "checkpoints/#", kind)


def weights_of(loaded) -> Any:
    return loaded.card.to_json(), dict(trees.flatten(loaded.variables))


@dataclasses.dataclass
class Left:
    """Sound files in `sound`, of which `work` is a copy to damage; groups: {folder: what reads it}."""

    sound: pathlib.Path
    work: pathlib.Path
    groups: dict[str, Callable[[pathlib.Path], Any]]
    right: dict[str, str] = dataclasses.field(default_factory=dict)

    def kinds(self) -> dict[str, list[pathlib.Path]]:
        """{kind: its files, relative}; empty files are locks."""
        found: dict[str, list[pathlib.Path]] = {}
        for path in sorted(self.sound.rglob("*")):
            if path.is_file() and path.stat().st_size:
                name = path.relative_to(self.sound)
                found.setdefault(kind_of(name), []).append(name)
        return found

    def restore(self, group: str) -> None:
        shutil.rmtree(self.work / group)
        shutil.copytree(self.sound / group, self.work / group)

    def read(self, group: str) -> tuple[str, str]:
        """What the files of a group say, and what was logged meanwhile."""
        packed._opened.cache_clear()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            return digest(self.groups[group](self.work / group)), said.getvalue().replace("\n", "")


def read_more(folder):
    """What a finished study or run no longer needs, or what is needed of its weights elsewhere."""
    for state in sorted(folder.rglob("checkpoints/*/state")):
        leaves.read(state, leaves.read_index(state))
    for path in sorted(folder.rglob("*.safetensors")):
        formats.read(path)
    for path in folder.glob("together/*/runs.json"):
        files.read_json(path)


def read_run(folder):
    read_more(folder)
    run = tl_jax.load_run(folder)
    trust = run.trust._asdict() if run.trust else None
    found = [finished.read(folder), run.curves, weights_of(run.model), trust]
    return [*found, weights_of(delta.load(folder / "trained.safetensors")), run.options]


def fill(folder, run, stop=train.never):
    """The features of train, computed where they are not there."""
    material = run.material
    (column,) = frozen_columns.columns_of(run.phases[0].plan, lambda: material.variables, ())
    sets = {"train": material.streams["train"]}
    return feature_cache.fill(
        sets, column, material.variables, sharding.make_parallel(), batch_size=8, folder=folder, stop_requested=stop
    )


def read_study(folder):
    """What its report is made of; the error of a run that is no longer believed."""
    found = results.load(folder)
    read_more(folder)
    for row in store.read_plan(folder)["runs"]:
        store.read_config(store.run_folder(folder, row["key"]))
    for run in found.runs():
        if run.state == "failed" and "nowhere.npz" not in run.error:
            raise ValueError(run.error)
    return found.name, found.question, found.factors, found.metrics, [run._replace(folder=None) for run in found.runs()]


def read_begun(folder, program):
    """What a worker goes on from: the plan, its sets, the configs, what the sets have saved."""
    plan = store.read_plan(folder)
    sets = {row["key"]: str(together.members(folder, row["key"])) for row in plan["runs"]}
    configs = [options.flatten(store.read_config(folder / "runs" / row["key"])) for row in plan["runs"]]
    (home,) = folder.glob("together/*")
    assert all(store.read_claim(path.parent) for path in folder.glob("runs/*/claim.json"))
    with Checkpoints(home / "checkpoints") as checkpoints:
        restored = checkpoints.restore_latest(lambda step: program.initial(0))
    [print(text) for text in restored.damaged]
    ledgers = [files.read_json(path) for path in sorted(folder.glob("runs/*/ledger.json"))]
    return plan, sets, configs, restored.step, trees.flatten(restored.state), ledgers


def read_average(folder, table):
    loaded = weights_of(pretrained.load("resnet8_cifar", folder / "model.safetensors"))
    predictions = [tl_jax.load_predictions(path) for path in sorted(folder.glob("*.npz"))]
    return loaded, [each._asdict() for each in predictions], files.read_json(folder / table)


def read_seeds(folder):
    finished.read(folder / "runs/transfer-seed1")
    return read_run(folder), files.read_json(folder / "comparison.json")


def read_replicas(folder, config):
    """As a start of the finished command, and the result of each replica."""
    read_more(folder)
    return inprocess.run(config, folder), [finished.read(path) for path in sorted(folder.glob("replicas/*"))]


def read_pack(folder, splits=("train", "val")):
    """The images, of which those that are not packed are packed now."""
    pack.pack(f"folder:{folder.parents[1] / 'photos'}", str(folder), splits, size=12, report=lambda text: None)
    found = [sources.load(f"packed:{folder}", split) for split in splits]
    return [(each.labels, each.ids, each.class_names, [each.inputs[i] for i in range(len(each))]) for each in found]


def read_programs(folder):
    """Every program that is there and sound; jax compiles the others."""
    found = {compile_cache._checked(folder).get(f"program{i}") for i in range(3)}
    return found - {None}


def read_arrays(folder):
    (path,) = folder.glob("data-*.npz")
    found = [sources.load(f"arrays:{path}", split) for split in ("train", "val")]
    return [(each.labels, each.ids, [each.inputs[i] for i in range(len(each))]) for each in found]


class Kept:
    """A program that compiles, and makes its first states, once for all the times that its run goes on."""

    def __init__(self, program):
        self._program, self._known = program, {}

    def __getattr__(self, name):
        return getattr(self._program, name)

    def compile(self, i, state, batch):
        if i not in self._known:
            self._known[i] = self._program.compile(i, state, batch)
        return self._known[i]

    def initial(self, i):
        if ("initial", i) not in self._known:
            self._known["initial", i] = self._program.initial(i)
        return jax.tree.map(jnp.copy, self._known["initial", i])  # a step reuses the memory of its state


def go_on(folder, config, program, stop=train.never):
    """Trains an unfinished run to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", lambda *_: None)
        patch.setattr(train, "assemble", lambda *_: program.runs[0])
        patch.setattr(train, "Single", lambda *_: program)
        result = train.train(config, folder / "w", verbose=False, stop_requested=stop)
    told = {name: (folder / "w" / name).read_bytes() for name in ("metrics.jsonl", "trained.safetensors", "audit.json")}
    return result, told


def make_photos(folder):
    rng = np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "val"), ("ant", "bee"), range(2)):
        path = folder / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (13 + i, 17, 3), np.uint8)).save(path)


def make_pack(work):
    """A pack of two splits, and one whose packing was stopped."""
    make_photos(work.parent / "photos")
    pack.pack(
        f"folder:{work.parent / 'photos'}", str(work / "pack"), ("train", "val"), size=12, report=lambda text: None
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, "_finish", raiser(KeyboardInterrupt))
        pack.pack(
            f"folder:{work.parent / 'photos'}", str(work / "half_pack"), ("train",), size=12, report=lambda text: None
        )


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def make_studies(work):
    """A finished study with one failed run and its report, and one that was stopped while a set was trained."""
    rates = {"low": {"lr": 1e-3}, "high": {"lr": 1e-2}}
    wrong = {"wrong": {"data.source": "arrays:nowhere.npz"}}
    study = make_study(SMALL, factors={"rate": {**rates, **wrong}}, baseline={"rate": "low"}, seeds=(0, 1))
    store.plan(work / "study/w", "rates", "Which?", study)
    worker.work(work / "study/w")
    report.write(work / "study/w")
    runs = store.plan(work / "begun/w", "rates", "Which?", study._replace(factors={"rate": rates}, seeds=(0,)))
    with pytest.raises(Preempted):
        worker.work(work / "begun/w", stop_requested=stopper(2))
    with store.claim(store.run_folder(work / "begun/w", runs[0].key)):
        shutil.copy(store.run_folder(work / "begun/w", runs[0].key) / "claim.json", work / "claim.json")
    (work / "claim.json").rename(store.run_folder(work / "begun/w", runs[0].key) / "claim.json")
    return replicas.make([settings.read(run.config) for run in runs], sharding.make_parallel())


@pytest.fixture(scope="session")
def left(tmp_path_factory):
    work = tmp_path_factory.mktemp("flips") / "work"
    with pytest.MonkeyPatch.context() as patch:
        device = sharding.make_parallel("jit", jax.devices()[:1])  # less to compile
        patch.setattr(sharding, "make_parallel", lambda *_, **__: device)
        groups = make_all(work)
        found = Left(work.parent / "sound", work, groups)
        shutil.copytree(work, found.sound)
        for group in groups:
            found.right[group] = found.read(group)[0]
            found.restore(group)
        yield found


def make_all(work):
    phased = make_config(phases=PHASES, **{"data.extra_eval": (("rest", "digits", "test[95%:]"),)})
    train.train(phased, work / "run/w", verbose=True)
    tl_jax.load_run(work / "run/w").calibrate()
    with pytest.raises(Preempted):
        train.train(phased, work / "half/w", verbose=False, stop_requested=stopper(2))
    half = Kept(Single(build.build(phased, sharding.make_parallel()), sharding.make_parallel()))
    program = Kept(make_studies(work))
    cached = make_config(cache="features", cache_dir=str(work / "caches"))
    run = build.build(cached, sharding.make_parallel())
    fill(work / "caches", run)
    with pytest.raises(Preempted):
        fill(work / "half_caches", run, stopper(4))
    inprocess.run(make_config(seeds=(1,)), work / "seeds/w")
    several = make_config(replicas=((("lr", 1e-3),), (("lr", 1e-2),)))
    inprocess.run(several, work / "replicas/w")
    runs = [soups.load(path) for path in (work / "seeds/w", work / "seeds/w/runs/transfer-seed1")]
    soups.soup([each.name for each in runs], work / "soup/w")
    soups.wise_ft(*runs, work / "wise/w", ALPHAS)
    tl_jax.load_run(work / "run/w").save(work / "export/saved.safetensors")
    make_pack(work)
    digits = {name: sources.load("digits", f"train[{at}]") for name, at in (("train", ":5%"), ("val", "97%:"))}
    (work / "programs").mkdir()
    for i in range(3):
        compile_cache._checked(work / "programs").put(f"program{i}", zlib.compress(bytes(300)))
    (work / "arrays").mkdir()
    write_arrays(digits, work / "arrays/data-0123456789ab.npz")
    return {
        "run": lambda folder: read_run(folder / "w"),
        "half": lambda folder: go_on(folder, phased, half),
        "caches": lambda folder: fill(folder, run),
        "half_caches": lambda folder: fill(folder, run),
        "study": lambda folder: read_study(folder / "w"),
        "begun": lambda folder: read_begun(folder / "w", program),
        "seeds": lambda folder: read_seeds(folder / "w"),
        "replicas": lambda folder: read_replicas(folder / "w", several),
        "soup": lambda folder: read_average(folder / "w", "soup.json"),
        "wise": lambda folder: read_average(folder / "w", "curve.json"),
        "export": lambda folder: weights_of(pretrained.load("resnet8_cifar", folder / "saved.safetensors")),
        "pack": read_pack,
        "half_pack": lambda folder: read_pack(folder, ("train",)),
        "arrays": read_arrays,
        "programs": read_programs,
    }


def flip(path, rng):
    data = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o600)
    path.write_bytes(data)
    return bit


def what_became(left, name, rng) -> tuple[str, str]:
    """(refused | mended | without effect | ..., details) of one flipped bit in a file."""
    group, path = name.parts[0], left.work / name
    where = f"{name}, bit {flip(path, rng)}"
    names = {name.name, *(f"checkpoints/{step}" for step in re.findall(r"checkpoints/(\d+)/", str(name)))}
    names |= {name.parent.name} if "caches" in group else set()
    names |= {"packed pixels are not those"} if name.name == "pixels.bin" else set()  # it names the image
    try:
        found, said = left.read(group)
    except (ValueError, OSError) as error:
        told = any(each in str(error) for each in names)
        return "refused" if told else "REFUSED WITHOUT ITS NAME", f"{where}: {error}"
    except Exception as error:
        return "TRACEBACK", f"{where}: {error!r}"
    finally:
        left.restore(group)
    if found != left.right[group]:
        return "SILENT", where
    if any(each in said for each in names):
        return "mended", f"{where}: {said}"
    mute = any(re.fullmatch(pattern, kind_of(name)) for pattern in MUTE)
    return "without effect" if mute else "UNNOTICED", where


def try_flips(left, seed, count):
    """Flips in `count` kinds, in random order; in each kind once before one comes again."""
    rng, kinds, found = np.random.default_rng(seed), left.kinds(), []
    names = itertools.chain.from_iterable(rng.permutation(sorted(kinds)) for _ in itertools.count())
    for kind in itertools.islice(names, count):
        found.append(what_became(left, kinds[kind][rng.integers(len(kinds[kind]))], rng))
    wrong = [f"{what}: {where:.300}" for what, where in found if what != what.lower()]
    for what, times in Counter(what for what, _ in found).items():
        effort.tried("flips", what, times)
    assert not wrong, "\n".join([f"{len(wrong)} of {count} flips:", *sorted(wrong)])


@pytest.mark.parametrize("seed", effort.of(range(effort.amount(1, 51))))
def test_no_flipped_bit_changes_a_number_without_a_word(left, seed):
    """Of each kind one, and with the battery a hundred for each further seed."""
    try_flips(left, seed, len(left.kinds()) if seed == 0 else 100)


@pytest.mark.slow
def test_every_file_has_a_reader_but_for_locks_and_every_reason_a_file(left):
    """Who adds a file that nothing protects gets UNNOTICED above, or adds a reason here."""
    empty = {path.name for path in left.sound.rglob("*") if path.is_file() and not path.stat().st_size}
    assert empty <= {".lock", ".claim", ".plan", ".take", ".lockfile", "log.txt"}
    kinds = left.kinds()
    assert {pathlib.Path(kind).parts[0] for kind in kinds} == left.groups.keys()
    assert all(any(re.fullmatch(pattern, kind) for kind in kinds) for pattern in MUTE)


def test_tables_are_sealed_and_those_written_by_hand_are_read_as_they_are(tmp_path):
    path, table = tmp_path / "a.json", {"a": [1, {"b": "\u00e9"}], "c": None}
    files.write_json(path, table)
    text = path.read_bytes()
    assert files.read_json(path) == table
    for at, bit in np.ndindex(len(text), 8):
        damaged = bytearray(text)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.json is damaged"):
            files.read_json(path)
    for other in ({}, table):
        path.write_text(json.dumps(other))
        assert files.read_json(path) == other
        files.write_json(path, other)
        assert files.read_json(path) == other


def test_every_flipped_bit_of_exported_weights_is_seen_and_other_libraries_read_them(tmp_path):
    path = tmp_path / "a.safetensors"
    formats.write_safetensors(path, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"k": "v"})
    data, ours = path.read_bytes(), formats.read(path)
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["w"], ours[0]["w"])
    assert ours[1] == {"k": "v"}
    for at, bit in np.ndindex(len(data), 8):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            tensors, metadata = formats.read(path)
        except ValueError as error:
            assert path.name in str(error)
            continue
        np.testing.assert_array_equal(tensors["w"], ours[0]["w"], err_msg=f"{at}.{bit}")
        assert metadata["k"] == "v"
