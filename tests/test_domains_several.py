"""Terms of several domains against numpy, PyTorch and SciPy: the goldens, rows in any order, and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from tl_jax import tasks
from tl_jax.methods import TERMS, mixing
from tl_jax.methods.domain import generalise, several
from tl_jax.methods.term import Context, Start, StreamFacts

GENERALISE = ("irm", "vrex", "groupdro", "coral_domains", "mmd_domains", "fishr")


def golden_data():
    """Features X [60, 8], logits [60, 5] and labels [60] of which the goldens are."""
    i, j, k, y = np.arange(60)[:, None], np.arange(8)[None], np.arange(5)[None], np.arange(60) % 3
    x = np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.11 * i * (j + 1)) + 0.3 * np.cos(2 * y[:, None] + j)
    assert x.sum() == pytest.approx(7.8312675825, rel=1e-10)
    return x, np.sin(0.9 * i + 0.5 * k) + 0.5 * np.cos(y[:, None] - k), y


X, LOGITS, LABELS = golden_data()
THIRDS = np.repeat(np.arange(3), 20)
RESIDUALS = scipy.special.softmax(LOGITS, axis=1) - np.eye(5)[LABELS]
LOSSES = -scipy.special.log_softmax(LOGITS, axis=1)[np.arange(60), LABELS]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_task(classes):
    return tasks.make(tasks.Spec(class_names=tuple(map(str, range(classes)))))


def context_of(logits=LOGITS, x=X, labels=LABELS, domain=THIRDS, target=None, memory=None, task=None, **fields):
    """What a term sees of these outputs; the features are both pre_logits and embedding."""
    outputs = {"train": {"logits": jnp.asarray(logits), "embedding": jnp.asarray(x), "pre_logits": jnp.asarray(x)}}
    facts = {"train": StreamFacts(1000, int(np.max(domain)) + 1)}
    if target is not None:
        outputs["target"], facts["target"] = {"embedding": jnp.asarray(target)}, StreamFacts(500, 1)
    count, task = jnp.ones(len(labels)), task or make_task(logits.shape[1])
    context = Context(*[None] * len(Context._fields))._replace(
        batch={"train": {"label": jnp.asarray(labels), "domain": jnp.asarray(domain)}},
        encoded={"train": task.encode(jnp.asarray(labels))}, count={"train": count}, total={"train": count.sum()},
        outputs=outputs, facts=facts, memory=memory, task=task,
    )  # fmt: skip
    return context._replace(**fields)


def start_of(domains, features=8, classes=5):
    return Start(*[None] * len(Start._fields[:-1]))._replace(
        task=make_task(classes), facts={"train": StreamFacts(1000, domains)}, shapes={"embedding": (1, features)},
        key=jax.random.key(0),
    )  # fmt: skip


def irm_of(domain=THIRDS, logits=LOGITS, residuals=RESIDUALS):
    return generalise.invariance(jnp.asarray((residuals * logits).sum(1)), jnp.asarray(domain), domain.max() + 1)


def fishr_of(decay=0.0):
    z = np.c_[X, np.ones(60)]
    return generalise.gradient_variances(jnp.asarray(RESIDUALS), jnp.asarray(z), several.shares(THIRDS, 3))


HALVES = np.repeat([0, 1], 30)
GOLDENS = {
    "risks": (lambda: several.shares(THIRDS, 3) @ LOSSES, (1.298755751, 1.2871877741, 1.3198943396)),
    "irm": (irm_of, 0.0311324394),
    "vrex": (lambda: jnp.var(several.shares(THIRDS, 3) @ LOSSES), 0.0001833753),
    "fishr": (lambda: jnp.var(fishr_of(), axis=0).mean(), 0.00059788344),
    "fishr, summed": (lambda: jnp.var(fishr_of(), axis=0).sum(), 0.026904755),
    "m3sda": (lambda: several.moment_distance(X[:40], several.shares(THIRDS[:40], 2), X[40:], 2), 2.7045093772),
    "coral": (lambda: generalise.coral_between(jnp.asarray(X), HALVES, 2), 0.0453494108),
    "mmd": (lambda: generalise.mmd_between(jnp.asarray(X), HALVES, 2), 0.2604485937),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_formulas_give_the_goldens(name):
    function, expected = GOLDENS[name]
    np.testing.assert_allclose(function(), expected, rtol=1e-6)


def test_the_terms_give_the_goldens_to_the_precision_of_the_loss():
    """The task's loss is float32."""
    memory = {"groupdro": jnp.full(3, 1 / 3), "fishr": jnp.zeros((3, 5, 9))}
    expected = {"irm": 0.0311324394, "vrex": 0.0001833753, "groupdro": 1.3019477887, "fishr": 0.00059788344}
    for name, value in expected.items():
        arguments = {"decay": 0.0} if name == "fishr" else {}
        result = TERMS[name](**arguments).loss(context_of(memory=memory.get(name)))
        np.testing.assert_allclose(result.loss, value, rtol=3e-5, err_msg=name)
    m3sda = several.m3sda(moments=2, strength=2.0)
    context = context_of(LOGITS[:40], X[:40], LABELS[:40], THIRDS[:40], target=X[40:])
    np.testing.assert_allclose(m3sda.loss(context).loss, 2 * 2.7045093772, rtol=1e-6)


