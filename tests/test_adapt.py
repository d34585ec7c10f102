"""Added parameters: they start as the identity, compute what their papers say, merge exactly, and train alone."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.core import trees
from tl_jax.models import peft
from tl_jax.models.peft import Adapted
from tl_jax.models.resnet import ResNet
from tl_jax.models.vit import ViT

GROUPED = functools.partial(ResNet, depths=(1, 1), widths=(8, 16), bottleneck=True, groups=2)
CIFAR = functools.partial(ResNet, depths=(1, 1), widths=(16, 32), cifar=True)
VIT = functools.partial(ViT, patch_size=8, width=24, depth=2, heads=3, image_size=24)
EVERYWHERE = ("lora", {"rank": 2, "alpha": 6.0, "targets": ".*/kernel"})
SSF = ("ssf", {"targets": ".*/bias"})
ADAPTER = ("adapter", {"bottleneck": 5})
SHALLOW, DEEP = (("prompt", {"tokens": 4, "deep": deep}) for deep in (False, True))
KEY = jax.random.key(0)


def images(seed=0, batch=3):
    return np.random.default_rng(seed).standard_normal((batch, 24, 24, 3)).astype(np.float32)


def redrawn(tree, seed=0):
    """Random values of every leaf of a tree, so that nothing hides behind zeros and ones."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, leaf in trees.flatten(tree).items():
        value = rng.standard_normal(leaf.shape).astype(np.float32) * 0.2
        drawn[path] = 1 + np.abs(value) if path.endswith(("scale", "var")) else value
    return trees.unflatten(drawn)


@functools.cache
def variables_of(make):
    return redrawn(jax.eval_shape(make(num_classes=5).init, KEY, images()))


def plain_and_adapted(make, *additions, random=True, **fields):
    """(model, its variables, the adapted model, its variables), the added parameters redrawn or as they start."""
    model = make(num_classes=5, **fields)
    variables = variables_of(make)
    make_added = functools.partial(peft.init, model, variables, additions)
    added = redrawn(jax.eval_shape(make_added, KEY), seed=1) if random else jax.jit(make_added)(KEY)
    return model, variables, Adapted(model, additions), {**variables, "params": {**variables["params"], **added}}


def close(actual, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [pytest.param(VIT, id="vit", marks=pytest.mark.slow), pytest.param(GROUPED, id="resnet")]
)
def test_merged_weights_compute_what_the_adapted_network_computes(make):
    additions = (SSF, EVERYWHERE)  # strided, grouped and 1x1 convolutions, the patch embedding, dense layers, norms
    model, variables, adapted, both = plain_and_adapted(make, *additions)
    merged = peft.merge(both, additions)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, variables)
    plain = jax.jit(model.apply)
    logits, out = jax.jit(adapted.apply)(both, images())
    merged_logits, merged_out = plain(merged, images())
    assert np.abs(logits - plain(variables, images())[0]).max() > 0.01 * np.abs(logits).max()
    close(merged_logits, logits)
    jax.tree.map(close, merged_out, out)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("make", "additions", "train"),
    [(VIT, (EVERYWHERE, SSF, ADAPTER), False), (CIFAR, (EVERYWHERE, SSF), True)],
    ids=["vit", "resnet"],
)
def test_added_parameters_start_as_the_identity(make, additions, train):
    model, variables, adapted, both = plain_and_adapted(make, *additions, random=False)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(both["params"])} == {"float32"}
    mutable = ["batch_stats"] if train else False
    plain, ours = (jax.jit(functools.partial(m.apply, train=train, mutable=mutable)) for m in (model, adapted))
    jax.tree.map(functools.partial(close, tolerance=1e-6), ours(both, images()), plain(variables, images()))


def test_no_addition_is_the_model_itself_whatever_networks_lie_beside_it():
    model, variables, adapted, both = plain_and_adapted(CIFAR)
    further = {"teacher": variables["params"], "discriminator": {"head": {"kernel": np.ones((2, 3))}}}
    statistics = {**both["batch_stats"], "teacher": variables["batch_stats"]}
    both = {**both, "params": {**both["params"], **further}, "batch_stats": statistics}
    trace = jax.make_jaxpr(lambda v, x: adapted.apply(v, x)[0])(both, images())
    assert trace.eqns and str(trace.jaxpr.eqns) == str(
        jax.make_jaxpr(lambda v, x: model.apply(v, x)[0])(both, images()).jaxpr.eqns
    )
    merged = peft.merge(both, ())
    assert {kind: set(merged[kind]) for kind in merged} == {kind: set(variables[kind]) for kind in variables}


