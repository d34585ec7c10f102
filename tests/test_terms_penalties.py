"""Penalties on fine-tuning as terms, against numpy and PyTorch; DELTA and co-tuning have files of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from plans import make_card
from small_network import (
    CLASSES,
    WIDTHS,
    groups_of,
    initialised,
    make_context,
    make_params,
    make_start,
    make_task,
    one,
    squared,
    with_features,
)

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import precompute
from tl_jax.methods.penalties import PENALTIES
from tl_jax.methods.term import Context, Start
from tl_jax.models import peft
from tl_jax.training import steps, terms
from tl_jax.training.settings import read


def test_l2_sp_and_its_gradient_equal_the_formula():
    old, new = make_params(0), make_params(1)
    term = one("l2_sp", alpha=0.3, beta=0.02)
    extra, _ = initialised(term, make_start(old))
    assert trees.flatten(extra).keys() == {f"reference/{p}" for p in trees.flatten(old) if p.startswith("back")}
    assert set(groups_of(term, make_start(old)).values()) == {"frozen"}

    value, grads = jax.jit(jax.value_and_grad(lambda params: term.loss(make_context(params)).loss))({**new, **extra})
    w, w0, head = (trees.flatten(x) for x in (new["backbone"], old["backbone"], new["head"]))
    assert float(value) == pytest.approx(0.15 * squared(w, w0) + 0.01 * squared(head), rel=1e-5)
    for path, grad in trees.flatten(grads["backbone"]).items():
        np.testing.assert_allclose(grad, 0.3 * (np.float64(w[path]) - np.float64(w0[path])), rtol=1e-5, atol=1e-7)
    for path, grad in trees.flatten(grads["head"]).items():
        np.testing.assert_allclose(grad, 0.02 * np.float64(head[path]), rtol=1e-5)
    assert squared(trees.flatten(grads["reference"])) == 0


def test_l2_sp_passes_over_leaves_without_a_reference():
    old, new = make_params(0), make_params(1)
    term = one("l2_sp", alpha=2.0, beta=0.0)
    extra, _ = initialised(term, make_start(old))
    del extra["reference"]["backbone"]["block1"]
    blocks = [trees.flatten(x["backbone"]["block2"]) for x in (new, old)]
    assert float(term.loss(make_context({**new, **extra})).loss) == pytest.approx(squared(*blocks), rel=1e-5)


@pytest.mark.parametrize("name", ["l2_sp", "delta", "co_tuning"])
def test_further_networks_are_copies_that_survive_the_donation_of_the_network(name):
    params = make_params()
    head = {"kernel": jnp.ones((WIDTHS[1], 2)), "bias": jnp.zeros(2)}
    extra = initialised(one(name), make_start(params, head))
    for leaf in jax.tree.leaves((params, head)):
        leaf.delete()
    leaves = jax.tree.leaves(extra)
    assert leaves and all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


@pytest.mark.parametrize(("shape", "k"), [((6, 20), 1), ((6, 20), 3), ((20, 6), 2), ((7, 7), 7)])
def test_bss_and_its_gradient_equal_the_singular_value_decomposition(shape, k):
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    value, grad = jax.value_and_grad(lambda x: one("bss", eta=0.1, k=k).loss(with_features(x)).loss)(features)
    u, sigma, vt = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    assert float(value) == pytest.approx(0.1 * np.sum(sigma[-k:] ** 2), rel=1e-5)
    np.testing.assert_allclose(grad, 0.2 * (u[:, -k:] * sigma[-k:]) @ vt[-k:], atol=1e-5)


def test_bss_has_a_finite_gradient_where_singular_values_coincide():
    features = np.eye(4, 6, dtype=np.float32)
    grad = jax.grad(lambda x: one("bss", eta=1.0, k=2).loss(with_features(x)).loss)(features)
    assert np.linalg.norm(grad) == pytest.approx(2 * np.sqrt(2), rel=1e-5)  # 2 sigma for each of two unit values


def test_bss_of_a_batch_spread_over_devices_is_that_of_the_whole_batch():
    features = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spread = jax.device_put(features, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    value = jax.jit(lambda x: one("bss", eta=1.0).loss(with_features(x)).loss)(spread)
    assert float(value) == pytest.approx(np.linalg.svd(features, compute_uv=False)[-1] ** 2, rel=1e-5)


def test_a_sample_of_a_sorted_stream_is_uniform():
    labels = np.arange(1000)
    batches = [(labels[i : i + 64, None], labels[i : i + 64]) for i in range(0, 1000, 64)]
    images, kept = precompute.sample(batches, 200)
    assert len(set(kept.tolist())) == 200 and (images[:, 0] == kept).all()
    counts = np.histogram(kept, bins=10, range=(0, 1000))[0]
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    assert sorted(precompute.sample(batches, 5000)[1]) == list(labels)


def test_r_drop_is_the_symmetric_divergence_of_two_dropout_passes():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, CLASSES)))
    masks = []

    def dropped(params, key):
        masks.append(jax.random.bernoulli(key, 0.5, x.shape))
        return {"logits": (x * masks[-1]) @ params}

    def loss(params):
        def forward(network, of, *, train=False, stop=None, key=None):
            assert (network, of, train) == ("model", "train", True)
            return dropped(params, key), {"batch_stats": "other statistics"}

        blank = Context(*[None] * len(Context._fields))
        outputs = {"train": dropped(params, jax.random.key(2))}
        result = one("r_drop", alpha=0.9).loss(blank._replace(outputs=outputs, forward=forward, key=jax.random.key(3)))
        assert not result.batch_stats  # those of the second pass are discarded
        return result.loss

    value, grad = jax.value_and_grad(loss)(jnp.asarray(kernel))
    first, second = (np.asarray(mask) for mask in masks)
    assert (first != second).any()
    weights = torch.tensor(kernel, dtype=torch.float64, requires_grad=True)
    p, q = (torch.log_softmax(torch.tensor(np.float64(x * mask)) @ weights, dim=-1) for mask in (first, second))
    divergence = torch.nn.functional.kl_div
    both = [divergence(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))]
    reference = 0.9 * (both[0] + both[1]) / 2
    reference.backward()
    assert float(value) == pytest.approx(float(reference.detach()), rel=1e-5) and float(value) > 0.01
    np.testing.assert_allclose(grad, weights.grad.numpy(), atol=1e-5)


def test_l1_sums_the_chosen_parameters_and_never_the_reference():
    params = make_params()
    term = one("l1", alpha=0.5, paths=".*kernel")
    assert initialised(term, make_start(params)) == ({}, None)
    extra, _ = initialised(one("l2_sp"), make_start(params))
    value, grads = jax.value_and_grad(lambda params: term.loss(make_context(params)).loss)({**params, **extra})
    kernels = {path: np.float64(leaf) for path, leaf in trees.flatten(params).items() if path.endswith("kernel")}
    assert len(kernels) == 3
    assert float(value) == pytest.approx(0.5 * sum(np.abs(leaf).sum() for leaf in kernels.values()), rel=1e-5)
    for path, grad in trees.flatten(grads).items():
        np.testing.assert_allclose(grad, 0.5 * np.sign(kernels[path]) if path in kernels else 0 * grad)
    with pytest.raises(ValueError, match=r"'head/kernl' matches no parameter \(did you mean 'head/kernel'"):
        initialised(one("l1", paths="head/kernl"), make_start(params))


def test_every_wrong_name_and_value_is_in_one_error():
    given = {
        "l2sp": {},
        "bss": {"eta": -1.0, "k": 0, "kk": 1, "weight": ("ramp", {})},
        "delta": {"cuts": "stage4", "temperature": 0, "standardize": 1, "examples": 2.5},
        "co_tuning": {"approach": "bayes", "strength": float("nan")},
        "l1": {"paths": "(", "alpha": True},
        "r_drop": {"alfa": 0.1},
    }
    settings = read(smoke.get_config())
    phases = [phase._replace(terms=given) for phase in settings.phases]
    with pytest.raises(ValueError) as error:
        terms.make_terms(settings._replace(phases=phases))
    for line in (
        "there is no term 'l2sp' (did you mean 'l2_sp'?); known: task, l2_sp, delta, bss, co_tuning, r_drop, l1, kd",
        "bss: eta = -1.0, expected a number of at least 0",
        "bss: k = 0, expected an integer of at least 1",
        "bss has no parameter 'kk'",
        "terms.bss.weight: there is no schedule 'ramp'",
        "delta: cuts = 'stage4', expected a sequence of strings",
        "delta: temperature = 0, expected a number above 0",
        "delta: standardize = 1, expected True or False",
        "delta: examples = 2.5, expected an integer",
        "co_tuning: approach = 'bayes', expected one of reverse, direct",
        "co_tuning: strength = nan, expected a number",
        "l1: paths = '(', expected a regular expression",
        "l1: alpha = True, expected a number",
        "r_drop has no parameter 'alfa' (did you mean 'alpha'",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match=r"terms = {'r_drop': 0.3}: expected {name: {parameter: value}}"):
        options.check(options.override(smoke.get_config(), {"terms": {"r_drop": 0.3}}))
    with pytest.raises(ValueError, match=r"k=7: features \(6, 20\) have only 6 singular values"):
        one("bss", k=7).loss(with_features(np.ones((6, 20))))


CARD = make_card(CLASSES, std=(0.5,) * 3)


def start_of(module, size):
    """A real network at random, and its Start over ten random images."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, size, size, 3), np.uint8), np.arange(10, dtype=np.int32) % CLASSES
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    module = peft.Adapted(module)  # it finds its own among the variables of all networks

    def network(name, variables, x, start=None, stop=None):
        x = steps.normalise(x, CARD) if start is None else x
        return module.apply(steps.subtree(variables, name), x, train=False, start=start, stop=stop)[1]

    _, out = jax.eval_shape(lambda: module.apply(variables, jnp.zeros((1, size, size, 3)), train=False))
    shapes = {name: x.shape for name, x in out.items()}
    source_head = {"kernel": jax.random.normal(jax.random.key(1), (shapes["pre_logits"][-1], 7)), "bias": jnp.zeros(7)}
    return Start(
        {"batch_stats": {}, **variables}, None, make_task(), module, {}, shapes,
        lambda stream: iter([(images[:5], labels[:5]), (images[5:], labels[5:])]), network, None,
        lambda: source_head,
        jax.random.key(0),
    )  # fmt: skip


