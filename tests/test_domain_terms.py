"""Terms on two domains: their values against known numbers and NumPy, their gradients against PyTorch and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from tl_jax import tasks
from tl_jax.methods import domain, schedules
from tl_jax.methods.domain import adversarial, classifiers, consistency, discrepancy, outputs
from tl_jax.methods.term import AVERAGE, MAIN, MODEL, Context, StreamFacts
from tl_jax.training.terms import NEEDS

# Features, logits and labels in closed form, whose values under each formula were computed apart from this project.
ROWS, CLASSES, WIDTH = 60, 5, 8
i, j = np.meshgrid(np.arange(ROWS), np.arange(WIDTH), indexing="ij")
label = np.arange(ROWS) % 3
X = np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.11 * i * (j + 1)) + 0.3 * np.cos(2 * label[:, None] + j)
Z = np.sin(0.9 * i[:, :5] + 0.5 * j[:, :5]) + 0.5 * np.cos(label[:, None] - j[:, :5])
P = scipy.special.softmax(Z, axis=1)
S, T = slice(30), slice(30, None)
W = 0.1 * np.cos(np.arange(CLASSES * WIDTH))  # of a linear discriminator of the outer product
TLLIB = 2 / 29  # that it adds to each discrepancy


def distances(x):
    return ((x[:, None] - x[None]) ** 2).sum(axis=-1)


def joint_kernel(x=X, p=P):
    return discrepancy.gaussian(distances(x), discrepancy.FACTORS) * jnp.exp(-distances(p) / (2 * 0.92**2))


def conditional(weights, z=Z, w=W, source=30):
    logits = adversarial.outer(X, P) @ w
    found = None if weights == "none" else adversarial.certainty(jnp.asarray(z), source, weights, 1.0)
    return adversarial.domain_loss(logits, source, found)[0]


def kernel():
    return discrepancy.gaussian(discrepancy.squared_distances(jnp.asarray(X)), discrepancy.FACTORS)


def rolled(logits):
    return jnp.roll(jnp.asarray(logits), 1, axis=1)


GOLDENS = {
    "mmd, quadratic": (-0.0235366277, lambda: discrepancy.discrepancy(kernel(), 30, "unbiased") + TLLIB),
    "mmd, linear": (3.3216620045, lambda: discrepancy.discrepancy(kernel(), 30, "linear") + TLLIB),
    "mmd, biased": (0.0939657138, lambda: discrepancy.discrepancy(kernel(), 30, "biased")),
    "jan, quadratic": (-0.0267176234, lambda: discrepancy.discrepancy(joint_kernel(), 30, "unbiased") + TLLIB),
    "jan, linear": (3.3046200278, lambda: discrepancy.discrepancy(joint_kernel(), 30, "linear") + TLLIB),
    "coral": (0.0087151019, lambda: discrepancy.covariance_distance(X[S], X[T], False)),
    "coral, means": (0.0453494108, lambda: discrepancy.covariance_distance(X[S], X[T], True)),
    "mcc": (0.7919793208, lambda: outputs.confusion(jnp.asarray(Z[T]), 2.5)),
    "bsp": (
        171.2144669823,
        lambda: sum(adversarial.squared_singular_values(jnp.asarray(x), slice(1)) for x in (X[S], X[T])),
    ),
    "cdan": (0.6929284761, lambda: conditional("none")),
    "cdan, joint": (0.6929632908, lambda: conditional("joint")),
    "cdan, per_domain": (0.6929566255, lambda: conditional("per_domain")),
    "mcd": (0.0959658241, lambda: classifiers.disagreement(jnp.asarray(Z[T]), rolled(Z[T]))),
    "balance": (1.6354865373, lambda: consistency.imbalance(jnp.asarray(Z[T]))),
    "mdd": (
        7.6984039147,
        lambda: classifiers.margin_disparity(rolled(Z[S]), rolled(Z[T]), P[S].argmax(1), P[T].argmax(1), 4.0),
    ),
    "infomax": (-0.1060406063, lambda: outputs.information(jnp.asarray(Z[T]))),
    "entropy": (1.483523642, lambda: outputs.entropy_of(jnp.asarray(Z)).mean()),
    "bnm": (0.1383348396, lambda: outputs.nuclear_norm(jnp.asarray(P[T])) / 30),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_formulas_have_the_known_values_in_float64(name):
    expected, formula = GOLDENS[name]
    with jax.enable_x64(True):
        found = jax.jit(formula)()
        assert found.dtype == np.float64
        assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


# Gradients against PyTorch's, of the same formulas written for it.


def torch_kernel(x, factors):
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    return sum(torch.exp(-d / (2 * f * d.detach().mean())) for f in factors)


def torch_mmd(x, y):
    k, n = torch_kernel(torch.cat([x, y]), (0.125, 0.25, 0.5, 1.0, 2.0)), len(x)
    s, t, c = k[:n, :n], k[n:, n:], k[:n, n:]
    inner = [(m.sum() - m.diagonal().sum()) / (len(m) * (len(m) - 1)) for m in (s, t)]
    return inner[0] + inner[1] - 2 * c.mean()


def torch_mcc(z):
    q = torch.softmax(z / 2.5, 1)
    w = 1 + torch.exp((q * q.log()).sum(1)).detach()
    c = (q * (w * len(w) / w.sum())[:, None]).T @ q
    c = c / c.sum(1, keepdim=True)
    return (c.sum() - c.trace()) / len(c)


def torch_coral(x, y):
    return ((torch.cov(x.T) - torch.cov(y.T)) ** 2).sum() / (4 * x.shape[1] ** 2)


def torch_information(z):
    p = torch.softmax(z, 1)
    return -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()


def our_mmd(x, y):
    k = discrepancy.gaussian(discrepancy.squared_distances(jnp.concatenate([x, y])), discrepancy.FACTORS)
    return discrepancy.discrepancy(k, len(x), "unbiased")


def squares(x, which):
    return (torch.linalg.svdvals(x)[which] ** 2).sum()


GRADIENTS = {
    "mmd": (our_mmd, torch_mmd, (7, 4), (5, 4)),
    "coral": (lambda x, y: discrepancy.covariance_distance(x, y, False), torch_coral, (7, 4), (5, 4)),
    "mcc": (lambda z: outputs.confusion(z, 2.5), torch_mcc, (9, 4)),
    "bsp": (lambda x: adversarial.squared_singular_values(x, slice(2)), lambda x: squares(x, slice(2)), (9, 4)),
    "bnm": (outputs.nuclear_norm, lambda x: torch.linalg.svdvals(x).sum(), (9, 4)),
    "bnm, few": (outputs.nuclear_norm, lambda x: torch.linalg.svdvals(x).sum(), (3, 6)),
    "infomax": (outputs.information, torch_information, (6, 3)),
    "balance": (
        consistency.imbalance,
        lambda z: -torch.log(torch.softmax(z, 1).mean(0) + 1e-6).mean(),
        (6, 3),
    ),
    "uniformity": (
        lambda z: consistency.uniformity(jax.nn.softmax(z).mean(axis=0)),
        lambda z: torch.nn.functional.binary_cross_entropy(
            torch.softmax(z, 1).mean(0), torch.full((3,), 1 / 3, dtype=z.dtype)
        ),
        (6, 3),
    ),
    "mcd": (
        classifiers.disagreement,
        lambda a, b: (torch.softmax(a, 1) - torch.softmax(b, 1)).abs().mean(),
        (6, 3),
        (6, 3),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_values_and_gradients_are_those_of_pytorch(name):
    ours, theirs, *shapes = GRADIENTS[name]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = theirs(*tensors)
    expected.backward()
    with jax.enable_x64(True):
        step = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arrays)))))
        value, gradients = step(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-9)
    for found, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-7, atol=1e-10)


# Terms in a context of their own: a linear discriminator, two linear heads, and features that are given.

TASK = tasks.make(tasks.Spec(class_names=tuple("abcde")))
rng = np.random.default_rng(1)
HEADS = {name: rng.standard_normal((WIDTH, CLASSES)) / 2 for name in (MODEL, "second_head", "adversarial_head")}
WEIGHTS = {
    **HEADS,
    "discriminator": 0.1 * (np.arange(WIDTH) + 1) * (-1.0) ** np.arange(WIDTH),
    "conditional_discriminator": W,
    "theta": {
        "features": {"kernel": np.eye(WIDTH) + rng.standard_normal((WIDTH, WIDTH)) / 9, "bias": np.full(WIDTH, 0.1)},
        "classes": {"kernel": np.eye(CLASSES) + rng.standard_normal((CLASSES, CLASSES)) / 9, "bias": np.ones(CLASSES)},
    },
}
STRONG = rng.standard_normal((30, WIDTH))  # the second view, as features
SIZES = (30, 17)


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def make_context(features, weights, sizes=SIZES, dtype=jnp.float32, progress=0.5, domains=1, **fields):
    """A step on features [S + T, D]: the heads are matrices, every network is linear, and BatchNorm is not there."""
    source, target = sizes

    def forward(network, of, *, train=False, start=None, stop=None, key=None, variables=None):
        w = weights[MODEL if network == AVERAGE else network]
        of = features[source : source + target] * 3 if isinstance(of, str) else of
        assert (start == "pre_logits") == (network in HEADS and variables is None and "view" not in fields)
        logits = of @ w
        return {"logits": logits if logits.ndim == 2 else logits[:, None]}, {}

    def outputs_of(f):
        return {"pre_logits": f, "embedding": f, "logits": (f @ weights[MODEL]).astype(dtype)}

    streams = {MAIN: features[:source].astype(dtype), "target": features[source : source + target].astype(dtype)}
    labels = jnp.arange(source) % CLASSES
    values = {
        "batch": {MAIN: {"label": labels}, "target": {"image:strong": jnp.asarray(STRONG[:target], jnp.float32)}},
        "encoded": {MAIN: TASK.encode(labels)},
        "count": {MAIN: jnp.ones(source)},
        "total": {MAIN: jnp.float32(source)},
        "outputs": {name: outputs_of(f) for name, f in streams.items()},
        "facts": {name: StreamFacts(len(f), domains) for name, f in streams.items()},
        "params": weights, "batch_stats": {}, "groups": {}, "memory": None, "task": TASK, "forward": forward,
        "step": jnp.zeros((), jnp.int32), "progress": jnp.float32(progress), "key": jax.random.key(0),
    }  # fmt: skip
    return Context(**{**values, **{name: value for name, value in fields.items() if name in Context._fields}})


NAMES = (
    "dann", "cdan", "bsp", "mmd", "jan", "coral", "mcd", "mcd_source", "mcd_discrepancy", "mdd", "afn", "mcc", "bnm",
    "entropy", "infomax", "fixmatch", "self_ensembling", "balance",
)  # fmt: skip
ARGUMENTS = {"fixmatch": {"threshold": 0.3}, "self_ensembling": {"threshold": 0.3}, "jan": {"adversarial": True}}
VIEWS = {"fixmatch", "self_ensembling"}


def loss_of(name, features, weights, **fields):
    arguments = {**ARGUMENTS.get(name, {}), **fields.pop("arguments", {})}
    fields |= {"view": True} if name in VIEWS else {}
    return domain.TERMS[name](**arguments).loss(make_context(features, weights, **fields))


@pytest.mark.parametrize("name", NAMES)
def test_every_term_is_a_float32_number_with_finite_gradients_and_the_logs_it_declares(name):
    term = domain.TERMS[name](**ARGUMENTS.get(name, {}))
    assert term.needs <= NEEDS.keys()
    features = jnp.asarray(X, jnp.float32).at[3].set(0.0)  # a row of zeros, as ReLU leaves them

    def loss(features, weights):
        result = loss_of(name, features, weights, dtype=jnp.bfloat16)  # of the activations that it reads
        assert result.loss.dtype == jnp.float32 and result.loss.shape == ()
        assert tuple(result.logs) == term.logs
        return result.loss

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(features, as_float32(WEIGHTS))
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def slope(function, x, direction, step=1e-5):
    """The central difference of a function along a direction."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def assert_player(loss, plain, x, factor):
    """The gradient of `loss` at x is `factor` times that of `plain`, which has no reversal, by differences."""
    gradient = jax.jit(jax.grad(loss))(x)
    for seed in range(3):
        direction = np.random.default_rng(seed).standard_normal(x.shape)
        expected = factor * slope(plain, x, direction)
        assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(expected), rel=1e-5, abs=1e-8)


