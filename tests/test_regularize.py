"""Penalties on fine-tuning, against numpy, PyTorch and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import penalties as regularize
from tl_jax.methods import precompute, rules
from tl_jax.methods.penalties import Pass, Start
from tl_jax.runtime import sharding
from tl_jax.training import build, steps

WIDTHS = (5, 4)  # of the two blocks of the small network
CLASSES = 3


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    backbone = {
        "block1": {"kernel": rng.standard_normal((3, WIDTHS[0])) / 200},
        "block2": {"kernel": rng.standard_normal(WIDTHS), "bias": rng.standard_normal(WIDTHS[1]) / 4},
    }
    head = {"kernel": rng.standard_normal((WIDTHS[1], CLASSES)), "bias": rng.standard_normal(CLASSES)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"backbone": backbone, "head": head})


def apply(params, batch_stats, x, start=None):
    """Two pointwise layers, the mean over positions, a linear head."""
    backbone, out = params["backbone"], {}
    if start is None:
        x = out["block1"] = jnp.tanh(x @ backbone["block1"]["kernel"])
    if start != "block2":
        x = out["block2"] = jax.nn.relu(
            x @ backbone["block2"]["kernel"] + backbone["block2"]["bias"].reshape(1, 1, 1, -1)
        )
    out["pre_logits"] = x.mean(axis=(1, 2))
    out["logits"] = out["pre_logits"] @ params["head"]["kernel"] + params["head"]["bias"][None]
    return out["logits"], out


def forward(params, batch_stats, images, key, train=True):
    return *apply(params, batch_stats, images), batch_stats


def numpy_network(params, images, off=(None, None)):
    """The small network in float64 with one channel of one block switched off: (block1, block2, pre_logits)."""
    backbone = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["backbone"])
    first = np.tanh(images.astype(np.float64) @ backbone["block1"]["kernel"])
    if off[0] == "block1":
        first[..., off[1]] = 0
    second = np.maximum(first @ backbone["block2"]["kernel"] + backbone["block2"]["bias"], 0)
    if off[0] == "block2":
        second[..., off[1]] = 0
    return {"block1": first, "block2": second, "pre_logits": second.mean(axis=(1, 2))}


def make_data(size=50, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % CLASSES).astype(np.int32)
    centres = np.array([[40, 90, 200], [150, 60, 100], [220, 180, 30]])
    images = centres[labels][:, None, None] + rng.normal(0, 25, (size, 4, 4, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def make_start(params=None, source_head=None, data=None, num_classes=CLASSES):
    images, labels = data or make_data()
    params = params or make_params()
    cuts = range(0, len(labels), 20)
    return Start(
        params,
        {},
        source_head,
        apply,
        ("block1", "block2", "pre_logits"),
        lambda: iter([(images[i : i + 20], labels[i : i + 20]) for i in cuts]),
        num_classes,
    )


def make_pass(params, images=None, labels=None, key=7):
    images = jnp.asarray(make_data()[0][:6] if images is None else images, jnp.float32)
    labels = jnp.asarray(make_data()[1][:6] if labels is None else labels)
    logits, out = apply(params, {}, images)
    targets = jax.nn.one_hot(labels, CLASSES)
    return Pass(params, {}, images, targets, labels, logits, out, forward, jax.random.key(key))


def with_features(features):
    return Pass({}, {}, None, None, None, None, {"pre_logits": jnp.asarray(features, jnp.float32)}, forward, None)


def one(name, **parameters):
    return regularize.make([(name, parameters)])[0]


def groups_of(paths):
    """The rules that the trainer has for extra parameters, matched."""
    return trees.match_rules(paths, rules.beside(list(paths)))


def squared(tree, other=None):
    return sum(np.sum((np.float64(a) - (0 if other is None else np.float64(other[p]))) ** 2) for p, a in tree.items())


def test_l2_sp_and_its_gradient_equal_the_formula():
    old, new = make_params(0), make_params(1)
    penalty, init = one("l2_sp", alpha=0.3, beta=0.02)
    extra = init(make_start(old))
    assert trees.flatten(extra).keys() == {f"reference/params/{p}" for p in trees.flatten(old) if p.startswith("back")}
    assert {m.value for m in groups_of(trees.flatten(extra)).values()} == {"frozen"}

    value, grads = jax.jit(jax.value_and_grad(lambda params: penalty(make_pass(params))))({**new, **extra})
    w, w0, head = (trees.flatten(x) for x in (new["backbone"], old["backbone"], new["head"]))
    assert float(value) == pytest.approx(0.15 * squared(w, w0) + 0.01 * squared(head), rel=1e-5)
    for path, grad in trees.flatten(grads["backbone"]).items():
        np.testing.assert_allclose(grad, 0.3 * (np.float64(w[path]) - np.float64(w0[path])), rtol=1e-5, atol=1e-7)
    for path, grad in trees.flatten(grads["head"]).items():
        np.testing.assert_allclose(grad, 0.02 * np.float64(head[path]), rtol=1e-5)
    assert squared(trees.flatten(grads["reference"])) == 0


def test_l2_sp_passes_over_leaves_without_a_reference():
    old, new = make_params(0), make_params(1)
    penalty, init = one("l2_sp", alpha=2.0, beta=0.0)
    extra = init(make_start(old))
    del extra["reference"]["params"]["backbone"]["block1"]
    blocks = [trees.flatten(x["backbone"]["block2"]) for x in (new, old)]
    assert float(penalty(make_pass({**new, **extra}))) == pytest.approx(squared(*blocks), rel=1e-5)


@pytest.mark.parametrize("name", ["l2_sp", "delta", "co_tuning"])
def test_extra_parameters_are_copies_that_survive_the_donation_of_the_network(name):
    params = make_params()
    head = {"kernel": jnp.ones((WIDTHS[1], 2)), "bias": jnp.zeros(2)}
    extra = trees.flatten(one(name).init(make_start(params, head)))
    for leaf in jax.tree.leaves((params, head)):
        leaf.delete()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in extra.values())


@pytest.mark.parametrize(("shape", "k"), [((6, 20), 1), ((6, 20), 3), ((20, 6), 2), ((7, 7), 7)])
def test_bss_and_its_gradient_equal_the_singular_value_decomposition(shape, k):
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    value, grad = jax.value_and_grad(lambda x: one("bss", eta=0.1, k=k).penalty(with_features(x)))(features)
    u, sigma, vt = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    assert float(value) == pytest.approx(0.1 * np.sum(sigma[-k:] ** 2), rel=1e-5)
    np.testing.assert_allclose(grad, 0.2 * (u[:, -k:] * sigma[-k:]) @ vt[-k:], atol=1e-5)


def test_bss_has_a_finite_gradient_where_singular_values_coincide():
    features = np.eye(4, 6, dtype=np.float32)
    grad = jax.grad(lambda x: one("bss", eta=1.0, k=2).penalty(with_features(x)))(features)
    assert np.linalg.norm(grad) == pytest.approx(2 * np.sqrt(2), rel=1e-5)  # 2 sigma for each of two unit values


def test_bss_of_a_batch_spread_over_devices_is_that_of_the_whole_batch():
    features = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spread = jax.device_put(features, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    value = jax.jit(lambda x: one("bss", eta=1.0).penalty(with_features(x)))(spread)
    assert float(value) == pytest.approx(np.linalg.svd(features, compute_uv=False)[-1] ** 2, rel=1e-5)


def slow_increases(params, images, labels, cut, width):
    """The rise of the mean loss for each channel, one channel and one example at a time, in float64."""
    model = LogisticRegression(max_iter=10_000).fit(numpy_network(params, images)["pre_logits"], labels)

    def mean_loss(off):
        losses = []
        for image, label in zip(images, labels, strict=True):
            features = numpy_network(params, image[None], off)["pre_logits"]
            losses.append(-model.predict_log_proba(features)[0, label])
        return np.mean(losses)

    return np.array([mean_loss((cut, channel)) for channel in range(width)]) - mean_loss((None, None))


def test_delta_weighs_channels_by_what_the_loss_loses_without_them():
    params, (images, labels) = make_params(), make_data()
    reference = one("delta", cuts=("block1", "block2")).init(make_start(params))["reference"]
    plain = one("delta", cuts=["block1"], temperature=1, standardize=False).init(make_start(params))["reference"]
    for cut, width in zip(("block1", "block2"), WIDTHS, strict=True):
        rise = slow_increases(params, images, labels, cut, width)
        standard = (rise - rise.mean()) / rise.std()
        np.testing.assert_allclose(reference["delta"][cut], scipy.special.softmax(standard / 5), atol=1e-5)
        if cut == "block1":
            assert rise.std() > 0.05  # the channels do differ, or the comparison says nothing
            np.testing.assert_allclose(plain["delta"][cut], scipy.special.softmax(rise), atol=1e-5)


def test_delta_distance_and_gradient_equal_a_slow_loop():
    torch = pytest.importorskip("torch")
    old, new, images = make_params(0), make_params(1), make_data()[0][:6]
    penalty, init = one("delta", alpha=0.7, beta=0.1, cuts=("block1", "block2"))
    extra = init(make_start(old))
    assert {m.value for m in groups_of(trees.flatten(extra)).values()} == {"frozen"}
    value, grads = jax.jit(jax.value_and_grad(lambda params: penalty(make_pass(params, images))))({**new, **extra})

    weights = {cut: torch.tensor(np.asarray(w, np.float64)) for cut, w in extra["reference"]["delta"].items()}
    leaves = {p: torch.tensor(np.asarray(w, np.float64), requires_grad=True) for p, w in trees.flatten(new).items()}
    first = torch.tanh(torch.tensor(images, dtype=torch.float64) @ leaves["backbone/block1/kernel"])
    now = {
        "block1": first,
        "block2": torch.relu(first @ leaves["backbone/block2/kernel"] + leaves["backbone/block2/bias"]),
    }
    start, total = numpy_network(old, images), 0.0
    for cut, width in zip(("block1", "block2"), WIDTHS, strict=True):
        for example in range(6):
            for channel in range(width):
                gap = now[cut][example, :, :, channel] - torch.tensor(start[cut][example, :, :, channel])
                total = total + 0.35 * width * weights[cut][channel] * (gap**2).sum() / (16 * 6)
    total = total + 0.05 * sum((leaves[f"head/{name}"] ** 2).sum() for name in ("kernel", "bias"))
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(trees.flatten(grads)[path], leaf.grad.numpy(), rtol=1e-4, atol=1e-4)
    assert squared(trees.flatten(grads["reference"])) == 0


def test_delta_takes_the_last_stage_of_every_resnet_and_the_last_block_of_every_vit():
    for name, variant in models.MODELS.items():
        model = variant.module(num_classes=2)
        last = f"block{model.depth - 1}" if hasattr(model, "depth") else f"stage{len(model.depths)}"
        assert precompute._choose_cuts(model.cuts, ()) == [last], name


def test_the_default_cut_of_delta_in_a_run_is_the_last_stage():
    """Of a network with two blocks a stage, of which stage3/block0 has more digits in its name."""
    config = options.override(smoke.get_config(), {
        "model.name": "resnet14_cifar", "model.weights": "", "model.image_size": 8, "method.name": "full",
        "method.regularize": (("delta", {"examples": 8}),),
    })  # fmt: skip
    run = build.build(config, sharding.make_parallel())
    assert run.variables["params"]["reference"]["delta"].keys() == {"stage3"}


def test_delta_refuses_cuts_that_the_network_has_not():
    assert one("delta").init(make_start())["reference"]["delta"].keys() == {"block2"}
    with pytest.raises(ValueError, match=r"no \['blok2'\] \(did you mean 'block2'\?\); .*\['block1', 'block2'\]"):
        one("delta", cuts=("blok2",)).init(make_start())
    with pytest.raises(ValueError, match=r"no \['logits'\]"):
        one("delta", cuts=("logits",)).init(make_start())


def test_delta_compares_only_the_cuts_it_was_given():
    extra = one("delta", cuts=("block1", "block2")).init(make_start(make_params(0)))
    run = make_pass({**make_params(1), **extra})
    both, first, second = (
        float(one("delta", beta=0, cuts=cuts).penalty(run)) for cuts in ((), ("block1",), ("block2",))
    )
    assert both == pytest.approx(first + second, rel=1e-5) and min(first, second) > 0


def test_the_reference_of_delta_has_added_parameters_at_their_start():
    old, new = ({**make_params(0), "lora": {"a": jnp.full((2,), value)}} for value in (1.0, 3.0))
    penalty, init = one("delta", alpha=1, beta=0)
    extra = init(make_start({**old, "source_head": {"bias": jnp.zeros(2)}}))
    assert extra["reference"]["params"].keys() == {"backbone", "lora"}

    def added(params, batch_stats, images, key, train=True):
        return 0.0, {"block2": apply(params, {}, images)[1]["block2"] + params["lora"]["a"].sum()}, batch_stats

    run = make_pass({**new, "backbone": old["backbone"], **extra})._replace(forward=added)
    run = run._replace(out=added(run.params, {}, run.images, None)[1])
    assert float(penalty(run)) == pytest.approx(0.5 * WIDTHS[1] * 4.0**2, rel=1e-5)  # 2 * (3 - 1) in every channel


def test_a_sample_of_a_sorted_stream_is_uniform():
    labels = np.arange(1000)
    batches = [(labels[i : i + 64, None], labels[i : i + 64]) for i in range(0, 1000, 64)]
    images, kept = precompute._sample(batches, 200)
    assert len(set(kept.tolist())) == 200 and (images[:, 0] == kept).all()
    counts = np.histogram(kept, bins=10, range=(0, 1000))[0]
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    assert sorted(precompute._sample(batches, 5000)[1]) == list(labels)


def source_task(size=90, sources=6, seed=3):
    """A start whose source head has `sources` classes, and its probabilities in float64."""
    rng = np.random.default_rng(seed)
    head = {"kernel": 3 * rng.standard_normal((WIDTHS[1], sources)), "bias": rng.standard_normal(sources)}
    head = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), head)
    images, labels = make_data(size)
    logits = numpy_network(make_params(), images)["pre_logits"] @ np.float64(head["kernel"]) + np.float64(head["bias"])
    return make_start(source_head=head, data=(images, labels)), logits, labels


def fit_by_scipy(probabilities, labels, strength):
    """Multinomial logistic regression without intercept, 1/2 ||w||^2 + C * summed loss, to high accuracy."""
    onehot, shape = np.eye(CLASSES)[labels], (probabilities.shape[1], CLASSES)

    def objective(flat):
        w = flat.reshape(shape)
        log_p = scipy.special.log_softmax(probabilities @ w, axis=1)
        value = 0.5 * (w**2).sum() - strength * (onehot * log_p).sum()
        return value, (w + strength * probabilities.T @ (np.exp(log_p) - onehot)).ravel()

    options = {"maxiter": 20_000, "maxfun": 20_000, "gtol": 1e-9, "ftol": 1e-15}
    found = scipy.optimize.minimize(objective, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(shape)


def test_co_tuning_inverts_a_fitted_p_of_target_given_source():
    start, logits, labels = source_task()
    rows = np.asarray(one("co_tuning", temperature=2).init(start)["reference"]["co_tuning"]["relationship"])
    probabilities = scipy.special.softmax(logits / 2, axis=1)

    def held_out(fit, test, strength):
        weights = fit_by_scipy(probabilities[fit], labels[fit], strength)
        log_p = scipy.special.log_softmax(probabilities[test] @ weights, axis=1)
        return -log_p[np.arange(len(test)), labels[test]].mean()

    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(probabilities, labels))
    log_losses = {c: np.mean([held_out(*fold, c) for fold in folds]) for c in (1.0, 10.0, 100.0, 1e3, 1e4)}
    best = min(log_losses, key=log_losses.get)
    target_given_source = scipy.special.softmax(fit_by_scipy(probabilities, labels, best), axis=1)
    expected = np.zeros((CLASSES, 6))
    for target in range(CLASSES):
        for source in range(6):
            expected[target, source] = target_given_source[source, target] * probabilities[:, source].mean()
        expected[target] /= expected[target].sum()
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rows, expected, atol=2e-3)  # as near as scikit-learn stops to its optimum
    assert np.abs(rows - rows[0]).max() > 0.2


def test_co_tuning_direct_averages_the_probabilities_of_each_class():
    start, logits, labels = source_task()
    extra = one("co_tuning", approach="direct").init(start._replace(num_classes=CLASSES + 1))
    rows = np.asarray(extra["reference"]["co_tuning"]["relationship"])
    probabilities = scipy.special.softmax(logits, axis=1)
    for target in range(CLASSES):
        np.testing.assert_allclose(rows[target], probabilities[labels == target].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(rows[CLASSES], probabilities.mean(axis=0), atol=1e-5)  # no example of this class
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1], [0, 2, 0, 2, 2]])
def test_co_tuning_bears_single_examples_and_missing_classes(labels):
    start, _, _ = source_task()
    images = make_data()[0][:5]
    start = start._replace(batches=lambda: iter([(images, np.array(labels))]))
    rows = one("co_tuning", examples=2).init(start)["reference"]["co_tuning"]["relationship"]
    assert rows.shape == (CLASSES, 6) and np.isfinite(rows).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)


def test_co_tuning_loss_and_gradient_equal_pytorch():
    torch = pytest.importorskip("torch")
    start, _, _ = source_task()
    penalty, init = one("co_tuning", strength=1.7)
    extra, params = init(start), make_params(1)
    groups = {path: match.value for path, match in groups_of(trees.flatten(extra)).items()}
    assert groups == {
        "reference/co_tuning/relationship": "frozen",
        "source_head/bias": "head",
        "source_head/kernel": "head",
    }
    images, labels = make_data(seed=5)
    run = make_pass({**params, **extra}, images, labels)
    mixed = 0.7 * run.targets + 0.3 * run.targets[::-1]

    def loss(head):
        return penalty(run._replace(params={**run.params, "source_head": head}, targets=mixed))

    value, grads = jax.jit(jax.value_and_grad(loss))(extra["source_head"])
    head = {name: torch.tensor(np.float64(leaf), requires_grad=True) for name, leaf in extra["source_head"].items()}
    features = torch.tensor(numpy_network(params, images)["pre_logits"])
    goal = torch.tensor(np.float64(mixed)) @ torch.tensor(np.float64(extra["reference"]["co_tuning"]["relationship"]))
    reference = 1.7 * torch.nn.functional.cross_entropy(features @ head["kernel"] + head["bias"], goal)
    reference.backward()
    assert float(value) == pytest.approx(float(reference.detach()), rel=1e-5)
    for name in head:
        np.testing.assert_allclose(grads[name], head[name].grad.numpy(), atol=1e-5)


def test_co_tuning_names_what_is_missing():
    with pytest.raises(ValueError, match="a file without its head"):
        one("co_tuning").init(make_start())
    with pytest.raises(ValueError, match="takes 9 features, but the network has 4"):
        one("co_tuning").init(make_start(source_head={"kernel": jnp.ones((9, 2)), "bias": jnp.zeros(2)}))


def test_r_drop_is_the_symmetric_divergence_of_two_dropout_passes():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, CLASSES)))
    masks = []

    def dropout_forward(params, batch_stats, images, key, train=True):
        assert train
        masks.append(jax.random.bernoulli(key, 0.5, images.shape))
        return (images * masks[-1]) @ params, {}, "other statistics"

    def loss(params):
        key = jax.random.key(3)
        logits, out, _ = dropout_forward(params, {}, jnp.asarray(x), key)
        run = Pass(params, {}, jnp.asarray(x), None, None, logits, out, dropout_forward, key)
        return one("r_drop", alpha=0.9).penalty(run)

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
    penalty, init = one("l1", alpha=0.5, paths=".*kernel")
    assert init(make_start(params)) == {}
    extra = one("l2_sp").init(make_start(params))
    value, grads = jax.value_and_grad(lambda params: penalty(make_pass(params)))({**params, **extra})
    kernels = {path: np.float64(leaf) for path, leaf in trees.flatten(params).items() if path.endswith("kernel")}
    assert len(kernels) == 3
    assert float(value) == pytest.approx(0.5 * sum(np.abs(leaf).sum() for leaf in kernels.values()), rel=1e-5)
    for path, grad in trees.flatten(grads).items():
        np.testing.assert_allclose(grad, 0.5 * np.sign(kernels[path]) if path in kernels else 0 * grad)
    with pytest.raises(ValueError, match=r"'head/kernl' matches no parameter \(did you mean 'head/kernel'"):
        one("l1", paths="head/kernl").init(make_start(params))


def test_every_wrong_name_and_value_is_in_one_error():
    pairs = [
        ("l2sp", {}),
        ("bss", {"eta": -1.0, "k": 0, "kk": 1}),
        ("delta", {"cuts": "stage4", "temperature": 0, "standardize": 1, "examples": 2.5}),
        ("co_tuning", {"approach": "bayes", "strength": float("nan")}),
        ("l1", {"paths": "(", "alpha": True}),
        ("r_drop", 0.3),
        ("r_drop", {}),
        "l1",
        (),
    ]
    with pytest.raises(ValueError) as error:
        regularize.make(pairs)
    for line in (
        "there is no penalty 'l2sp' (did you mean 'l2_sp'?); known: l2_sp, delta, bss, co_tuning, r_drop, l1",
        "bss: eta=-1.0 is not a number >= 0",
        "bss: k=0 is not a whole number >= 1",
        "bss has no parameter 'kk'",
        "delta: cuts='stage4' is not a sequence of names",
        "delta: temperature=0 is not a number > 0",
        "delta: standardize=1 is not True or False",
        "delta: examples=2.5 is not a whole number",
        "co_tuning: approach='bayes' is not 'reverse' or 'direct'",
        "co_tuning: strength=nan is not a number",
        "l1: paths='(' is not a regular expression",
        "l1: alpha=True is not a number",
        "r_drop: 0.3 is not a dict",
        "'r_drop' is given 2 times",
        "'l1' is not a pair",
        "() is not a pair",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match=r"'alfa' .did you mean 'alpha'"):
        regularize.make([("l2_sp", {"alfa": 0.1})])
    with pytest.raises(ValueError, match=r"k=7: features \(6, 20\) have only 6 singular values"):
        one("bss", k=7).penalty(with_features(np.ones((6, 20))))


def start_of(module, size):
    """A real network at random, its Start over ten random images, and `forward` as the train step has it."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, size, size, 3), np.uint8), np.arange(10, dtype=np.int32) % CLASSES
    mean = std = (0.5, 0.5, 0.5)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))

    def network(params, batch_stats, x, start=None):
        x = steps.normalise(x, mean, std) if start is None else x
        return module.apply({"params": params, "batch_stats": batch_stats}, x, train=False, start=start)

    def train_forward(params, batch_stats, x, key, train=True):
        variables = {"params": params, "batch_stats": batch_stats}
        rngs, x = {"dropout": key}, steps.normalise(x, mean, std)
        (logits, out), updates = module.apply(variables, x, train=train, mutable=["batch_stats"], rngs=rngs)
        return logits, out, updates.get("batch_stats", batch_stats)

    width = variables["params"]["head"]["kernel"].shape[0]
    source_head = {"kernel": jax.random.normal(jax.random.key(1), (width, 7)), "bias": jnp.zeros(7)}
    stats = variables.get("batch_stats", {})
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    start = Start(
        variables["params"], stats, source_head, network, module.cuts, lambda: iter(batches), CLASSES
    )  # fmt: skip
    return start, train_forward