# Domains of 3, 7, 2 and 12 rows in any order; the references go through them one by one, in numpy or PyTorch.


def scattered(seed=3, features=6, classes=4):
    rng = np.random.default_rng(seed)
    domain = rng.permutation(np.repeat(np.arange(4), (3, 7, 2, 12)))
    x = rng.standard_normal((24, features)) * (1 + domain[:, None]) + 0.2 * domain[:, None]
    return x, rng.standard_normal((24, classes)) * 2, rng.integers(0, classes, 24), domain


def torch_losses(logits, y):
    return torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="none")


def torch_irm(x, logits, y, domain):
    """The definition of the paper: gradients by a dummy scale of two halves, by autograd."""
    values = []
    for d in range(4):
        products = []
        for half in (0, 1):
            scale, rows = (
                torch.tensor(1.0, dtype=torch.float64, requires_grad=True),
                np.flatnonzero(domain == d)[half::2],
            )
            risk = torch_losses(logits[rows] * scale, y[rows]).mean()
            products.append(torch.autograd.grad(risk, scale, create_graph=True)[0])
        values.append(products[0] * products[1])
    return torch.stack(values).mean()


def torch_risks(logits, y, domain):
    return torch.stack([torch_losses(logits[domain == d], y[domain == d]).mean() for d in range(4)])


def torch_pairs(x, distance, domain):
    return torch.stack([distance(x[domain == i], x[domain == j]) for j in range(4) for i in range(j)]).mean()


def torch_coral(x, logits, y, domain):
    def distance(a, b):
        return (a.mean(0) - b.mean(0)).square().mean() + (torch.cov(a.T) - torch.cov(b.T)).square().mean()

    return torch_pairs(x, distance, domain)


def torch_mmd(x, logits, y, domain):
    def kernel(a, b):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return sum(torch.exp(-(10.0**power) * squares) for power in range(-3, 4)).mean()

    return torch_pairs(x, lambda a, b: kernel(a, a) + kernel(b, b) - 2 * kernel(a, b), domain)


def torch_fishr(x, logits, y, domain):
    """Per-example gradients of the loss by the kernel and the bias of the last layer, by autograd."""
    weight, bias = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    kernel, offset = weight.requires_grad_(), bias.requires_grad_()
    rows = []
    for i in range(24):
        loss = torch_losses((logits[i] + x[i] @ kernel - (x[i] @ kernel).detach() + offset)[None], y[i : i + 1]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (kernel, offset), create_graph=True)]))
    rows = torch.stack(rows)
    v = torch.stack([rows[domain == d].var(0, unbiased=False) for d in range(4)])
    return (v - v.mean(0)).square().mean()


TORCH = {
    "irm": torch_irm,
    "vrex": lambda x, logits, y, domain: torch_risks(logits, y, domain).var(unbiased=False),
    "coral_domains": torch_coral,
    "mmd_domains": torch_mmd,
    "fishr": torch_fishr,
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", TORCH)
def test_values_and_gradients_are_those_of_autograd_for_rows_in_any_order_and_domains_of_any_size(name):
    x, logits, y, domain = scattered()
    x = x / 3 if name == "mmd_domains" else x
    term = TERMS[name](**({"decay": 0.0} if name == "fishr" else {}))

    def loss(x, logits):
        return term.loss(context_of(logits, x, y, domain, memory=jnp.zeros((4, 4, 7)))).loss

    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(logits))
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, logits)]
    expected = TORCH[name](*inputs, y, domain)
    others = torch.autograd.grad(expected, inputs, allow_unused=True)
    exact = name in ("coral_domains", "mmd_domains")  # the others go through the float32 of the loss
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4 if name == "mmd_domains" else 1e-6 if exact else 2e-5)
    for grad, other in zip(grads, others, strict=True):
        other = np.zeros_like(grad) if other is None else other.numpy()
        np.testing.assert_allclose(grad, other, rtol=2e-5, atol=2e-5 * max(np.abs(other).max(), 1e-3))