def bce(logits, source):
    return (np.logaddexp(0, -logits[:source]).mean() + np.logaddexp(0, logits[source:]).mean()) / 2


@pytest.mark.parametrize("source", [30, 13])
def test_the_discriminators_gradient_falls_and_that_of_the_features_is_its_reverse(source):
    w = WEIGHTS["discriminator"]
    with jax.enable_x64(True):

        def loss(x, w, k):
            return adversarial.domain_loss(adversarial_reverse(x, k) @ w, source)[0]

        adversarial_reverse = adversarial.reverse
        x = jnp.asarray(X)
        assert float(loss(x, w, 0.3)) == pytest.approx(bce(X @ w, source), rel=1e-12)
        assert_player(lambda w: loss(x, w, 0.3), lambda w: bce(X @ np.asarray(w), source), jnp.asarray(w), 1.0)
        assert_player(lambda x: loss(x, w, 0.3), lambda x: bce(np.asarray(x) @ w, source), x, -0.3)


def numpy_certainty(z):
    p = scipy.special.softmax(z, axis=1)
    return 1 + np.exp((p * np.log(p)).sum(axis=1))


@pytest.mark.parametrize("weights", ["joint", "per_domain"])
def test_the_weights_of_cdan_pass_no_gradient_or_a_reversed_one(weights):
    """Unequal batches: each domain has half of the loss; the sums that the weights are divided by are constants."""
    source, logits = 20, adversarial.outer(X, P) @ W
    each = np.where(np.arange(ROWS) < source, np.logaddexp(0, -logits), np.logaddexp(0, logits))
    w = numpy_certainty(Z)
    both = (w[:source].mean() + w[source:].mean()) / 2
    by = {"joint": np.full(ROWS, both), "per_domain": np.repeat([w[:source].mean(), w[source:].mean()], (20, 40))}

    def plain(z):
        v = numpy_certainty(np.asarray(z)) / by[weights] * each
        return (v[:source].mean() + v[source:].mean()) / 2

    with jax.enable_x64(True):

        def loss(z):
            return adversarial.domain_loss(jnp.asarray(logits), source, adversarial.certainty(z, source, weights, 0.4))[
                0
            ]

        assert float(loss(jnp.asarray(Z))) == pytest.approx(plain(Z), rel=1e-12)
        assert_player(loss, plain, jnp.asarray(Z), 0.0 if weights == "joint" else -0.4)


