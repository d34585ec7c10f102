"""Terms of the loss: reversed gradients, players of a game, clips by network, and what is refused before any work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import trees
from tl_jax.methods import TERMS
from tl_jax.methods.term import Context, Result, Start, Term, make_task_term, only, reverse
from tl_jax.runtime import sharding
from tl_jax.training import build, optim, terms
from tl_jax.training.settings import read
from tl_jax.weights import load


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reverse_is_the_identity_with_the_gradient_multiplied_by_minus_strength(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), dtype)
    upstream = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)), dtype)

    @jax.jit
    def both(x, strength):  # strength is traced, as that of a schedule is
        value, pull = jax.vjp(reverse, x, strength)
        return value, *pull(upstream)

    for strength in (0.0, 0.25, 2.0):  # powers of two, so that nothing rounds
        value, of_x, of_strength = both(x, jnp.float32(strength))
        np.testing.assert_array_equal(value, x)
        assert of_x.dtype == dtype and float(of_strength) == 0.0
        np.testing.assert_array_equal(np.float32(of_x), -strength * np.float32(upstream))
    np.testing.assert_array_equal(jax.grad(lambda x: reverse(x, 3.0).sum())(jnp.ones(2)), [-3.0, -3.0])


def test_only_gives_a_gradient_to_the_leaves_of_one_group():
    params = {"backbone": {"w": jnp.array([1.0, 2.0])}, "head": {"w": jnp.array([3.0])}, "critic": {"w": jnp.ones(2)}}
    groups = {"backbone/w": "backbone", "head/w": "head", "critic/w": "critic"}
    blank = Context(*[None] * len(Context._fields))._replace(groups=groups)

    def loss(params):
        own = only(blank._replace(params=params), "critic")
        assert jax.tree.structure(own) == jax.tree.structure(params)
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(own))

    value, grads = jax.value_and_grad(loss)(params)
    assert float(value) == 1 + 8 + 27 + 2
    expected = {"backbone/w": [0.0, 0.0], "head/w": [0.0], "critic/w": [3.0, 3.0]}
    for path, grad in trees.flatten(grads).items():
        np.testing.assert_array_equal(grad, expected[path], err_msg=path)


@pytest.mark.parametrize("scales", [(10.0, 0.01), (0.01, 10.0), (10.0, 20.0), (0.001, 0.002)])
def test_a_network_that_is_apart_is_clipped_by_its_own_norm(scales):
    """Both networks in one group of the optimizer, and the model in two: what is shared is the norm of a network."""
    rng, (model, critic) = np.random.default_rng(0), scales
    shapes = {"backbone/kernel": (4, 3), "head/kernel": (3, 2), "critic/kernel": (5,), "critic/bias": (2,)}
    labels = {
        "backbone/kernel": "backbone",
        "head/kernel": "critic",
        "critic/kernel": "critic",
        "critic/bias": "critic",
    }
    scale = {path: critic if path.startswith("critic/") else model for path in shapes}
    grads = {path: (scale[path] * rng.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}
    groups = optim.make_groups(labels, optim.Group("sgd"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(0.5), clip=1.0, apart=("critic",))
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for own in (("backbone/kernel", "head/kernel"), ("critic/kernel", "critic/bias")):
        norm = np.sqrt(sum(np.sum(np.float64(grads[path]) ** 2) for path in own))
        for path in own:
            expected = -0.5 * np.float64(grads[path]) * min(1.0, 1.0 / norm)
            np.testing.assert_allclose(updates[path], expected, rtol=1e-5, err_msg=path)


def test_the_loss_of_the_task_weighs_examples_as_data_weights_says():
    logits, y, w = (
        np.random.default_rng(0).standard_normal((5, 3)),
        np.array([0, 2, 1, 1, 0]),
        np.array([2, 0, 1, 0.5, 1]),
    )
    task = tasks.make(tasks.Spec(class_names=("a", "b", "c")))
    blank = Context(*[None] * len(Context._fields))
    context = blank._replace(
        batch={"train": {"weight": jnp.asarray(w)}}, outputs={"train": {"logits": jnp.asarray(logits)}}, task=task,
        encoded={"train": task.encode(jnp.asarray(y))}, total={"train": jnp.float32(5)},
    )  # fmt: skip
    own = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), y]
    np.testing.assert_allclose(make_task_term().loss(context).loss, (w * own).sum() / 5, rtol=1e-6)
    plain = context._replace(batch={"train": {}})
    np.testing.assert_allclose(make_task_term().loss(plain).loss, own.mean(), rtol=1e-6)


def settings_of(**changes):
    return read(options.override(smoke.get_config(), changes))


def needing(**fields):
    """The maker of a term that is worth nothing and has these fields."""
    return lambda: Term(lambda context: Result(jnp.zeros(())), **fields)


# What a run has that lacks a need, and one that has it.
LACKS = {
    "classes": ({"task": "binary", "data.source": "digits:parity"}, {}),
    "stochastic": ({}, {"model.dropout": 0.1}),
    "whole_batch": ({"accumulate": 2}, {}),
    "average": ({}, {"ema": 0.9}),
    "domains": ({"data.source": ("digits",)}, {"data.source": ("digits", "digits:inverted")}),
    "turns": ({}, {"turns": ((("head",), {"task": 1.0}),)}),
}


def test_a_term_that_needs_a_trained_network_says_so_of_a_new_head(capsys, monkeypatch):
    monkeypatch.setitem(TERMS, "eager", needing(trained=True))
    later = ({"phases": ((), (("terms", {"eager": {}}),))}, False)
    kept = {"model.keep_head": True, "model.weights": "builtin:glyphs"}
    alone = {"terms": {"task": {"weight": 0}, "eager": {}}}
    taught = ({"terms": {"eager": {}}}, False)  # beside the task's own term
    for changes, told in ((alone, True), ({**alone, **kept}, False), taught, later):
        settings = settings_of(**changes)
        terms.warn(settings, terms.make_terms(settings))
        assert ("eager: this goes on with a network that answers already" in capsys.readouterr().out) == told


def test_a_term_that_replaces_the_task_leaves_it_out_unless_it_is_named(monkeypatch):
    monkeypatch.setitem(TERMS, "wanting", needing(replaces_task=True))
    for given, expected in (({}, {"wanting"}), ({"task": {"weight": 0.5}}, {"task", "wanting"})):
        (made,) = terms.make_terms(settings_of(terms={"wanting": {}, **given}))
        assert set(made) == expected


def test_every_need_is_in_the_table_of_this_test():
    assert LACKS.keys() == terms.NEEDS.keys()
    known = {need for make in TERMS.values() for need in make().needs}
    assert known <= terms.NEEDS.keys()


@pytest.mark.parametrize("need", LACKS)
def test_a_term_is_refused_where_a_need_is_not_met_with_the_sentence_of_that_need(monkeypatch, need):
    monkeypatch.setitem(TERMS, "wanting", needing(needs=frozenset({need})))
    lacking, having = LACKS[need]
    sentence = re.escape(f"wanting needs {terms.NEEDS[need][1].format('binary')}")
    with pytest.raises(ValueError, match=sentence):
        build.build(
            options.override(smoke.get_config(), {**lacking, "terms": {"wanting": {}}}), sharding.make_parallel()
        )
    terms.make_terms(settings_of(**having, terms={"wanting": {}}))


def test_all_needs_that_are_not_met_are_in_one_error(monkeypatch):
    for need in terms.NEEDS:
        monkeypatch.setitem(TERMS, f"with_{need}", needing(needs=frozenset({need})))
    settings = settings_of(accumulate=2, terms={f"with_{need}": {} for need in terms.NEEDS})
    with pytest.raises(ValueError) as error:
        terms.make_terms(settings._replace(loop=settings.loop._replace(task="regression")))
    for need, (_, sentence) in terms.NEEDS.items():
        assert f"with_{need} needs {sentence.format('regression')}" in str(error.value)


TARGET = {"target": {"source": "digits:inverted", "split": "train[:10%]", "batch_size": 16}}
TEACHER = {"teacher": {"name": "resnet8_cifar", "weights": "builtin:glyphs"}}


def test_streams_and_networks_that_no_term_uses_are_refused_together():
    config = options.override(smoke.get_config(), {"streams": TARGET, "networks": TEACHER})
    with pytest.raises(ValueError) as error:
        build.build(config, sharding.make_parallel())
    assert "streams.target feeds no term" in str(error.value)
    assert "networks.teacher is read by no term" in str(error.value)
    terms.make_terms(settings_of(streams=TARGET, networks=TEACHER, terms={"dann": {}, "kd": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": {"dann": {}}}, "dann is on the stream 'target': add streams.target"),
        (
            {"terms": {"dann": {"target": "targe"}}, "streams": TARGET},
            r"dann is on the stream 'targe' \(did you mean 'target'",
        ),
        ({"terms": {"task": {"weight": 0.0}}}, "no term has a weight above 0"),
        (
            {"terms": {"dann": {}}, "streams": TARGET, "parallel": "pmap"},
            "'pmap' runs one of each, use 'jit'",
        ),
        (
            {"terms": {"kd": {}}, "networks": TEACHER, "parallel": "pmap"},
            "'pmap' runs one of each, use 'jit'",
        ),
        (
            {"terms": {"kd": {}}, "networks": TEACHER, "cache": "features"},
            "kd runs 'teacher' on the inputs, which cache replaces: leave out cache, or set networks.teacher.cache",
        ),
    ],
)
def test_terms_that_a_run_cannot_feed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        terms.make_terms(settings_of(**changes))


def test_a_network_that_a_term_reads_and_nobody_gives_is_named():
    made = terms.make_terms(settings_of(terms={"kd": {}}))
    with pytest.raises(ValueError, match=r"kd reads the networks \['teacher'\], which are not there: add networks"):
        terms.initialise(made, Start(*[None] * 11), {})


@pytest.mark.parametrize("name", ["knn", "logistic", "ridge"])
def test_probes_without_gradient_refuse_a_head_with_layers(name):
    layers = (("dense", {"features": 8}), ("relu", {}))
    probe = {"method.name": name, "method.k": 0, "select": "last", "data.source": "arrays:nowhere.npz"}
    config = options.override(smoke.get_config(), {**probe, "model.head": layers})
    with pytest.raises(ValueError, match=rf"model\.head = .*'dense'.*method\.name = '{name}' takes no steps, expected"):
        build.build(config, sharding.make_parallel())


def test_probes_without_gradient_refuse_the_layers_of_a_kept_head(tmp_path):
    made = load.load("resnet8_cifar", "", 10, head=(("dense", {"features": 8}),))
    card = made.card.replace(class_names=tuple("0123456789"))
    load.export(made.variables, "resnet8_cifar", tmp_path / "w.safetensors", card=card)
    kept = {"model.weights": str(tmp_path / "w.safetensors"), "model.keep_head": True}
    config = options.override(smoke.get_config(), {**kept, "method.name": "ridge", "method.k": 0, "select": "last"})
    with pytest.raises(ValueError, match=r"keeps a head with the layers .*'dense'.*method\.name = 'ridge'"):
        build.build(config, sharding.make_parallel())