def test_the_square_of_irm_in_closed_form_is_the_same_to_1e_6():
    x, logits, y, domain = scattered()
    residuals = scipy.special.softmax(logits, axis=1) - np.eye(4)[y]
    expected = torch_irm(x, torch.tensor(logits), y, domain).item()
    np.testing.assert_allclose(irm_of(domain, logits, residuals), expected, rtol=1e-6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", [*GENERALISE, "m3sda", pytest.param("darn", marks=pytest.mark.slow)])
def test_the_order_of_the_rows_says_nothing(name):
    """For IRM of the domains; within a domain every second row is the other half."""
    x, logits, y, domain = scattered()
    term = TERMS[name]()
    memory = term.init(start_of(4, 6, 4))[1]
    order = np.argsort(domain, kind="stable") if name == "irm" else np.random.default_rng(0).permutation(24)
    results = [
        term.loss(context_of(logits[o], x[o], y[o], domain[o], target=x[:5] + 1, memory=memory))
        for o in (np.arange(24), order)
    ]
    np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-5)
    if memory is not None:
        np.testing.assert_allclose(results[0].memory, results[1].memory, rtol=1e-4, atol=1e-7)


def test_groupdro_multiplies_q_before_it_is_used_over_several_steps():
    term, q = generalise.groupdro(eta=0.5), np.full(3, 1 / 3)
    memory = term.init(start_of(3))[1]
    for step in range(4):
        logits = LOGITS * (1 + step)
        losses = -scipy.special.log_softmax(logits, axis=1)[np.arange(60), LABELS]
        risks = losses.reshape(3, 20).mean(1)
        q = q * np.exp(0.5 * risks)
        q /= q.sum()

        def loss(logits, memory=memory):
            result = term.loss(context_of(logits, memory=memory))
            return result.loss, result

        grad, result = jax.grad(loss, has_aux=True)(jnp.asarray(logits))
        memory = result.memory
        np.testing.assert_allclose(memory, q, rtol=1e-6)
        np.testing.assert_allclose([result.loss, result.logs["largest"]], [q @ risks, q.max()], rtol=1e-6)
        residuals = scipy.special.softmax(logits, axis=1) - np.eye(5)[LABELS]
        np.testing.assert_allclose(grad, q[THIRDS][:, None] / 20 * residuals, rtol=1e-4, atol=1e-8)  # none through q