def test_random_maps_keep_the_inner_products_of_the_outer_product():
    """E[<h_i, h_j>] = <f_i, f_j> <p_i, p_j>, and the maps are those of the memory."""
    maps = {"features": (WIDTH, 20_000), "classes": (CLASSES, 20_000)}
    maps = {name: np.random.default_rng(k).standard_normal(shape) for k, (name, shape) in enumerate(maps.items())}
    h = adversarial.outer(jnp.asarray(X[:4]), jnp.asarray(P[:4]), maps)
    exact = adversarial.outer(X[:4], P[:4])
    assert np.abs(h @ h.T - exact @ exact.T).max() < 0.1 * np.abs(exact @ exact.T).max()


@pytest.mark.slow
def test_jan_raises_the_discrepancy_along_its_maps_and_lowers_it_along_the_features():
    def numpy_jmmd(x, theta):
        p = scipy.special.softmax(x @ HEADS[MODEL], axis=1)
        x, p = (z @ theta[of]["kernel"] + theta[of]["bias"] for z, of in ((x, "features"), (p, "classes")))
        k = sum(np.exp(-distances(x) / (2 * f * mean)) for f in discrepancy.FACTORS)
        k, n = k * np.exp(-distances(p) / (2 * 0.92**2)), 30
        inner = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in (k[:n, :n], k[n:, n:])]
        return inner[0] + inner[1] - 2 * k[:n, n:].mean()

    x, theta = X[:47], WEIGHTS["theta"]
    mean = distances(x @ theta["features"]["kernel"]).mean()
    weights = as_float32(WEIGHTS)
    values = as_float32((x, theta["features"]["kernel"]))

    def loss(x, kernel):
        maps = {**weights["theta"], "features": {**weights["theta"]["features"], "kernel": kernel}}
        return loss_of("jan", x, {**weights, "theta": maps}).loss

    assert float(loss(*values)) == pytest.approx(numpy_jmmd(x, theta), rel=1e-4, abs=1e-6)

    def of_kernel(kernel):
        return numpy_jmmd(x, {**theta, "features": {**theta["features"], "kernel": kernel}})

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*values)
    for gradient, plain, at, factor in zip(
        gradients, (lambda x: numpy_jmmd(x, theta), of_kernel), (x, theta["features"]["kernel"]), (1, -1), strict=True
    ):
        direction = np.asarray(gradient, np.float64) / np.linalg.norm(gradient)
        expected = factor * slope(plain, at, direction)
        assert float(np.vdot(gradient, direction)) == pytest.approx(expected, rel=1e-3)
        assert expected > 0


