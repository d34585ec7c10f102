"""Every method between domains is bit-equal after SIGKILL, and cannot see the target's labels.

Several terms share one run: its loss is their sum. `CASES` hold every term on domains.
"""

import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.data import order, pipeline
from tl_jax.data.examples import Source
from tl_jax.data.sealed import SealedLabels
from tl_jax.methods import domain
from tl_jax.methods.domain import source_free
from tl_jax.methods.term import MAIN, Result, Term
from tl_jax.runtime import sharding
from tl_jax.studies import inprocess, leak
from tl_jax.training import build, inputs, terms
from tl_jax.training.settings import read
from tl_jax.training.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = {"one": 83, "two": 61, "target": 75}
BOTTLENECK = (("dense", {"features": 6}), ("batch_norm", {}), ("relu", {}))
NORMS = ((r".*norm\d*/(scale|bias)", "norm"), (".*", "frozen"))
SOURCE_FREE = {
    "data.source": "target", "data.labelled": False, "streams": {}, "batch_size": 7, "data.train": "train[:47%]",
    "data.val": "train[88%:]", "method.name": "rules",
}  # fmt: skip
SEVERAL = {"data.source": ("one", "two"), "batch_size": 10}
MCD = {"task": 1.0, "mcd_source": 1.0}
DIGITS = {
    "data.source": ("digits", "digits:faded"), "data.labels": (), "model.name": "resnet8_cifar", "model.head": (),
    "model.image_size": 12, "data.train": "train[:5%]", "data.val": "train[97%:]", "data.allow_duplicates": True,
    "data.candidates": ("target_val", "digits:inverted", "train[97%:]"), "streams": {},
    "data.extra_eval": (("target_test", "digits:inverted", "test[:5%]"),), "batch_size": 8,
}  # fmt: skip
CASES = {
    "games": {"terms": {
        "dann": {"width": 8}, "cdan": {"width": 8, "largest": 0, "random": 20}, "bsp": {}, "jan": {"adversarial": True},
        "mcd": {}, "mdd": {},
    }},
    "sums": {"ema": 0.9, "terms": {
        "mmd": {}, "coral": {}, "afn": {}, "mcc": {}, "bnm": {}, "entropy": {"weight": ("sigmoid", {})}, "infomax": {},
        "balance": {}, "fixmatch": {"threshold": 0.3, "view": "table"},
        "self_ensembling": {"threshold": 0.3, "view": "table"},
    }},
    "several": {**SEVERAL, "terms": {
        "task": {"weight": 0}, "m3sda": {}, "mdan": {"width": 8}, "darn": {"tau": 0.2},
        "mmd": {"estimate": "linear", "weight": 0.1},
    }, "streams": {"target": {"source": "target", "split": "train[:47%]", "batch_size": 10}}},
    "generalise": {**SEVERAL, "streams": {}, "terms": {
        "irm": {"weight": ("step", {"first": 1.0, "value": 5.0, "at": 0.5})}, "vrex": {}, "fishr": {},
        "groupdro": {"eta": 0.3}, "coral_domains": {}, "mmd_domains": {},
    }},
    "mixed": {**DIGITS, "method.mix_domains": 0.3, "method.add": (
        ("mixstyle", {"after": ("stem",), "p": 0.7, "alpha": 0.5, "partner": "other_domain"}),
    )},
    "turns": {"ema": 0.9, "clip": 0.5, "terms": {"mcd_source": {}, "mcd_discrepancy": {}}, "turns": (
        (("backbone", "head", "second_head"), MCD), (("head", "second_head"), {**MCD, "mcd_discrepancy": -1.0}),
        *4 * ((("backbone",), {"mcd_discrepancy": 1.0}),),
    )},
    "adda": {"method.name": "rules", "method.rules": ((".*", "all"),), "phases": (
        (("total", (4.0, "steps")),),
        (("total", (5.0, "steps")), ("terms", {"task": {"weight": 0}, "adda": {"width": 8}}), ("restart", True),
         ("method.rules", ((r"head/.*", "frozen"), (".*", "backbone")))),
    )},
    "adabn": {"phases": (
        (("total", (4.0, "steps")),), (("total", (5.0, "steps")), ("terms", {"adabn": {}})),
    )},
    "shot": {**SOURCE_FREE, "terms": {"shot": {}}, "method.rules": ((r"head/.*", "frozen"), (".*", "backbone"))},
    "test time": {**SOURCE_FREE, "terms": {"tent": {}, "eata": {"examples": 20, "margin": 0.99, "similarity": 0.9}},
                  "method.rules": NORMS, "data.sampling": "sequential"},
}  # fmt: skip
# After so many steps, before the evaluation that may follow; or behind a call of that number of a function.
CHOICES = ("tl_jax.training.candidates", "choose", 1)
MOMENTS = dict.fromkeys(CASES, (1, 5, 8, CHOICES))
MOMENTS["several"] = (1, ("tl_jax.training.candidates", "write", 3), 7, CHOICES)
MOMENTS["adda"] = MOMENTS["adabn"] = (1, 4, ("tl_jax.training.single.Single", "enter", 1), 7, CHOICES)
MOMENTS["shot"] = (1, 5, ("tl_jax.training.single.Single", "refresh", 1), 7, CHOICES)


