"""No method between domains sees the labels of the target, and a planted leak is found."""

import jax
import numpy as np
import pytest
from domain_cases import CASES, check_ledger, config_of, make_tables, of_which_ci_runs, one_device

from tl_jax.core import files
from tl_jax.data import order, pipeline
from tl_jax.data.examples import Source
from tl_jax.data.sealed import SealedLabels
from tl_jax.methods.domain import source_free
from tl_jax.methods.term import MAIN, Result, Term
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess, leak, store, worker
from tl_jax.studies.report import report
from tl_jax.studies.study import Study
from tl_jax.training import inputs, terms
from tl_jax.training.settings import read
from tl_jax.training.train import train


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("domains"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    one_device(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", of_which_ci_runs(CASES, ("games",)))
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

    def make_orders(source, name, seed, batch):
        (found,) = real(source, name, seed)
        if not source.sealed:
            return (found,)
        return (found._replace(groups=(np.argsort(source.labels.open(), kind="stable"),)),)

    monkeypatch.setattr(order, "make_orders", make_orders)


def plant_balance(monkeypatch):
    """A target of which every class comes equally often."""
    real = order.make_orders
    balanced = lambda source, name, seed, batch: real(source.opened(), "class_balanced", seed)  # noqa: E731
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
@pytest.mark.parametrize("plant", of_which_ci_runs(PLANTS, ("pseudo-labels",)))
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
@pytest.mark.parametrize("home", of_which_ci_runs(HOMES, ("replicas",)))
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


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_study_of_methods_opens_each_target_after_the_choices_of_its_run(tables, tmp_path):
    methods = {"source-only": dict(ONLY_SOURCE), "entropy": {}, "bnm": {"terms": {"bnm": {"weight": 0.1}}}}
    base = config_of(tables, "", terms={"entropy": {}}, total=(4.0, "steps"))
    store.plan(tmp_path, "s", "?", Study(base, {"method": methods}, {"method": "source-only"}, seeds=(0, 3)))
    worker.work(tmp_path)
    report.write(tmp_path)
    folders = [path.parent for path in tmp_path.rglob("ledger.json")]
    assert len(folders) == 6
    for folder in folders:
        check_ledger(folder, 1)
    units = files.read_json(tmp_path / "choices.json")["units"]
    assert set(units) == {"seed 0", "seed 3"} and all("dev" in choices for choices in units.values())


# The labels on disk


@pytest.mark.slow
def test_a_run_goes_on_alike_where_the_targets_labels_were_changed_meanwhile(tmp_path):
    """All classes stay; the labels of rows change, between a kill and the resumed start, and as early as the first."""
    config = config_of(make_tables(tmp_path), "", terms={"entropy": {}})
    train(config, tmp_path / "whole", verbose=False)
    with pytest.raises(Preempted):
        train(config, tmp_path / "w", verbose=False, stop_requested=lambda done: done == 5)
    path = tmp_path / "target.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *(line[:-1] + "bca"["abc".index(line[-1])] for line in lines)]) + "\n")
    train(config, tmp_path / "w", verbose=False)
    assert leak.decided(tmp_path / "w") == leak.decided(tmp_path / "whole")
    labels = [np.load(tmp_path / name / "predictions-target_test.npz")["labels"] for name in ("w", "whole")]
    assert (labels[0] != labels[1]).all()