@pytest.mark.slow
def test_mcd_lets_the_heads_part_and_the_features_meet():
    """Every player of the scalar by differences: heads fall along CE + b - d, features along CE + b + k d."""
    source, target = SIZES
    x, weights = X[: source + target], HEADS

    def pieces(x, one, two):
        z, labels = x @ two, np.arange(source) % CLASSES
        supervised = -scipy.special.log_softmax(z[:source], axis=1)[np.arange(source), labels].mean()
        p, q = (scipy.special.softmax(x[source:] @ w, axis=1) for w in (one, two))
        spread = sum(-np.log(r.mean(axis=0) + 1e-6).mean() for r in (p, q))
        return supervised + 0.01 * spread, np.abs(p - q).mean()

    def loss(x, one, two):
        given = {**WEIGHTS, MODEL: one, "second_head": two}
        return loss_of("mcd", x, as_jax(given), arguments={"discrepancy": 0.7, "strength": 2.0}).loss

    def as_jax(tree):
        return jax.tree.map(jnp.asarray, tree)

    at = [x, weights[MODEL], weights["second_head"]]
    value = loss(*as_jax(at))
    rest, difference = pieces(*at)
    assert float(value) == pytest.approx(rest - 0.7 * difference, rel=1e-5)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*as_float32(at))
    for k, sign in enumerate((2.0, -1.0, -1.0)):

        def plain(value, k=k, sign=sign):
            others, apart = pieces(*at[:k], value, *at[k + 1 :])
            return others + sign * 0.7 * apart

        direction = np.random.default_rng(k).standard_normal(at[k].shape)
        expected = slope(plain, at[k], direction, 1e-7)
        assert float(np.vdot(gradients[k], direction)) == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_mdd_is_a_game_against_the_adversary_alone():
    """The adversary falls along the loss, the features rise; what the model answers is a constant."""
    source = SIZES[0]
    x, adversary = X[: sum(SIZES)], HEADS["adversarial_head"]
    answers = (x @ HEADS[MODEL]).argmax(axis=1)

    def plain(x, w):
        p, rows = scipy.special.softmax(x @ w, axis=1), np.arange(len(x))
        at = p[rows, answers]
        return -4 * np.log(at[:source]).mean() - np.log(1 - at[source:] + 1e-6).mean()

    def loss(x, w, head):
        given = {**WEIGHTS, MODEL: head, "adversarial_head": w}
        return loss_of("mdd", x, given, arguments={"strength": 0.25}).loss

    values = as_float32((x, adversary, HEADS[MODEL]))
    assert float(loss(*values)) == pytest.approx(plain(x, adversary), rel=1e-5)
    of_x, of_w, of_head = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*values)
    np.testing.assert_array_equal(of_head, 0.0)
    direction = np.random.default_rng(0).standard_normal(x.shape)
    expected = -0.25 * slope(lambda x: plain(x, adversary), x, direction)
    assert float(np.vdot(of_x, direction)) == pytest.approx(expected, rel=1e-3)
    direction = np.random.default_rng(0).standard_normal(adversary.shape)
    assert float(np.vdot(of_w, direction)) == pytest.approx(
        slope(lambda w: plain(x, w), adversary, direction), rel=1e-3
    )


