"""MixStyle: the styles against numpy, at which cuts and when it acts, and what it does not go with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.models import peft
from tl_jax.models.mixstyle import mix_styles
from tl_jax.models.peft import Adapted
from tl_jax.models.resnet import ResNet
from tl_jax.models.vit import ViT
from tl_jax.runtime import sharding
from tl_jax.training import build

CIFAR = ResNet(num_classes=4, depths=(2, 1), widths=(4, 8), cifar=True, head_init="lecun")
VIT = ViT(num_classes=4, patch_size=8, width=24, depth=2, heads=3, image_size=24, head_init="lecun")
DOMAIN = np.array([2, 0, 0, 5, 2, 0, 0, 0, 5])


def draws(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def styles_of(x):
    """Mean and deviation of the channels of each example over its positions, float64."""
    rows = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    return rows.mean(1), np.sqrt(rows.var(1) + 1e-6)


@pytest.mark.thin(1)
@pytest.mark.parametrize("shape", [(9, 4, 5, 3), (9, 17, 3)])
@pytest.mark.parametrize("domain", [None, DOMAIN])
def test_each_example_gets_a_mixture_of_its_style_and_that_of_a_partner(shape, domain):
    x = draws(shape) * (1 + draws((9, *(1,) * (len(shape) - 2), 3), 1) ** 2) + 2
    mean, deviation = styles_of(x)
    partners, weights = [], []
    for seed in range(20):
        mixed = np.asarray(jax.jit(mix_styles)(x, jax.random.key(seed), 1.0, 0.3, domain), np.float64)
        new_mean, new_deviation = styles_of(mixed)
        for i in range(9):  # the partner is the one that explains mean and deviation by one weight
            errors = []
            for j in range(9):
                step = mean[i] - mean[j]
                w = 1.0 if i == j else float((new_mean[i] - mean[j]) @ step / (step @ step))
                expected = np.r_[w * mean[i] + (1 - w) * mean[j], w * deviation[i] + (1 - w) * deviation[j]]
                errors.append((np.abs(expected - np.r_[new_mean[i], new_deviation[i]]).max(), w))
            j = int(np.argmin([error for error, _ in errors]))
            assert errors[j][0] < 1e-4 and -1e-3 < errors[j][1] < 1 + 1e-3
            content = (np.asarray(x[i], np.float64) - mean[i]) / deviation[i]
            np.testing.assert_allclose((mixed[i] - new_mean[i]) / new_deviation[i], content, atol=1e-4)
            if 1e-3 < errors[j][1] < 0.999:
                partners.append((i, j))
                weights.append(errors[j][1])
    assert len(partners) > 80
    if domain is not None:
        assert all(domain[i] != domain[j] for i, j in partners)
        assert {j for i, j in partners if i == 0} > {1, 3}  # any example of any other domain
    else:
        assert any(DOMAIN[i] == DOMAIN[j] for i, j in partners)
    assert np.mean(weights) == pytest.approx(0.5, abs=0.15)


@pytest.mark.slow
def test_no_gradient_goes_through_the_statistics():
    x, upstream = draws((9, 4, 4, 3)), draws((9, 4, 4, 3), 2)
    key = jax.random.key(3)
    mixed, pull = jax.vjp(lambda x: mix_styles(x, key, 1.0, 0.5), x)
    _, deviation = styles_of(x)
    _, new = styles_of(mixed)
    scale = np.sqrt((new**2 - 1e-6) / (deviation**2 - 1e-6))
    np.testing.assert_allclose(pull(upstream)[0], upstream * scale[:, None, None], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_p_is_of_whole_batches_and_types_stay():
    x = draws((6, 4, 4, 3)).astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 300)
    mixed = jax.jit(jax.vmap(lambda key: mix_styles(x, key, 0.3, 0.5)))(keys)
    assert mixed.dtype == jnp.bfloat16
    same = np.asarray((mixed == x[None]).all(axis=(1, 2, 3, 4)))
    assert same.mean() == pytest.approx(0.7, abs=0.08)
    np.testing.assert_array_equal(jax.jit(mix_styles)(x, keys[0], 0.0, 0.5), x)


@pytest.mark.slow
def test_where_all_are_of_one_domain_the_partner_is_any_other():
    x = draws((6, 4, 4, 3))
    mixed = mix_styles(x, jax.random.key(1), 1.0, 0.5, jnp.zeros(6, jnp.int32))
    assert np.isfinite(mixed).all() and np.abs(mixed - x).max() > 0.01


@functools.cache
def variables_of(model):
    return jax.jit(model.init)(jax.random.key(0), draws((1, 24, 24, 3)))


CALL = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(4)}}
NEVER = {"p": 0.0}
ALWAYS = {"p": 1.0, "alpha": 0.5}
AFTER = {CIFAR: ("stem", "stage1/block0", "stage2"), VIT: ("stem", "block1")}


@pytest.mark.slow
@pytest.mark.parametrize("model", [CIFAR, VIT], ids=["resnet", "vit"])
def test_the_network_in_pieces_is_the_network_and_mixing_acts_behind_the_first_cut_in_training_alone(model):
    x, variables = draws((4, 24, 24, 3), 5), variables_of(model)
    plain, mixing = (Adapted(model, (("mixstyle", {**p, "after": AFTER[model]}),)) for p in (NEVER, ALWAYS))
    assert peft.init(model, variables, plain.additions, jax.random.key(0)) == {}
    expected, updates = jax.jit(functools.partial(model.apply, **CALL))(variables, x)
    found, ours = jax.jit(functools.partial(plain.apply, **CALL))(variables, x)
    assert found[1].keys() == expected[1].keys() and list(found[1]) == list(expected[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (found, ours), (expected, updates)
    )
    (_, out), _ = jax.jit(functools.partial(mixing.apply, **CALL))(variables, x)
    assert np.abs(out["stem"] - expected[1]["stem"]).max() > 0.01 and np.abs(out["logits"] - expected[0]).max() > 1e-4
    first = AFTER[model][0]
    stem = expected[1]["stem"]
    (_, behind), _ = jax.jit(functools.partial(mixing.apply, start="stem", **CALL))(variables, stem)
    np.testing.assert_allclose(behind[first], out[first], rtol=1e-4, atol=1e-5)  # what enters at a cut is mixed too
    np.testing.assert_allclose(behind["logits"], out["logits"], rtol=1e-3, atol=1e-4)
    last = AFTER[model][-1]
    (stopped, until), _ = jax.jit(functools.partial(mixing.apply, stop=last, **CALL))(variables, x)
    np.testing.assert_allclose(stopped, out[last], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(until[last], stopped)  # mixed once
    evaluated, unmixed = (str(jax.make_jaxpr(lambda v, m=m: m.apply(v, x)[0])(variables)) for m in (mixing, model))
    assert evaluated == unmixed


@pytest.mark.slow
def test_it_combines_with_lora_and_leaves_nothing_in_the_merged_weights():
    lora, style = ("lora", {"rank": 2, "targets": ".*/kernel"}), ("mixstyle", {"after": ("stage1",)})
    variables = variables_of(CIFAR)
    added = peft.init(CIFAR, variables, (style, lora), jax.random.key(0))
    assert set(added) == {"lora"}
    both = {**variables, "params": {**variables["params"], **added}}
    assert peft.can_merge((style, lora)) and not peft.can_merge((style, ("prompt", {})))
    merged = peft.merge(both, (style, lora))
    assert trees.flatten(merged).keys() == trees.flatten(variables).keys()
    x = draws((3, 24, 24, 3))
    logits = jax.jit(Adapted(CIFAR, (style, lora)).apply)(both, x)[0]
    np.testing.assert_allclose(logits, jax.jit(CIFAR.apply)(merged, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (
            CIFAR,
            {"after": ("stage3",)},
            r"after = 'stage3' \(did you mean 'stage\d'.*: expected of \('stem', 'stage1/block0'",
        ),
        (CIFAR, {"after": ()}, r"after = \(\)"),
        (VIT, {}, "'stage1'.*: expected of .*'block0'"),
    ],
)
def test_cuts_that_are_not_there_are_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        peft.init(model, {"params": {}}, (("mixstyle", given),), jax.random.key(0))


def test_cuts_without_positions_are_refused():
    message = r"after = 'pre_logits', whose output \(1, \d+\) has no positions"
    with pytest.raises(ValueError, match=message):
        built(**{"method.add": (("mixstyle", {"after": ("stage1", "pre_logits")}),), "method.name": "full"})


def built(**changes):
    return build.build(options.override(smoke.get_config(), changes), sharding.make_parallel())


def test_the_frozen_prefix_ends_at_the_first_cut_that_is_mixed():
    prefixes = [
        built(**{"method.name": "last_k", "method.k": 1, "model.head_init": "lecun", "method.add": add})
        .phases[0]
        .plan.prefix.cut
        for add in ((), (("mixstyle", {"after": ("stage2",)}),), (("mixstyle", {"after": ("stage2", "stem")}),))
    ]
    assert prefixes == ["stage2", "stage2", "stem"]


def test_partners_of_another_domain_need_several_domains():
    add = {"method.add": (("mixstyle", {"partner": "other_domain"}),), "method.name": "full"}
    with pytest.raises(ValueError, match=r"method.add: mixstyle with partner = 'other_domain' needs several domains"):
        built(**add)
    built(**add, **{"data.source": ("digits", "digits:inverted")})
