"""Terms between domains that could not do what they say are refused by name."""

import numpy as np
import pytest
from domain_cases import NORMS, SOURCE_FREE, config_of, make_tables, one_device

from tl_jax import config as options
from tl_jax.methods import domain
from tl_jax.methods.term import MAIN, Context, StreamFacts
from tl_jax.runtime import sharding
from tl_jax.training import build, terms
from tl_jax.training.settings import read


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("domains"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    one_device(monkeypatch)


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


@pytest.mark.parametrize("name", ["irm", "fishr", "coral_domains"])
def test_one_row_of_a_domain_is_refused_where_a_domain_needs_two(name, tables):
    """Its penalty would be 0 in silence."""
    context = Context(*[None] * len(Context._fields))._replace(
        batch={MAIN: {"domain": np.arange(3)}}, facts={MAIN: StreamFacts(30, 3)}
    )
    with pytest.raises(ValueError, match=f"{name}: a batch of 3 rows of 3 domains, expected two or more of each"):
        domain.TERMS[name]().loss(context)


def test_statistics_that_are_not_there_are_not_computed_anew(tables):
    changes = {"terms": {"adabn": {}}, "model.head": (), "phases": ()}
    with pytest.raises(ValueError, match=r"terms.adabn: adabn: the network has no BatchNorm layer"):
        build.build(config_of(tables, "", **changes), sharding.make_parallel())


def test_a_turn_that_names_a_group_twice_is_refused(tables):
    """Its optimizer would count two steps where it takes one."""
    turns = ((("backbone", "head", "backbone"), {"task": 1.0}),)
    with pytest.raises(
        ValueError, match=r"turns = (.|\n)*a turn names a group twice: \('backbone', 'head', 'backbone'\)"
    ):
        build.build(config_of(tables, "", turns=turns, streams={}), sharding.make_parallel())


def test_class_weights_that_count_labels_need_some(tables):
    changes = {**SOURCE_FREE, "task_args": {"class_weight": "balanced"}, "terms": {"tent": {}}, "method.rules": NORMS}
    with pytest.raises(
        ValueError, match=r"task_args.class_weight = 'balanced' counts labels, and data.labelled = False"
    ):
        options.check(config_of(tables, "", **changes))