def test_norms_grow_by_a_step_in_the_direction_of_the_features():
    """AFN: the value is a constant, the gradient -2 delta f / |f|, 0 for a row of zeros."""
    x = jnp.asarray(X[: sum(SIZES)], jnp.float32).at[2].set(0.0)

    def loss(x):
        return loss_of("afn", x, as_float32(WEIGHTS), arguments={"strength": 0.1, "delta": 1.5}).loss

    assert float(loss(x)) == pytest.approx(0.1 * 2 * 1.5**2, rel=1e-5)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    share = np.repeat(SIZES, SIZES)[:, None]
    expected = -0.1 * 2 * 1.5 * np.divide(x, norms, out=np.zeros_like(x), where=norms > 0) / share
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["fixmatch", "self_ensembling"])
def test_confident_answers_teach_the_second_view_alone(name):
    source, target = SIZES
    x, head = X[: source + target], HEADS[MODEL]
    arguments = {"threshold": 0.35, **({"balance": 0.0} if name == "self_ensembling" else {})}
    teacher = scipy.special.softmax(x[source:] @ head * (3 if name == "self_ensembling" else 1), axis=1)
    mask, log_p = teacher.max(axis=1) > 0.35, scipy.special.log_softmax(STRONG[:target] @ head, axis=1)
    assert 0 < mask.sum() < target or name == "self_ensembling"
    each = {
        "fixmatch": -log_p[np.arange(target), teacher.argmax(axis=1)],
        "self_ensembling": 3.0 * ((np.exp(log_p) - teacher) ** 2).sum(axis=1),
    }[name]
    found = loss_of(name, jnp.asarray(x, jnp.float32), as_float32(WEIGHTS), arguments=arguments)
    assert float(found.loss) == pytest.approx((mask * each).mean(), rel=1e-5)
    assert float(found.logs["confident"]) == pytest.approx(mask.mean(), rel=1e-6)
    of_weak = jax.grad(lambda x: loss_of(name, x, as_float32(WEIGHTS), arguments=arguments).loss)
    np.testing.assert_array_equal(of_weak(jnp.asarray(x, jnp.float32)), 0.0)


