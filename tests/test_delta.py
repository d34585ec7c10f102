"""DELTA (Li et al. 2019) as a term: what channels weigh, distance and gradient, against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.linear_model import LogisticRegression
from small_network import (
    WIDTHS,
    apply,
    begun,
    groups_of,
    initialised,
    make_context,
    make_data,
    make_params,
    make_start,
    numpy_network,
    one,
    squared,
)

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import precompute
from tl_jax.runtime import sharding
from tl_jax.training import build


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
    _, memory = begun(one("delta", cuts=("block1", "block2")), make_start(params))
    _, plain = begun(one("delta", cuts=("block1",), temperature=1, standardize=False), make_start(params))
    for cut, width in zip(("block1", "block2"), WIDTHS, strict=True):
        rise = slow_increases(params, images, labels, cut, width)
        standard = (rise - rise.mean()) / rise.std()
        np.testing.assert_allclose(memory[cut], scipy.special.softmax(standard / 5), atol=1e-5)
        if cut == "block1":
            assert rise.std() > 0.05  # the channels do differ, or the comparison says nothing
            np.testing.assert_allclose(plain[cut], scipy.special.softmax(rise), atol=1e-5)


def test_delta_distance_and_gradient_equal_a_slow_loop():
    torch = pytest.importorskip("torch")
    old, new, images = make_params(0), make_params(1), make_data()[0][:6]
    term = one("delta", alpha=0.7, beta=0.1, cuts=("block1", "block2"))
    extra, memory = begun(term, make_start(old))
    assert set(groups_of(term, make_start(old)).values()) == {"frozen"}

    def loss(params):
        return term.loss(make_context(params, images, memory=memory)).loss

    value, grads = jax.jit(jax.value_and_grad(loss))({**new, **extra})
    weights = {cut: torch.tensor(np.asarray(w, np.float64)) for cut, w in memory.items()}
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


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet50", "stage4"),
        ("resnet20_cifar", "stage3"),
        ("vit_tiny_patch16_224", "block11"),
        ("vgg16", "stage5"),
        ("convnext_tiny", "stage4"),
        ("densenet121", "norm"),  # the last map has its norm behind the last block
        ("mobilenetv2_100", "final"),  # and a last convolution
    ],
)
def test_delta_takes_the_last_map_of_a_network(name, last):
    assert precompute.choose_cuts(models.get(name).module(num_classes=2).cuts, ()) == [last]


@pytest.mark.slow
def test_the_default_cut_of_delta_in_a_run_is_the_last_stage():
    """Of a network with two blocks a stage, of which stage3/block0 has more digits in its name."""
    config = options.override(smoke.get_config(), {
        "model.name": "resnet14_cifar", "model.weights": "", "model.image_size": 8, "method.name": "full",
        "terms": {"delta": {"examples": 8}},
    })  # fmt: skip
    run = build.build(config, sharding.make_parallel())
    assert run.material.memory["delta"].keys() == {"stage3"}


def test_delta_refuses_cuts_that_the_network_has_not():
    assert initialised(one("delta"), make_start())[1].keys() == {"block2"}
    with pytest.raises(ValueError, match=r"no \['blok2'\] \(did you mean 'block2'\?\); .*\['block1', 'block2'\]"):
        initialised(one("delta", cuts=("blok2",)), make_start())
    with pytest.raises(ValueError, match=r"no \['logits'\]"):
        initialised(one("delta", cuts=("logits",)), make_start())


def test_delta_compares_only_the_cuts_it_was_given():
    values = []
    for cuts in (("block1", "block2"), ("block1",), ("block2",)):
        term = one("delta", beta=0.0, cuts=cuts)
        extra, memory = begun(term, make_start(make_params(0)))
        values.append(float(term.loss(make_context({**make_params(1), **extra}, memory=memory)).loss))
    both, first, second = values
    assert both == pytest.approx(first + second, rel=1e-5) and min(first, second) > 0


def test_the_reference_of_delta_has_added_parameters_at_their_start():
    old, new = ({**make_params(0), "lora": {"a": jnp.full((2,), value)}} for value in (1.0, 3.0))
    term = one("delta", alpha=1.0, beta=0.0)
    extra, memory = begun(term, make_start(old))
    assert extra["reference"].keys() == {"backbone", "lora"}

    def added(params, images):
        return {"block2": apply(params, images)["block2"] + params["lora"]["a"].sum()}

    params, images = {**new, "backbone": old["backbone"], **extra}, jnp.asarray(make_data()[0][:6], jnp.float32)
    context = make_context(
        params, memory=memory, outputs={"train": added(params, images)},
        forward=lambda network, of, **_: (added(params[network], images), {}),
    )  # fmt: skip
    # 2 * (3 - 1) in every channel
    assert float(term.loss(context).loss) == pytest.approx(0.5 * WIDTHS[1] * 4.0**2, rel=1e-5)