def test_fishr_averages_the_variances_and_scales_the_new_one_as_if_it_were_alone():
    term, memory = generalise.fishr(decay=0.75), jnp.zeros((3, 5, 9))
    average = np.zeros((3, 5, 9))
    for step in range(3):
        logits = LOGITS + step
        logits[:, 0] += step
        residuals = scipy.special.softmax(logits, axis=1) - np.eye(5)[LABELS]
        gradients = np.einsum("nk,nf->nkf", residuals, np.c_[X, np.ones(60)])
        average = 0.75 * average + 0.25 * np.stack([rows.var(0) for rows in gradients.reshape(3, 20, 5, 9)])
        result = term.loss(context_of(logits, memory=memory))
        memory = result.memory
        np.testing.assert_allclose(memory, average, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(result.loss, (average / 0.25).var(0).mean(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["binary", *(pytest.param(name, marks=pytest.mark.slow) for name in ("regression", "multilabel"))]
)
def test_every_task_has_the_terms_on_risks_and_gradients(name):
    rng = np.random.default_rng(0)
    outputs = {"regression": 2, "binary": 1, "multilabel": 3}[name]
    labels = {"regression": rng.standard_normal((24, 2)), "binary": rng.integers(0, 2, 24)}
    labels = labels.get(name, rng.integers(0, 2, (24, 3)))
    names = ("no", "yes") if name == "binary" else tuple("abc"[:outputs])
    spec = (
        tasks.Spec(name, names, (0.0,) * outputs, (1.0,) * outputs) if name == "regression" else tasks.Spec(name, names)
    )
    task = tasks.make(spec)
    x, logits, _, domain = scattered(classes=outputs)

    def slope(i, scale=1e-3):
        one = [
            task.loss({"logits": logits[i : i + 1] * (1 + s)}, task.encode(jnp.asarray(labels[i : i + 1])))
            for s in (scale, -scale)
        ]
        return float((one[0] - one[1])[0]) / (2 * scale)

    context = context_of(logits, x, labels, domain, task=task)
    slopes = np.array([slope(i) for i in range(24)])
    expected = [slopes[domain == d][::2].mean() * slopes[domain == d][1::2].mean() for d in range(4)]
    np.testing.assert_allclose(generalise.irm().loss(context).loss, np.mean(expected), rtol=2e-3)
    risks = [float(np.mean(task.loss({"logits": logits}, context.encoded["train"])[domain == d])) for d in range(4)]
    np.testing.assert_allclose(generalise.vrex().loss(context).loss, np.var(risks), rtol=1e-4)
    fishr = generalise.fishr().loss(context._replace(memory=jnp.zeros((4, outputs, 7))))
    assert np.isfinite(fishr.loss) and fishr.loss > 0


def test_examples_with_weights_count_in_every_risk_as_in_the_tasks_own_term():
    weights = np.random.default_rng(0).random(60) * 2
    context = context_of(memory=jnp.full(3, 1 / 3))
    context = context._replace(batch={"train": {**context.batch["train"], "weight": jnp.asarray(weights)}})
    risks = (weights * LOSSES).reshape(3, 20).mean(1)
    np.testing.assert_allclose(several.risks(context), risks, rtol=1e-6)
    q = np.exp(0.01 * risks) / np.exp(0.01 * risks).sum()
    np.testing.assert_allclose(generalise.groupdro().loss(context).loss, q @ risks, rtol=1e-6)
    slopes = (weights * (RESIDUALS * LOGITS).sum(1)).reshape(3, 20)
    expected = (slopes[:, ::2].mean(1) * slopes[:, 1::2].mean(1)).mean()
    np.testing.assert_allclose(generalise.irm().loss(context).loss, expected, rtol=1e-5)


# Several sources and a target


@pytest.mark.slow
def test_the_moment_distance_and_its_gradient_are_the_papers():
    x, _, _, domain = scattered()
    target = np.random.default_rng(9).standard_normal((5, 6))

    def in_torch(x, target):
        total = 0.0
        for k in range(1, 6):
            means, of_target = [(x[domain == d] ** k).mean(0) for d in range(4)], (target**k).mean(0)
            total = total + torch.stack([(m - of_target).norm() for m in means]).mean()
            total = total + torch.stack([(means[i] - means[j]).norm() for j in range(4) for i in range(j)]).mean()
        return total

    def ours(x, target):
        return several.moment_distance(x, several.shares(jnp.asarray(domain), 4), target, 5)

    value, grads = jax.value_and_grad(ours, (0, 1))(jnp.asarray(x), jnp.asarray(target))
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, target)]
    expected = in_torch(*inputs)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    for grad, other in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        np.testing.assert_allclose(grad, other.numpy(), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_domains_with_equal_moments_have_a_gradient_of_zero_and_not_nan():
    x = jnp.ones((6, 3))
    share = several.shares(jnp.array([0, 1, 2, 0, 1, 2]), 3)
    grad = jax.grad(lambda x: several.moment_distance(x, share, x[:2], 5))(x)
    np.testing.assert_array_equal(grad, np.zeros((6, 3)))


def discriminators(domains, features, width=7):
    """The networks of MDAN, and `Context.forward` with their parameters as the first argument."""
    networks, memory = several.mdan(width=width).init(start_of(domains, features))
    assert memory is None and [network.group for network in networks.values()] == list(networks)
    params = {name: jax.tree.map(jnp.float64, network.variables["params"]) for name, network in networks.items()}

    def forward(params, network, of):
        own = params[network]
        hidden = jax.nn.relu(
            of @ own["backbone"]["stem"]["dense"]["kernel"] + own["backbone"]["stem"]["dense"]["bias"][None]
        )
        return {"logits": hidden @ own["head"]["kernel"] + own["head"]["bias"][None]}, {}

    out = networks["discriminator0"].module.apply(networks["discriminator0"].variables, jnp.ones((2, features)))[0]
    np.testing.assert_allclose(forward(params, "discriminator0", jnp.ones((2, features)))[0]["logits"], out, rtol=1e-5)
    return params, forward


@pytest.mark.slow
@pytest.mark.parametrize("hard", [pytest.param(False, marks=pytest.mark.slow), True])
def test_mdan_weighs_each_source_by_the_softmax_and_reverses_the_features_alone(hard):
    x, logits, y, domain = scattered()
    target, mu, gamma = np.random.default_rng(9).standard_normal((5, 6)), 0.3, 4.0
    params, forward = discriminators(4, 6)
    assert len({np.asarray(own["head"]["kernel"]).tobytes() for own in params.values()}) == 4
    term = several.mdan(gamma=gamma, mu=mu, hard=hard)

    def loss(params, x, target, logits):
        context = context_of(logits, x, y, domain, target=target, forward=functools.partial(forward, params))
        result = term.loss(context)
        return result.loss, result.logs

    given = params, jnp.asarray(x), jnp.asarray(target), jnp.asarray(logits)
    (value, logs), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*given)

    def one(i, params, x, target, logits):
        """Its risk, and the loss of its discriminator, without reversal."""
        rows = np.flatnonzero(domain == i)
        risk = -jax.nn.log_softmax(logits[rows])[np.arange(len(rows)), y[rows]].mean()
        of_source, of_target = (forward(params, f"discriminator{i}", f)[0]["logits"][:, 0] for f in (x[rows], target))
        d = -jax.nn.log_sigmoid(of_source).mean() - jax.nn.log_sigmoid(-of_target).mean()
        return risk + mu * d, ((of_source > 0).mean() + (of_target <= 0).mean()) / 2

    values, by_one = zip(
        *(jax.jit(jax.value_and_grad(functools.partial(one, i), (0, 1, 2, 3), has_aux=True))(*given) for i in range(4)),
        strict=True,
    )
    each, right = np.array(values).T
    weights = np.eye(4)[each.argmax()] if hard else scipy.special.softmax(gamma * each)
    expected = each.max() if hard else scipy.special.logsumexp(gamma * each) / gamma
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(logs["accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(logs["effective"], 1 / (weights**2).sum(), rtol=1e-5)
    signs = (1.0, -1.0, -1.0, 1.0)  # the features ascend what the discriminators descend
    for sign, grad, *others in zip(signs, grads, *by_one, strict=True):
        wanted = jax.tree.map(lambda *g, s=sign: s * np.tensordot(weights, np.stack(g), 1), *others)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grad, wanted)


@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0, 5.0, 1e4])
def test_the_weights_of_sources_minimise_the_bound(tau):
    def bound(a, g):
        return a @ g + tau * np.sqrt((a**2).sum())

    for seed in range(4):
        g = np.random.default_rng(seed).random(6) * 3
        a = np.asarray(several.least_bound(jnp.asarray(g), tau))
        assert (a >= 0).all() and a.sum() == pytest.approx(1, abs=1e-12)
        best = scipy.optimize.minimize(
            bound, np.full(6, 1 / 6), (g,), method="SLSQP", bounds=[(0, 1)] * 6,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1}, options={"ftol": 1e-12, "maxiter": 500},
        )  # fmt: skip
        assert bound(a, g) <= best.fun + 1e-9 * (1 + tau)
    if tau == 0.01:
        assert a[g.argmin()] > 0.99
    if tau == 1e4:
        np.testing.assert_allclose(a, 1 / 6, atol=1e-3)
    np.testing.assert_allclose(several.least_bound(jnp.full(3, 2.0), tau), 1 / 3)