def test_a_stream_without_a_second_view_is_named_with_what_it_has():
    context = make_context(jnp.asarray(X), as_float32(WEIGHTS), view=True, batch={"target": {"image": 0, "index": 0}})
    with pytest.raises(ValueError, match=r"'target' has the fields \['image', 'index'\] and no 'image:strong'.*strong"):
        domain.TERMS["fixmatch"]().loss(context)


def loops(x, y, estimate):
    """The discrepancies pair by pair, as the papers write their sums."""
    mean = np.mean([((a - b) ** 2).sum() for a in (*x, *y) for b in (*x, *y)])

    def k(a, b):
        return sum(np.exp(-((a - b) ** 2).sum() / (2 * f * mean)) for f in (0.125, 0.25, 0.5, 1, 2))

    if estimate == "linear":
        n = len(x)
        pairs = [(m, (m + 1) % n) for m in range(n)]
        return np.mean([k(x[a], x[b]) + k(y[a], y[b]) - k(x[a], y[b]) - k(x[b], y[a]) for a, b in pairs])
    same = estimate == "biased"
    within = [np.mean([k(z[a], z[b]) for a in range(len(z)) for b in range(len(z)) if same or a != b]) for z in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("estimate", "sizes"), [("unbiased", (7, 4)), ("biased", (3, 9)), ("linear", (6, 6)), ("unbiased", (2, 2))]
)
def test_discrepancies_of_any_batches_are_their_sums_over_pairs(estimate, sizes):
    x = X[: sum(sizes)]
    found = loss_of("mmd", jnp.asarray(x), as_float32(WEIGHTS), sizes=sizes, arguments={"estimate": estimate})
    assert float(found.loss) == pytest.approx(loops(x[: sizes[0]], x[sizes[0] :], estimate), rel=1e-4, abs=1e-6)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("name", "arguments", "sizes", "message"),
    [
        ("mmd", {"estimate": "linear"}, (6, 5), "6 and 5 examples, expected two batches of one size .*batch_size"),
        ("mmd", {}, (6, 1), "6 and 1 examples, expected at least 2 of each"),
        ("jan", {"estimate": "linear"}, (4, 5), "4 and 5 examples, expected two batches of one size"),
        ("coral", {}, (1, 5), "coral of 1 and 5 examples, expected at least 2 of each"),
    ],
)
def test_batches_that_a_distance_cannot_be_taken_of_are_refused(name, arguments, sizes, message):
    with pytest.raises(ValueError, match=message):
        loss_of(name, jnp.asarray(X), as_float32(WEIGHTS), sizes=sizes, arguments=arguments)


