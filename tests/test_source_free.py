"""Adaptation without source data and at test time: pseudo-labels, entropy, statistics; ADDA and MCD in turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from configs import smoke
from tl_jax import config as options
from tl_jax.methods.domain import adversarial, outputs, source_free, test_time
from tl_jax.methods.term import Context, StreamFacts
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import build
from tl_jax.training.train import train

ROW, J, K = np.arange(60.0)[:, None], np.arange(8.0), np.arange(5.0)
Y = np.arange(60)[:, None] % 3
X = np.sin(0.7 * ROW + 1.3 * J) + 0.5 * np.cos(0.11 * ROW * (J + 1)) + 0.3 * np.cos(2 * Y + J)
Z = np.sin(0.9 * ROW + 0.5 * K) + 0.5 * np.cos(Y - K)
P = np.exp(Z) / np.exp(Z).sum(axis=1, keepdims=True)


def test_the_inputs_of_the_goldens_are_those_meant():
    np.testing.assert_allclose(X.sum(), 7.8312675825, rtol=1e-10)


def test_pseudo_labels_equal_the_published_ones():
    found = source_free.centroid_labels(X[30:], P[30:])
    assert found.tolist() == [int(c) for c in "032222000032222000012222000032"]


@pytest.mark.parametrize("classes", [5, 2])
def test_pseudo_labels_equal_two_rounds_written_out(classes):
    """Cosine distances by scipy; a class that nobody is predicted as takes no part."""
    rng = np.random.default_rng(classes)
    f, p = rng.standard_normal((23, 4)), rng.dirichlet(np.ones(7), 23)
    p[:, classes:] *= 1e-3
    p /= p.sum(axis=1, keepdims=True)
    points = np.hstack([f, np.ones((23, 1))])
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    present = sorted(set(p.argmax(axis=1)))
    weights = p[:, present]
    for _ in range(2):
        centres = np.stack([(w[:, None] * points).sum(axis=0) / w.sum() for w in weights.T if w.sum()])
        kept = [c for c, w in zip(present, weights.T, strict=True) if w.sum()]
        labels = np.array(kept)[cdist(points, centres, "cosine").argmin(axis=1)]
        weights = np.stack([(labels == c).astype(float) for c in present], axis=1)
    assert source_free.centroid_labels(f, p).tolist() == labels.tolist()


def context_of(logits, memory, params=None, index=None):
    blank = Context(*[None] * len(Context._fields))
    index = np.arange(len(logits)) if index is None else index
    return blank._replace(
        batch={"train": {"index": jnp.asarray(index)}}, outputs={"train": {"logits": jnp.asarray(logits)}},
        facts={"train": StreamFacts(60, 1)}, memory=memory, params=params,
    )  # fmt: skip


def test_shot_is_its_pseudo_labels_and_the_information():
    labels = np.arange(60) % 5
    index = np.arange(60)[::-1]
    result = source_free.shot().loss(context_of(Z, jnp.asarray(labels), index=index))
    own = -np.log(P[np.arange(60), labels[index]]).mean()
    information = -(P * np.log(P)).sum(axis=1).mean() + (P.mean(0) * np.log(P.mean(0))).sum()
    np.testing.assert_allclose(result.loss, 0.3 * own + information, rtol=1e-5)
    np.testing.assert_allclose(result.logs["agreement"], (P.argmax(1) == labels[index]).mean(), rtol=1e-6)


def test_tent_is_the_mean_entropy_and_keeps_what_it_answered():
    index = np.random.default_rng(0).permutation(60)[:20]
    result = test_time.tent().loss(context_of(Z[index], jnp.zeros((60, 5)), index=index))
    np.testing.assert_allclose(test_time.tent().loss(context_of(Z, jnp.zeros((60, 5)))).loss, 1.483523642, rtol=1e-6)
    expected = np.zeros((60, 5))
    expected[index] = Z[index]
    np.testing.assert_allclose(result.memory, expected, rtol=1e-6)


def test_eata_selects_weighs_and_anchors_as_the_paper_says():
    rng = np.random.default_rng(1)
    w0, now, fisher = rng.standard_normal(3), rng.standard_normal(3), rng.random(3)
    memory = {
        "answers": jnp.zeros((60, 5)), "average": jnp.zeros(5), "begun": jnp.zeros((), bool),
        "fisher": {"norm/scale": jnp.asarray(fisher)}, "start": {"norm/scale": jnp.asarray(w0)},
    }  # fmt: skip
    term, params = test_time.eata(margin=0.7, similarity=0.8, anchor=5.0), {"norm": {"scale": jnp.asarray(now)}}
    z = 2 * rng.standard_normal((60, 5))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    entropy, top, average = -(p * np.log(p)).sum(axis=1), 0.7 * np.log(5), None
    loss = jax.jit(lambda z, memory, index: term.loss(context_of(z, memory, params, index)))
    for rows in (slice(0, 20), slice(20, 40), slice(40, 60)):
        result = loss(z[rows], memory, np.arange(60)[rows])
        chosen = entropy[rows] < top
        if average is not None:
            cosine = p[rows] @ average / np.linalg.norm(p[rows], axis=1) / np.linalg.norm(average)
            chosen &= np.abs(cosine) < 0.8
        assert 0 < chosen.sum() < len(chosen)
        weighed = np.exp(top - entropy[rows][chosen]) * entropy[rows][chosen]
        drift = 5.0 * (fisher * (now - w0) ** 2).sum()
        np.testing.assert_allclose(result.loss, weighed.mean() + drift, rtol=1e-5)
        np.testing.assert_allclose(result.logs["chosen"], chosen.mean(), rtol=1e-6)
        mean = p[rows][chosen].mean(axis=0)
        average = mean if average is None else 0.9 * average + 0.1 * mean
        memory = result.memory
        np.testing.assert_allclose(memory["average"], average, rtol=1e-5)


def test_eata_without_a_certain_example_is_its_anchor_alone():
    memory = {
        "answers": jnp.zeros((60, 5)), "average": jnp.zeros(5), "begun": jnp.zeros((), bool),
        "fisher": {"norm/scale": jnp.ones(2)}, "start": {"norm/scale": jnp.zeros(2)},
    }  # fmt: skip
    context = context_of(np.zeros((60, 5)), memory, {"norm": {"scale": jnp.full(2, 0.5)}})
    result = test_time.eata(anchor=1.0).loss(context)
    assert float(result.loss) == 0.5 and not bool(result.memory["begun"])
    assert not result.memory["average"].any()


@pytest.mark.slow
def test_adda_teaches_the_discriminator_and_turns_the_features():
    """With D(f) = w f: the gradient of w is that of D's loss, that of f of the loss with the other label."""
    w, source, target = np.array([0.3, -0.2]), X[:4, :2], X[30:37, :2]

    def loss(w, f, reversal):
        def forward(network, of, variables=None, **_):
            if network == "model":
                return {"embedding": jnp.asarray(source)}, {}
            kernel = w if variables is None else variables["params"]
            return {"logits": (of @ kernel)[:, None]}, {}

        blank = Context(*[None] * len(Context._fields))
        context = blank._replace(
            outputs={"target": {"embedding": f}}, forward=forward, params={"discriminator": w}, progress=0.5, memory={}
        )
        return adversarial.adda(reversal=reversal, strength=0.7).loss(context).loss

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    of_w = (source * (sigmoid(source @ w) - 1)[:, None]).mean(0) / 2 + (target * sigmoid(target @ w)[:, None]).mean(
        0
    ) / 2
    for reversal in (False, True):
        got_w, got_f = jax.grad(loss, (0, 1))(jnp.asarray(w), jnp.asarray(target), reversal)
        np.testing.assert_allclose(got_w, of_w, rtol=1e-5)
        push = -sigmoid(target @ w) / 2 if reversal else sigmoid(target @ w) - 1
        np.testing.assert_allclose(got_f, 0.7 * push[:, None] * w / len(target), rtol=1e-5)