RESNET = lambda: models.get("resnet8_cifar").module(num_classes=CLASSES, dropout=0.5, head_init="lecun")  # noqa: E731


def small_vit():
    module = models.get("vit_tiny_patch16_224").module
    return module(num_classes=CLASSES, width=12, depth=1, heads=2, image_size=32, dropout=0.5, head_init="lecun")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_module", "cut", "channels"),
    [pytest.param(RESNET, "stage3", 64, marks=pytest.mark.slow), (small_vit, "block0", 12)],
)
def test_all_penalties_compose_on_a_real_network(make_module, cut, channels):
    start, names = start_of(make_module(), 32), tuple(PENALTIES)
    made = {name: one(name) for name in names}
    networks, memory = terms.initialise([{name: (None, term) for name, term in made.items()}], start, {})
    groups = {name: network.group for name, network in networks.items()}
    assert groups == {"reference": "frozen", "source_head": "head"}
    params = {**start.variables["params"], **{name: n.variables["params"] for name, n in networks.items()}}
    moving = {name: n.variables["batch_stats"] for name, n in networks.items() if "batch_stats" in n.variables}
    variables = {"params": params, "batch_stats": {**start.variables["batch_stats"], **moving}}
    for name in ("delta", "co_tuning"):
        now = start._replace(variables=variables, loaded=variables, memory=memory[name])
        memory[name] = made[name].refresh(now)
    weights = memory["delta"][cut]
    assert weights.shape == (channels,) and float(weights.sum()) == pytest.approx(1.0, rel=1e-5)
    assert float(weights.max()) > 1.1 * float(weights.min())
    images, labels = next(start.batches("train"))

    def penalties(params, train, names):
        x = steps.normalise(jnp.asarray(images, jnp.float32), CARD)

        def forward(network, of, *, train=False, stop=None, key=None):
            own = steps.subtree({**variables, "params": params}, network)
            (_, out), updates = start.model.apply(
                own, x, train=train, stop=stop, mutable=["batch_stats"], rngs={"dropout": key} if train else {}
            )
            return out, updates

        out, _ = forward("model", "train", train=train, key=jax.random.key(4))
        context = make_context(
            params, images, labels, outputs={"train": out}, batch_stats=variables["batch_stats"], forward=forward,
            key=jax.random.key(5),
        )  # fmt: skip
        values = {name: made[name].loss(context._replace(memory=memory.get(name))).loss for name in names}
        return sum(values.values()), values

    # Nothing has moved, so only the decay of the head is left of the two that hold on to the start.
    _, values = jax.jit(penalties, static_argnums=(1, 2))(params, False, ("l2_sp", "delta"))
    decay = 0.005 * squared(trees.flatten(params["head"]))
    assert float(values["l2_sp"]) == pytest.approx(decay, rel=1e-5)
    assert float(values["delta"]) == pytest.approx(decay, rel=1e-4)

    # A new block of a ResNet is the identity and passes no gradient to its convolutions: move away from it.
    moved = {p: leaf + (0.0 if p.startswith("reference/") else 0.1) for p, leaf in trees.flatten(params).items()}
    gradient = jax.jit(jax.grad(penalties, has_aux=True), static_argnums=(1, 2))
    grads, values = gradient(trees.unflatten(moved), True, names)
    assert min(float(value) for value in values.values()) > 0
    for path, grad in trees.flatten(grads).items():
        assert np.isfinite(grad).all() and np.any(grad) == (not path.startswith("reference/")), path