def test_lora_of_a_dense_layer_is_the_papers_formula():
    _, _, adapted, both = plain_and_adapted(VIT, ("lora", {"rank": 3, "alpha": 7.0, "targets": "head/kernel"}))
    params = {path: np.float64(leaf) for path, leaf in trees.flatten(both["params"]).items()}
    x = np.random.default_rng(2).standard_normal((6, 24))
    w, b = params["head/kernel"], params["head/bias"]
    expected = x @ w + b + 7.0 / 3 * x @ params["lora/head/a"] @ params["lora/head/b"]
    close(adapted.apply(both, x.astype(np.float32), start="pre_logits")[0], expected)


@pytest.mark.slow
def test_every_group_of_a_convolution_has_its_own_low_rank_update():
    _, variables, _, both = plain_and_adapted(GROUPED, EVERYWHERE)
    path = "backbone/stage2/block0/conv2"
    merged, old = (
        trees.flatten(tree["params"])[f"{path}/kernel"] for tree in (peft.merge(both, [EVERYWHERE]), variables)
    )
    a, b = (np.float64(trees.flatten(both["params"])[f"lora/{path}/{leaf}"]) for leaf in "ab")
    assert a.shape == (3, 3, 16, 2 * 2) and b.shape == (2, 32)
    expected = np.float64(old)
    for output in range(32):
        group = output // 16
        for rank in range(2):
            expected[..., output] += 6.0 / 2 * a[..., 2 * group + rank] * b[rank, output]
    close(merged, expected, 1e-6)


def vit_in_numpy(params, x, where=(), deep=False):
    """The adapted VIT above in float64: every output by name, from flat parameters."""
    p = {path: np.float64(leaf) for path, leaf in trees.flatten(params).items()}
    erf = np.vectorize(math.erf)

    def gelu(x):
        return x * (1 + erf(x / math.sqrt(2))) / 2

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def attn(x, name):
        q, k, v = np.moveaxis(dense(x, f"{name}/qkv").reshape(*x.shape[:2], 3, 3, 8), (2, 3), (0, 2))
        scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(8))
        y = scores / scores.sum(-1, keepdims=True) @ v
        return dense(y.swapaxes(1, 2).reshape(x.shape), f"{name}/proj")

    def mlp(x, name):
        return dense(gelu(dense(x, f"{name}/fc1")), f"{name}/fc2")

    def prompts(x, place, dropped):
        tokens = np.repeat(p[f"prompt/backbone/{place}/tokens"], len(x), 0)
        return np.concatenate([x[:, :1], tokens, x[:, 1 + dropped :]], 1)

    patches = x.reshape(-1, 3, 8, 3, 8, 3).swapaxes(2, 3).reshape(-1, 9, 8 * 8 * 3)
    kernel = p["backbone/stem/patch_embed/kernel"].reshape(8 * 8 * 3, 24)
    x = patches @ kernel + p["backbone/stem/patch_embed/bias"]
    x = np.concatenate([np.repeat(p["backbone/stem/cls_token"], len(x), 0), x], 1) + p["backbone/stem/pos_embed"]
    x = prompts(x, "stem", 0) if "prompt" in params else x
    out = {"stem": x}
    for i in range(2):
        x = prompts(x, f"block{i}", 4) if deep and i else x
        for branch, layer in (("attn", attn), ("mlp", mlp)):
            name = f"backbone/block{i}/{branch}"
            y = layer(norm(x, f"backbone/block{i}/norm{1 if branch == 'attn' else 2}"), name)
            if branch in where:
                y = y + dense(gelu(dense(y, f"adapter/{name}/down")), f"adapter/{name}/up")
            x = x + y
        out[f"block{i}"] = x
    out["pre_logits"] = norm(x[:, 0], "backbone/norm")
    return {**out, "embedding": out["pre_logits"], "logits": dense(out["pre_logits"], "head")}


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("additions", "reference"),
    [
        pytest.param((), {}, marks=pytest.mark.slow),
        ((ADAPTER,), {"where": ("attn", "mlp")}),
        ((("adapter", {"where": "mlp"}),), {"where": ("mlp",)}),
        ((SHALLOW,), {}),
        ((DEEP, ADAPTER), {"where": ("attn", "mlp"), "deep": True}),
    ],
    ids=["plain", "adapter", "adapter-mlp", "prompt", "prompt-deep-adapter"],
)
def test_adapters_and_prompts_compute_what_their_papers_say(additions, reference):
    _, _, adapted, both = plain_and_adapted(VIT, *additions)
    logits, out = adapted.apply(both, images())
    expected = vit_in_numpy(both["params"], np.float64(images()), **reference)
    assert list(out) == list(expected)
    for name, value in expected.items():
        close(out[name], value)
    np.testing.assert_array_equal(logits, out["logits"])


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("prompt", [SHALLOW, DEEP])
def test_deep_prompts_replace_what_the_block_before_made_of_its_prompts(prompt):
    _, _, adapted, both = plain_and_adapted(VIT, prompt)
    logits, out = adapted.apply(both, images())
    other = adapted.apply(both, out["block0"].at[:, 1:5].set(7.0), start="block0")[0]
    assert np.array_equal(other, logits) == (prompt == DEEP)