NORMS, FROZEN_HEAD = (
    ((r".*norm\d*/(scale|bias)", "norm"), (".*", "frozen")),
    ((r"head/.*", "frozen"), (".*", "backbone")),
)
ALONE = {"data.labelled": False, "data.source": "digits:inverted", "data.test": "test[:8%]", "data.val": ""}
MCD = {"task": 1.0, "mcd_source": 1.0}
RUNS = {
    "shot": {"terms": {"shot": {}}, "method.rules": FROZEN_HEAD, **ALONE},
    "tent": {"terms": {"tent": {}}, "method.rules": NORMS, "data.sampling": "sequential", **ALONE},
    "eata": {"terms": {"eata": {"examples": 20}}, "method.rules": NORMS, **ALONE},
    "adda": {"phases": (
        (("total", (1.0, "steps")),),
        (("total", (4.0, "steps")), ("terms", {"adda": {"width": 8}}),
         ("method.rules", FROZEN_HEAD)),
    ), "method.rules": ((".*", "all"),)},
    "mcd in turns": {"method.name": "full", "terms": {"mcd_source": {}, "mcd_discrepancy": {}}, "turns": (
        (("backbone", "head", "second_head"), MCD), (("head", "second_head"), {**MCD, "mcd_discrepancy": -1.0}),
        *4 * ((("backbone",), {"mcd_discrepancy": 1.0}),),
    )},
    "adabn": {"terms": {"task": {"weight": 0}, "adabn": {}}, "method.rules": ((".*", "frozen"),)},
}  # fmt: skip


