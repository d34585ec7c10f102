"""Runs between domains for the tests of kills and of leaks: `CASES` hold every term, several in one run.

The loss of such a run is their sum.
"""

import functools
import json

import jax
import numpy as np
import pytest

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.runtime import sharding

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


def make_tables(folder):
    """Two sources and a target of three classes, all of odd sizes and shares of classes."""
    for k, (name, rows) in enumerate(ROWS.items()):
        rng = np.random.default_rng(k)
        labels = rng.choice(3, rows, p=(0.5, 0.3, 0.2))
        x = 1.5 * np.eye(3, 5)[labels] + rng.standard_normal((rows, 5)) * (1 + 0.2 * k) + 0.7 * k
        lines = [",".join(f"{v:.5f}" for v in row) + f",{'abc'[c]}" for row, c in zip(x, labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["x0,x1,x2,x3,x4,label", *lines]) + "\n")
    return folder


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


def one_device(monkeypatch):
    """Batches of 7 do not divide over the devices of the other tests."""
    one = functools.partial(sharding.make_parallel, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_parallel", one)


def check_ledger(folder, starts):
    """No sealed array was opened by a start that had not written its choices, and only then once."""
    ledger = files.read_json(folder / "ledger.json")
    rows = [row for row in ledger["openings"] if row["stream"] in ledger["sealed"]]
    assert ledger["sealed"] and rows and {row["phase"] for row in rows} <= {"score", "selection"}
    assert {row["start"] for row in rows} == {starts - 1}
    opened = [(row["stream"], row["phase"]) for row in rows]
    assert len(opened) == len(set(opened))


def of_which_ci_runs(cases, few):
    return [case if case in few else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
