"""Three small domains and a run that adapts between them with candidates: shared by the tests of honest selection."""

import numpy as np
import pytest

from tl_jax import config as options
from tl_jax.data import sealed, sources
from tl_jax.training.train import train

CLASSES, SIZES = 4, {"source": 210, "other": 90, "target": 170}


@pytest.fixture(scope="module", name="tables")
def make_tables(tmp_path_factory):
    """Three domains of four classes, rows of five numbers; the target is shifted."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(3)
    centres = rng.normal(0, 1.2, (CLASSES, 5))
    for name, rows in SIZES.items():
        label = rng.integers(0, CLASSES, rows)
        x = centres[label] + rng.normal(0, 1, (rows, 5)) + {"source": 0, "other": -0.5, "target": 0.8}[name]
        cells = [",".join(f"{v:.5f}" for v in row) + f",{'abcd'[k]}" for row, k in zip(x, label, strict=True)]
        (folder / f"{name}.csv").write_text("x0,x1,x2,x3,x4,label\n" + "\n".join(cells) + "\n")
    return folder


def config_of(tables, **changes):
    target = f"table:{tables}/target.csv"
    base = options.override(options.make(), {
        "model.name": "mlp_small", "model.head_init": "lecun", "data.source": f"table:{tables}/source.csv",
        "data.labels": ("label",), "data.train": "train[:70%]", "data.val": "train[70%:]",
        "streams": {"target": {"source": target, "split": "train[:50%]", "batch_size": 8}},
        "data.candidates": ("held_out", target, "train[50%:75%]"),
        "data.extra_eval": (("target_test", target, "train[75%:]"),), "terms": {"dann": {"width": 8, "strength": 0.5}},
        "method.name": "full", "optimizer": "sgd", "lr": 0.1, "batch_size": 12, "total": (6.0, "steps"),
        "log_every": (3.0, "steps"), "eval_every": (2.0, "steps"), "resamples": 50,
    })  # fmt: skip
    return options.override(base, changes)


@pytest.fixture(scope="module", name="done")
def make_done(tables, tmp_path_factory):
    """A finished run of that config: its folder and its result."""
    folder = tmp_path_factory.mktemp("done") / "w"
    return folder, train(config_of(tables), folder, verbose=False)


def load(tables, split, seal=True, **more):
    name = f"table:{tables}/target.csv"
    return sources.load(name, split, labels=("label",), sealed=[sealed.canonical(name)] if seal else [], **more)