@pytest.mark.slow
def test_sources_near_the_target_weigh_more_and_the_gradient_is_that_of_the_weighted_risks():
    x, logits, y, domain = scattered()
    rng = np.random.default_rng(1)
    centres = np.array([0.0, 0.5, 2.0, 9.0])
    x, target = rng.standard_normal((24, 6)) + centres[domain][:, None], rng.standard_normal((9, 6))
    logits = logits * 0.1
    term = several.darn(tau=0.5, decay=0.5)
    memory = term.init(start_of(4, 6, 4))[1]
    for _ in range(3):
        result = term.loss(context_of(logits, x, y, domain, target=target, memory=memory))
        memory = result.memory
    both = np.concatenate([x, target])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    kernel = np.mean([np.exp(-squares / squares.mean() / 2.0**k) for k in range(-2, 3)], axis=0)
    rows, last = [np.flatnonzero(domain == d) for d in range(4)], np.arange(24, 33)
    mmd = [
        kernel[np.ix_(r, r)].mean() + kernel[np.ix_(last, last)].mean() - 2 * kernel[np.ix_(r, last)].mean()
        for r in rows
    ]
    losses = -scipy.special.log_softmax(logits, axis=1)[np.arange(24), y]
    risks = np.array([losses[r].mean() for r in rows])
    np.testing.assert_allclose(memory, (1 - 0.5**3) * (risks + mmd), rtol=1e-5)
    weights = np.asarray(several.least_bound(memory, 0.5))
    assert weights[0] > weights[2] > weights[3]
    np.testing.assert_allclose(result.loss, weights @ risks, rtol=1e-5)
    np.testing.assert_allclose(result.logs["effective"], 1 / (weights**2).sum(), rtol=1e-5)

    def loss(x, logits):
        return term.loss(context_of(logits, x, y, domain, target=target, memory=memory)).loss

    of_x, of_logits = jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(logits))
    assert not of_x.any()
    after = np.asarray(several.least_bound(0.5 * memory + 0.5 * (risks + np.array(mmd)), 0.5))
    per_row = (after / np.bincount(domain))[domain][:, None]
    residuals = scipy.special.softmax(logits, axis=1) - np.eye(4)[y]
    np.testing.assert_allclose(of_logits, per_row * residuals, rtol=1e-4, atol=1e-8)