@pytest.mark.slow
def test_running_from_any_cut_gives_the_same_logits():
    _, _, adapted, both = plain_and_adapted(VIT, EVERYWHERE, SSF, ADAPTER, DEEP)
    logits, out = adapted.apply(both, images())
    for cut in adapted.cuts:
        close(adapted.apply(both, out[cut], start=cut)[0], logits, 1e-6)


@pytest.mark.slow
def test_tokens_of_the_network_without_prompts_are_refused():
    model, variables, adapted, both = plain_and_adapted(VIT, SHALLOW)
    plain = model.apply(variables, images())[1]["block0"]
    with pytest.raises(ValueError, match=r"start='block0' with 10 tokens, expected 14: the class token, 4 prompts, 9"):
        adapted.apply(both, plain, start="block0")


LORA = ("lora", {"rank": 2})
SOME = pytest.mark.parametrize(
    ("make", "additions"), [(VIT, (LORA, SSF, ADAPTER, DEEP)), (CIFAR, (LORA, SSF))], ids=["vit", "resnet"]
)


@pytest.mark.slow
@SOME
def test_every_added_parameter_trains_with_and_without_remat(make, additions):
    both = plain_and_adapted(make, *additions)[3]
    added = {name: both["params"][name] for name, _ in additions}

    @functools.partial(jax.jit, static_argnums=1)
    def step(added, remat):
        model = Adapted(make(num_classes=5), additions, stoch_norm=0.3).clone(drop_path=0.3, remat=remat)

        def loss(added):
            inputs = {**both, "params": {**both["params"], **added}}
            rngs = {"dropout": KEY}
            (logits, _), state = model.apply(inputs, images(), train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.sin(logits)), (logits, state)

        return jax.value_and_grad(loss, has_aux=True)(added)

    (_, outputs), gradient = step(added, "")
    for path, leaf in trees.flatten(gradient).items():
        assert np.abs(leaf).max() > 0, path
    (_, remat_outputs), remat_gradient = step(added, "block")
    jax.tree.map(close, remat_outputs, outputs)
    jax.tree.map(functools.partial(close, tolerance=1e-4), remat_gradient, gradient)


@SOME
def test_additions_compute_in_the_networks_precision_and_stay_float32(make, additions):
    adapted, both = plain_and_adapted(make, *additions, dtype=jnp.bfloat16)[2:]

    def loss(params):
        (logits, out), state = adapted.apply({**both, "params": params}, images(), train=True, mutable=["batch_stats"])
        return logits.sum(), (out, state)

    gradient, (out, state) = jax.eval_shape(jax.grad(loss, has_aux=True), both["params"])
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((gradient, state))} == {"float32"}
    precisions = {name: str(leaf.dtype) for name, leaf in out.items()}
    assert {precisions.pop(name) for name in ("pre_logits", "embedding", "logits")} == {"float32"}
    assert set(precisions.values()) == {"bfloat16"}


def test_bfloat16_is_near_float64():
    adapted, both = plain_and_adapted(VIT, DEEP, ADAPTER, dtype=jnp.bfloat16)[2:]
    expected = vit_in_numpy(both["params"], np.float64(images()), where=("attn", "mlp"), deep=True)
    close(jax.jit(adapted.apply)(both, images())[0], expected["logits"], 0.05)