def make_tables(folder):
    """Two sources and a target of three classes, all of odd sizes and shares of classes."""
    for k, (name, rows) in enumerate(ROWS.items()):
        rng = np.random.default_rng(k)
        labels = rng.choice(3, rows, p=(0.5, 0.3, 0.2))
        x = 1.5 * np.eye(3, 5)[labels] + rng.standard_normal((rows, 5)) * (1 + 0.2 * k) + 0.7 * k
        lines = [",".join(f"{v:.5f}" for v in row) + f",{'abc'[c]}" for row, c in zip(x, labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["x0,x1,x2,x3,x4,label", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("domains"))


def config_of(tables, case, **changes):
    """A run of 9 steps with candidates after 2, 4, 6, 8 and 9; the batch of the target is odd, of 5 steps an epoch."""
    target = {"source": "target", "split": "train[:47%]", "batch_size": 7}
    changes = {
        "model.name": "mlp_small", "model.head_init": "lecun", "model.head": BOTTLENECK, "data.labels": ("label",),
        "data.source": "one", "data.train": "train[:60%]", "data.val": "train[60%:]", "data.test": "",
        "streams": {"target": target}, "data.candidates": ("target_val", "target", "train[47%:68%]"),
        "data.extra_eval": (("target_test", "target", "train[68%:88%]"),), "data.shots": 0, "method.name": "full",
        "optimizer": "sgd", "optimizer_args": {"momentum": 0.9}, "lr": 0.05, "batch_size": 12,
        "total": (9.0, "steps"), "log_every": (2.0, "steps"), "eval_every": (2.0, "steps"), "resamples": 20,
        "eval_batch_size": 32, "select": "last", "terms": {}, **CASES.get(case, {}), **changes,
    }  # fmt: skip
    named = json.dumps({key: changes[key] for key in PLACES})
    for name in ROWS:
        named = named.replace(f'"{name}"', f'"table:{tables}/{name}.csv"')
    found = json.loads(named)
    for key in ("data.source", "data.candidates", "data.extra_eval"):
        found[key] = _tuples(found[key])
    found["streams"] = {name.removeprefix("table:").split("/")[-1].removesuffix(".csv"): stream
                        for name, stream in found["streams"].items()}  # fmt: skip
    return options.override(options.make(), {**changes, **found})


PLACES = ("data.source", "data.candidates", "data.extra_eval", "streams")


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Batches of 7 do not divide over the devices of the other tests."""
    one = functools.partial(sharding.make_parallel, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_parallel", one)


def test_the_cases_hold_every_term_between_domains():
    named = {name for case in CASES.values() for name in case.get("terms", {})}
    named |= {
        name for case in CASES.values() for phase in case.get("phases", ()) for name in dict(phase).get("terms", {})
    }
    assert named - {"task"} == set(domain.TERMS)


# Killed


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def start(config, folder, moment):
    """One start of a run, which is killed at its moment, if it has one."""
    if isinstance(moment, list | tuple):
        where, name, times = moment
        owner, _, attribute = where.rpartition(".") if where.endswith("Single") else (where, "", "")
        owner = importlib.import_module(owner)
        owner = getattr(owner, attribute) if attribute else owner
        real, calls = getattr(owner, name), []

        def wrapped(*arguments, **named):
            found = real(*arguments, **named)
            calls.append(1)
            if len(calls) == times:
                die()
            return found

        setattr(owner, name, wrapped)
    train(config, folder, verbose=False, stop_requested=lambda done: done == moment and die())


def starts(plan):
    """Runs each start in a child process, forked before jax has started; prints the signals that ended them."""
    table, ended = json.loads(pathlib.Path(plan).read_text()), []
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", table["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for folder, moment in table["starts"]:
        if not (child := os.fork()):
            start(options.from_flat(table["config"]), pathlib.Path(folder), moment)
            os._exit(0)
        ended.append(os.waitpid(child, 0)[1])
    print(json.dumps(ended))


def run_starts(config, listing, folder):
    """The status of each start."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {"config": options.flatten(config), "starts": listing, "cache": str(folder / "cache")}
    (folder / "plan.json").write_text(json.dumps(table))
    program = "import sys; from tests.test_domain_kills import starts; starts(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "plan.json")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def remains(folder):
    """All that a run decided and scored."""
    table = leak.decided(folder)
    names = ("result.json", *(path.name for path in folder.glob("predictions*.npz")))
    return table | {name: files.sha256(folder / name) for name in names}


def check_ledger(folder, starts):
    """No sealed array was opened by a start that had not written its choices, and only then once."""
    ledger = files.read_json(folder / "ledger.json")
    rows = [row for row in ledger["openings"] if row["stream"] in ledger["sealed"]]
    assert ledger["sealed"] and rows and {row["phase"] for row in rows} <= {"score", "selection"}
    assert {row["start"] for row in rows} == {starts - 1}
    opened = [(row["stream"], row["phase"]) for row in rows]
    assert len(opened) == len(set(opened))


QUICK = ("games", "adda", "shot")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.exhaustive) for c in CASES])
def test_a_run_that_was_killed_again_and_again_ends_bit_equal_to_an_undisturbed_one(case, tables, tmp_path):
    config, moments = config_of(tables, case), MOMENTS[case]
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    status = run_starts(config, [[whole, None], *([killed, m] for m in moments), [killed, None]], tmp_path / "k")
    assert status == [0, *[signal.SIGKILL] * len(moments), 0]
    one, other = remains(tmp_path / "whole"), remains(tmp_path / "killed")
    assert {"metrics.jsonl", "choices.json", "trained.safetensors", "candidates/step_000006.npz"} <= set(one)
    assert {name for name in {*one, *other} if one.get(name) != other.get(name)} == set()
    check_ledger(tmp_path / "whole", 1)
    check_ledger(tmp_path / "killed", len(moments) + 1)