RESNET = lambda: models.get("resnet8_cifar").module(num_classes=CLASSES, dropout=0.5, head_init="lecun")  # noqa: E731


def small_vit():
    module = models.get("vit_tiny_patch16_224").module
    return module(num_classes=CLASSES, width=12, depth=1, heads=2, image_size=32, dropout=0.5, head_init="lecun")


@pytest.mark.parametrize(
    ("make_module", "cut", "channels"),
    [(RESNET, "stage3", 64), pytest.param(small_vit, "block0", 12, marks=pytest.mark.slow)],
)
def test_all_penalties_compose_on_a_real_network(make_module, cut, channels):
    start, forward = start_of(make_module(), 32)
    pairs = [("l2_sp", {}), ("delta", {}), ("bss", {}), ("co_tuning", {}), ("r_drop", {}), ("l1", {})]
    made = dict(zip(dict(pairs), regularize.make(pairs), strict=True))
    flat = {p: x for r in made.values() for p, x in trees.flatten(r.init(start)).items()}
    groups = {p: match.value for p, match in groups_of(flat).items()}
    assert {p for p, group in groups.items() if group == "head"} == {"source_head/kernel", "source_head/bias"}
    weights = flat[f"reference/delta/{cut}"]
    assert weights.shape == (channels,) and float(weights.sum()) == pytest.approx(1.0, rel=1e-5)
    assert float(weights.max()) > 1.1 * float(weights.min())
    params = {**start.params, **trees.unflatten(flat)}
    images, labels = next(start.batches())

    def penalties(params, train, names):
        images_, key = jnp.asarray(images, jnp.float32), jax.random.key(4)
        logits, out, _ = forward(params, start.batch_stats, images_, key, train)
        targets = jax.nn.one_hot(labels, CLASSES)
        run = Pass(params, start.batch_stats, images_, targets, jnp.asarray(labels), logits, out, forward, key)
        values = {name: made[name].penalty(run) for name in names}
        return sum(values.values()), values

    # Nothing has moved, so only the decay of the head is left of the two that hold on to the start.
    _, values = jax.jit(penalties, static_argnums=(1, 2))(params, False, ("l2_sp", "delta"))
    decay = 0.005 * squared(trees.flatten(start.params["head"]))
    assert float(values["l2_sp"]) == pytest.approx(decay, rel=1e-5)
    assert float(values["delta"]) == pytest.approx(decay, rel=1e-4)

    # A new block of a ResNet is the identity and passes no gradient to its convolutions: move away from it.
    moved = {p: leaf + (0.0 if p.startswith("reference/") else 0.1) for p, leaf in trees.flatten(params).items()}
    gradient = jax.jit(jax.grad(penalties, has_aux=True), static_argnums=(1, 2))
    grads, values = gradient(trees.unflatten(moved), True, tuple(made))
    assert min(float(value) for value in values.values()) > 0
    for path, grad in trees.flatten(grads).items():
        assert np.isfinite(grad).all() and np.any(grad) == (not path.startswith("reference/")), path