@pytest.mark.slow
def test_the_linear_discrepancy_of_several_domains_pairs_rows_at_random():
    """Its mean over keys is the unbiased one; without it, neighbours would be of one domain."""
    x, sizes = jnp.asarray(X[:24], jnp.float32), (12, 12)

    def value(key, estimate, domains):
        arguments = {"estimate": estimate}
        return loss_of("mmd", x, as_float32(WEIGHTS), sizes=sizes, domains=domains, key=key, arguments=arguments).loss

    keys = jax.random.split(jax.random.key(3), 4000)
    values = np.asarray(jax.jit(jax.vmap(lambda key: value(key, "linear", 2)))(keys))
    exact = float(value(keys[0], "unbiased", 2))
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * error
    assert abs(float(value(keys[0], "linear", 1)) - exact) > 40 * error


@pytest.mark.slow
def test_rows_that_are_all_equal_have_no_discrepancy_and_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: loss_of("mmd", x, as_float32(WEIGHTS)).loss)(jnp.ones((47, WIDTH)))
    assert float(value) == pytest.approx(0.0, abs=1e-5) and np.isfinite(gradient).all()


def test_the_strength_of_a_reversal_follows_its_schedule():
    for name, high in {"dann": 1.0, "cdan": 1.0, "mdd": 0.1}.items():
        for progress in (0.0, 0.25, 1.0):
            logs = loss_of(name, jnp.asarray(X, jnp.float32), as_float32(WEIGHTS), progress=progress).logs
            expected = high * (2 / (1 + np.exp(-10 * progress)) - 1)
            assert float(logs["strength"]) == pytest.approx(expected, abs=1e-6)
    assert schedules.make(("sigmoid", {"alpha": 10.0}))(0.5) == pytest.approx(2 / (1 + np.exp(-5)) - 1)