# Poisoned


@pytest.mark.slow
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.exhaustive) for c in CASES])
def test_no_method_sees_the_labels_of_the_target(case, tables, tmp_path):
    found, differences = leak.prove(config_of(tables, case, select="infomax"), tmp_path / "w")
    assert differences == [] and files.read_json(tmp_path / "w" / "result.json")["leak_test"] == "passed"
    poisoned = files.read_json(tmp_path / "w" / "poison" / "permuted" / "result.json")
    sets = [result["extra_eval"]["target_test"]["confusion"] for result in (found["result"], poisoned)]
    assert sets[0] != sets[1]  # the poison was there


ALL: list[SealedLabels] = []


def remember(monkeypatch):
    """All sealed labels that are made, the newest last."""
    real = SealedLabels.__init__

    def init(self, *arguments):
        real(self, *arguments)
        ALL.append(self)

    monkeypatch.setattr(SealedLabels, "__init__", init)


def plant_reader(monkeypatch):
    """A term that is handed the labels of what it adapts to, and learns them."""
    real = pipeline.TrainBatches.index

    def index(self, step):
        batch = real(self, step)
        return batch | ({"peek": self.source.labels.open()[batch["index"]]} if self.source.sealed else {})

    def loss(context):
        logits = context.outputs["target"]["logits"]
        labels = jax.nn.one_hot(context.batch["target"]["peek"], logits.shape[-1])
        return Result(-(labels * jax.nn.log_softmax(logits)).sum(-1).mean())

    monkeypatch.setattr(pipeline.TrainBatches, "index", index)
    monkeypatch.setitem(terms.TERMS, "entropy", lambda: Term(loss, on=(MAIN, "target")))