def make_config(name):
    target = {"target": {"source": "digits:inverted", "split": "train[:40]", "batch_size": 8}}
    return options.override(smoke.get_config(), {
        "model.image_size": 16, "model.head_init": "lecun", "data.train": "train[:40]", "data.val": "train[97%:]",
        "data.test": "test[:8%]", "data.shots": 0, "batch_size": 8, "eval_batch_size": 32, "resamples": 10,
        "select": "last", "method.name": "rules", "lr": 0.01, "total": (7.0, "steps"),
        "streams": {} if "data.labelled" in RUNS[name] else target, **RUNS[name],
    })  # fmt: skip


def test_a_network_is_frozen_in_a_phase_without_its_terms():
    """ADDA's discriminator neither decays nor counts steps before its phase, so it starts that phase as it was made."""
    config = options.override(make_config("adda"), {"weight_decay": 0.5, "decay": ".*", "optimizer": "sgd"})
    run = build.build(config, sharding.make_parallel())
    first, second = (
        {row["group"] for row in phase.audit["parameters"] if row["path"].startswith("discriminator/")}
        for phase in run.phases
    )
    assert (first, second) == ({"frozen"}, {"discriminator"})
    assert "discriminator" not in run.phases[0].groups
    assert {offset for path, offset in run.phases[1].offsets.items() if path.startswith("discriminator/")} == {0}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "adabn" else ()) for name in RUNS]
)
def test_a_run_of_each_resumes_bit_equal(name, tmp_path):
    """Stopped at a boundary, inside an epoch of the target and behind its refresh."""
    config = make_config(name)
    whole = train(config, tmp_path / "a", verbose=False)
    for step in (2, 5, 6) if name != "adda" else (1, 2, 4):
        with pytest.raises(Preempted):
            train(config, tmp_path / "b", verbose=False, stop_requested=lambda done, step=step: done == step)
    assert train(config, tmp_path / "b", verbose=False) == whole
    for file in ("metrics.jsonl", "predictions.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_entropy_of_certain_and_of_uniform_answers_is_exact():
    logits = jnp.array([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4]])
    np.testing.assert_allclose(outputs.entropy_of(logits), [np.log(3), 0.0], atol=1e-6)