def shapes_of_products(jaxpr):
    """The sorted shapes of all matrix products and convolutions of a traced function."""
    found = re.findall(r"f32\[([\d,]+)\] = (?:dot_general|conv_general_dilated)", str(jaxpr))
    return {tuple(sorted(map(int, shape.split(",")))) for shape in found}


@pytest.mark.parametrize(("make", "target"), [(VIT, "block1/attn/qkv"), (GROUPED, "stage2/block0/conv2")])
def test_lora_never_computes_a_gradient_of_the_size_of_the_kernel(make, target):
    addition = ("lora", {"rank": 2, "targets": f"backbone/{target}/kernel"})
    _, _, adapted, both = plain_and_adapted(make, addition)
    flat = trees.flatten(both["params"])

    def products(paths):
        def loss(trainable):
            return adapted.apply({**both, "params": trees.merge(flat, trainable)}, images())[0].sum()

        return shapes_of_products(jax.make_jaxpr(jax.grad(loss))({path: flat[path] for path in paths}))

    kernel, lora = f"backbone/{target}/kernel", [f"lora/backbone/{target}/{leaf}" for leaf in "ab"]
    size = tuple(sorted(flat[kernel].shape))
    assert size in products([kernel]) and size not in products(lora)


def test_default_targets_are_attention_or_3x3_convolutions():
    vit, resnet = (
        {
            path.rsplit("/", 1)[0]
            for path in trees.flatten(plain_and_adapted(make, ("lora", {"rank": 2}))[3]["params"]["lora"])
        }
        for make in (VIT, GROUPED)
    )
    assert vit == {f"backbone/block{i}/attn/{layer}" for i in range(2) for layer in ("qkv", "proj")}
    assert resnet == {f"backbone/stage{i}/block0/conv2" for i in (1, 2)}
    ssf = trees.flatten(plain_and_adapted(GROUPED, ("ssf", {}))[3]["params"]["ssf"])
    statistics = trees.flatten(variables_of(GROUPED)["batch_stats"])
    assert {path.rpartition("/")[0] for path in ssf} == {path.rpartition("/")[0] for path in statistics}


def test_a_draw_depends_on_the_key_and_its_own_path_alone():
    model, variables, *_ = plain_and_adapted(VIT)

    def draw(key, *additions):
        return trees.flatten(peft.init(model, variables, additions, key))

    some = draw(KEY, ("lora", {"targets": ".*/qkv/kernel"}))
    more = draw(KEY, DEEP, ("lora", {"targets": "backbone/block.*/kernel"}))
    for path, leaf in some.items():
        np.testing.assert_array_equal(leaf, more[path])
    first, second = (more[f"lora/backbone/block{i}/attn/qkv/a"] for i in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, draw(jax.random.key(1), EVERYWHERE)["lora/backbone/block0/attn/qkv/a"][:, :1])
    assert 0.9 < float(np.abs(first).max()) * math.sqrt(24) <= 1
    assert 0.8 < float(np.abs(more["prompt/backbone/stem/tokens"]).max()) / math.sqrt(6 / (3 * 64 + 24)) <= 1


def stem_norm(state):
    return state["batch_stats"]["backbone"]["stem"]["norm"]


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("remat", ["", "block"])
def test_stochastic_normalisation_draws_the_statistics_of_every_channel(remat):
    model, variables, _, _ = plain_and_adapted(CIFAR, remat=remat)

    def train(p, key=KEY, model=model):
        apply = jax.jit(functools.partial(Adapted(model, (), p).apply, train=True, mutable=["batch_stats"]))
        return apply(variables, images(), rngs={"dropout": key})

    (_, by_batch), state = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, images()
    )
    by_running = jax.jit(model.apply)(variables, images())[1]
    (_, off), off_state = train(0.0)
    (_, on), on_state = train(1.0)
    jax.tree.map(np.testing.assert_array_equal, (off, off_state), (by_batch, state))
    jax.tree.map(close, on, by_running)
    (_, out), mixed_state = train(0.5)
    for moved in (on_state, mixed_state):
        jax.tree.map(close, stem_norm(moved), stem_norm(state))
    assert not np.array_equal(stem_norm(on_state)["mean"], stem_norm(variables)["mean"])
    near = [np.abs(out["stem"] - other["stem"]).max((0, 1, 2)) < 1e-5 for other in (by_batch, by_running)]
    np.testing.assert_array_equal(near[0], ~near[1])
    assert 0 < near[0].sum() < 16
    jax.tree.map(np.testing.assert_array_equal, train(0.5)[0][1], out)
    assert not np.array_equal(train(0.5, jax.random.key(1))[0][1]["stem"], out["stem"])