def plant_order(monkeypatch):
    """Batches of the target whose examples come class by class."""
    real = order.make_orders

    def make_orders(source, name, seed):
        (found,) = real(source, name, seed)
        if not source.sealed:
            return (found,)
        return (found._replace(groups=(np.argsort(source.labels.open(), kind="stable"),)),)

    monkeypatch.setattr(order, "make_orders", make_orders)


def plant_balance(monkeypatch):
    """A target of which every class comes equally often."""
    real = order.make_orders
    balanced = lambda source, name, seed: real(source.opened(), "class_balanced", seed)  # noqa: E731
    monkeypatch.setattr(order, "make_orders", lambda *x: balanced(*x) if x[0].sealed else real(*x))


def plant_pseudo_labels(monkeypatch):
    """Pseudo-labels that are the true ones."""
    remember(monkeypatch)
    true = lambda features, _: next(x for x in reversed(ALL) if len(x) == len(features)).open()  # noqa: E731
    monkeypatch.setattr(source_free, "centroid_labels", true)


def plant_fingerprint(monkeypatch):
    real = Source.fingerprint.func
    told = property(lambda self: real(self) + (str(self.labels.open().sum()) if self.sealed else ""))
    monkeypatch.setattr(Source, "fingerprint", told)


PLANTS = {
    "a term that reads labels": (plant_reader, "entropy", "trained.safetensors"),
    "the order of batches": (plant_order, "entropy", "metrics.jsonl"),
    "balanced classes": (plant_balance, "entropy", "metrics.jsonl"),
    "pseudo-labels": (plant_pseudo_labels, "shot", "trained.safetensors"),
    "the fingerprint": (plant_fingerprint, "entropy", "fingerprint of target"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [p if p == "pseudo-labels" else pytest.param(p, marks=pytest.mark.exhaustive) for p in PLANTS]
)
def test_a_planted_leak_is_found(plant, tables, tmp_path, monkeypatch):
    make, case, named = PLANTS[plant]
    make(monkeypatch)
    changes = {"terms": {"entropy": {}}} if case == "entropy" else {}
    _, differences = leak.prove(config_of(tables, case, **changes, total=(4.0, "steps")), tmp_path / "w")
    assert any(line.startswith("permuted") and named in line for line in differences), differences
    assert any(line.startswith("none") for line in differences)
    assert files.read_json(tmp_path / "w" / "result.json")["leak_test"].startswith("failed: ")


# The ledger of several runs


ONLY_SOURCE = (("terms", {}), ("streams", {}))
HOMES = {
    "seeds and a baseline": {"seeds": (4,), "baseline": ONLY_SOURCE},
    "replicas": {"replicas": ((("lr", 0.1),), (("seed", 3),)), "select": "snd"},
}


@pytest.mark.slow
@pytest.mark.parametrize("home", HOMES)
def test_every_run_of_a_set_opens_the_target_after_its_own_choices(home, tables, tmp_path, monkeypatch):
    from tl_jax.data.sealed import Ledger

    real, opened = Ledger.open, []

    def open_(self, *arguments):
        opened.extend(path.parent for path in self._earlier)
        assert all((path.parent / "choices.json").exists() for path in self._earlier)
        return real(self, *arguments)

    monkeypatch.setattr(Ledger, "open", open_)
    inprocess.run(config_of(tables, "few", terms={"entropy": {}}, total=(4.0, "steps"), **HOMES[home]), tmp_path / "w")
    folders = [path.parent for path in (tmp_path / "w").rglob("ledger.json")]
    assert len(folders) == {"replicas": 2}.get(home, 4) and set(opened) == set(folders)
    for folder in folders:
        check_ledger(folder, 1)


# Refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dann": {"strength": -1.0}}, r"dann: .*strength.*nothing below 0, which would turn the reversal round"),
        ({"mcd": {"strength": ("linear", {"start": -1.0})}}, "mcd: .*strength.*nothing below 0"),
        ({"mmd": {"factors": ()}}, "mmd: .*factors.*at least one"),
        ({"jan": {"factors": (1.0, 0.0)}}, "jan: .*factors.*numbers above 0"),
        ({"dann": {"target": "train"}}, "dann compares the stream 'train' with itself"),
        ({"adda": {"target": "train"}}, "adda compares the stream 'train' with itself"),
        ({"dann": {"target": "targt"}}, r"dann is on the stream 'targt' \(did you mean 'target'\?\)"),
    ],
)
def test_arguments_that_would_train_something_else_are_refused_by_name(given, message, tables):
    with pytest.raises(ValueError, match=message):
        terms.make_terms(read(config_of(tables, "", terms=given)))