# Mixup of domains


@pytest.mark.slow
def test_domain_mixup_mixes_each_domain_with_the_next_of_a_ring_by_one_weight():
    domain = np.random.default_rng(2).permutation(np.repeat(np.arange(4), (3, 7, 2, 12)))
    place = np.array([np.sum(domain[:i] == d) for i, d in enumerate(domain)])
    images = jnp.asarray(np.stack([domain * 100.0, place], axis=1)[:, None, :])  # says whose it is, and which one
    targets, rings = jax.nn.one_hot(np.arange(24), 24), set()
    for seed in range(12):
        mixed, mixed_targets = jax.jit(mixing.domain_mixup, static_argnums=4)(
            jax.random.key(seed), images, targets, jnp.asarray(domain), 4, 0.5
        )  # fmt: skip
        partner, weights = np.full(24, -1), np.asarray(mixed_targets)[np.arange(24), np.arange(24)]
        for i, row in enumerate(np.asarray(mixed_targets)):
            others = np.flatnonzero((row > 0) & (np.arange(24) != i))
            assert len(others) <= 1 and row.sum() == pytest.approx(1)
            partner[i] = others[0] if len(others) else -1
        found = {}
        for d in range(4):
            own = np.flatnonzero(domain == d)
            np.testing.assert_allclose(weights[own], weights[own[0]], rtol=1e-12)  # one weight
            if (partner[own] >= 0).all():
                (found[d],) = set(domain[partner[own]])
                size = np.sum(domain == found[d])
                np.testing.assert_array_equal(place[partner[own]], place[own] % size)
                w = weights[own][:, None]
                np.testing.assert_allclose(mixed[own, 0], w * images[own, 0] + (1 - w) * images[partner[own], 0])
        if len(found) == 4:
            rings.add(tuple(found[d] for d in range(4)))
            step, seen = 0, []
            for _ in range(4):
                seen.append(step := found[step])
            assert sorted(seen) == [0, 1, 2, 3]
    assert len(rings) > 1


@pytest.mark.slow
def test_all_views_are_mixed_alike_and_plain_mixup_is_as_before():
    mix = mixing.make_mix(0.0, 0.0, 0.3, 2)
    images, domain = jnp.arange(8.0)[:, None], jnp.array([0, 1, 1, 0, 1, 0, 0, 1])
    mixed, _ = mix(jax.random.key(1), {"a": images, "b": 2 * images}, images, domain)
    np.testing.assert_array_equal(2 * mixed["a"], mixed["b"])
    assert mixing.make_mix(0.0, 0.0) is None
    plain, _ = mixing.make_mix(0.4, 0.0)(jax.random.key(1), {"a": images}, images)
    _, key = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(plain["a"], mixing.mixup(key, images, images, 0.4)[0])