def test_stochastic_normalisation_leaves_frozen_norms_and_evaluation_alone():
    model, variables, _, _ = plain_and_adapted(CIFAR)
    norms = tuple({path.rpartition("/")[0] for path in trees.flatten(variables["batch_stats"])})
    expected = model.clone(fold=False).apply(variables, images())[0]  # as it is where calls are intercepted
    stochastic = Adapted(model, (), 0.5)
    np.testing.assert_array_equal(stochastic.apply(variables, images())[0], expected)
    frozen = stochastic.clone(frozen_norms=norms)
    assert frozen.frozen_norms == norms and frozen.stoch_norm == 0.5
    np.testing.assert_array_equal(frozen.apply(variables, images(), train=True)[0], expected)


@pytest.mark.parametrize("p", [-0.1, 1.5, "half"])
def test_a_probability_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match=r"stoch_norm = .*: expected a probability"):
        Adapted(VIT(num_classes=5), (), p)


def test_all_that_is_wrong_with_additions_is_in_one_error():
    additions = [
        ("lroa", {}),
        ("lora", {"rnak": 4, "rank": 0, "alpha": -1.0, "targets": "("}),
        ("adapter", {"where": "attn", "bottleneck": 2.5}),
        ("prompt", {"deep": 1, "tokens": True}),
        ("prompt", {}),
    ]
    with pytest.raises(ValueError) as error:
        Adapted(VIT(num_classes=5), additions)
    for text in (
        "no addition 'lroa' (did you mean 'lora'?); known: lora, adapter, prompt, ssf",
        "lora has no parameter 'rnak' (did you mean 'rank'?)",
        "lora: rank = 0, expected an integer of at least 1",
        "lora: alpha = -1.0, expected a number above 0",
        "lora: targets = '(', expected a regular expression",
        "adapter: where = 'attn', expected one of both, mlp",
        "adapter: bottleneck = 2.5, expected an integer",
        "prompt: deep = 1, expected True or False",
        "prompt: tokens = True, expected an integer",
        "addition 'prompt' is given 2 times",
    ):
        assert text in str(error.value)


def test_additions_that_do_not_fit_the_network_are_refused_together():
    model, variables, *_ = plain_and_adapted(GROUPED)
    additions = [
        ("lora", {"rank": 9}),
        ("adapter", {}),
        ("prompt", {}),
        ("ssf", {"targets": "backbone/stem/norm/scale"}),
    ]
    with pytest.raises(ValueError) as error:
        peft.init(model, variables, additions, KEY)
    for text in (
        "lora rank = 9, but backbone/stage1/block0/conv2/kernel has 72 inputs and 8 outputs per group",
        "adapter needs a transformer, and this is a ResNet",
        "prompt needs a ViT, and this is a ResNet",
        "ssf targets = 'backbone/stem/norm/scale' match the whole path of none of the",
        "(did you mean 'backbone/stem/norm/bias'?)",
    ):
        assert text in str(error.value)
    with pytest.raises(
        ValueError, match=r"lora targets = 'attn' match the whole path of none of the .* kernel parameters"
    ):
        peft.init(model, variables, [("lora", {"targets": "attn"})], KEY)


def test_parameters_and_additions_of_different_kinds_are_refused():
    _, variables, adapted, both = plain_and_adapted(VIT, EVERYWHERE)
    with pytest.raises(ValueError, match=r"hold the additions \[\], the model is built with \['lora'\]"):
        adapted.apply(variables, images())
    with pytest.raises(ValueError, match=r"hold the additions \['lora'\], the model is built with \[\]"):
        Adapted(adapted.model).apply(both, images())


def test_what_no_plain_network_can_hold_is_not_merged():
    additions = (ADAPTER, SHALLOW, EVERYWHERE)
    both = plain_and_adapted(VIT, *additions)[3]
    with pytest.raises(ValueError, match="adapter and prompt cannot be merged"):
        peft.merge(both, additions)
    strange = {"params": {**variables_of(CIFAR)["params"], "lora": both["params"]["lora"]}}
    with pytest.raises(ValueError, match=r"has no layers \['backbone/block0/attn/proj'.* of another network"):
        peft.merge(strange, (EVERYWHERE,))