def test_a_turn_that_names_a_group_twice_is_refused(tables):
    """Its optimizer would count two steps where it takes one."""
    turns = ((("backbone", "head", "backbone"), {"task": 1.0}),)
    with pytest.raises(
        ValueError, match=r"turns = (.|\n)*a turn names a group twice: \('backbone', 'head', 'backbone'\)"
    ):
        build.build(config_of(tables, "", turns=turns, streams={}), sharding.make_parallel())


# Sealed by split


def test_the_splits_of_one_file_that_only_unlabelled_streams_name_are_sealed(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split, rows in (("train", 41), ("test", 29), ("photo", 53)):
        labels = np.arange(rows) % 3
        arrays |= {f"{split}_features": rng.normal(size=(rows, 5)).astype(np.float32), f"{split}_label": labels}
    np.savez(tmp_path / "all.npz", **arrays)
    name = f"arrays:{tmp_path}/all.npz"
    changes = {
        "data.source": name, "data.labels": (), "data.test": "test", "terms": {"entropy": {}},
        "streams": {"target": {"source": name, "split": "photo[:50%]", "batch_size": 7}},
        "data.candidates": ("target_val", name, "photo[50%:70%]"),
        "data.extra_eval": (("target_test", name, "photo[70%:]"), ("more", name, "test[:50%]")),
    }  # fmt: skip
    settings = read(config_of(tmp_path, "", **changes))
    found = inputs.load_sources(settings)
    assert {name for name, source in found.items() if source.sealed} == {"target", "target_val", "target_test"}
    ids = [i for name in ("target", "target_val", "target_test") for i in found[name].ids]
    assert len(ids) == len(set(ids)) == 53
    ledger = inputs.make_ledger(found, settings)
    assert ledger.unsealed == {} and {row["stream"] for row in ledger.rows} == {"train", "val", "test", "more"}
    changes |= {"data.test": "photo[70%:]", "data.extra_eval": ()}
    found = inputs.load_sources(read(config_of(tmp_path, "", **changes)))
    assert {name for name, source in found.items() if source.sealed} == {"target", "target_val", "test"}
    changes |= {"data.val": "photo[70%:]", "data.test": ""}  # which is read while training
    found = inputs.load_sources(read(config_of(tmp_path, "", **changes)))
    assert not any(source.sealed for source in found.values())
