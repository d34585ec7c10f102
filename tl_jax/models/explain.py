"""Which parts of an image an output depends on: Grad-CAM of networks with maps, attention rollout of ViTs."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.models import vit


def is_vit(model: Any) -> bool:
    """Whether a network, with or without additions, is one whose attention can be rolled out."""
    return isinstance(getattr(model, "model", model), vit.ViT)


def map_cut(model: Any, variables: Mapping[str, Any], x: jax.Array) -> str:
    """The last cut that is a map [B, h, w, C]; ValueError where the network has none."""
    _, out = jax.eval_shape(lambda x: model.apply(variables, x, train=False), x)
    found = [name for name in model.cuts if name in out and out[name].ndim == 4]
    if not found:
        shapes = ", ".join(f"{name} {list(out[name].shape)}" for name in model.cuts if name in out)
        raise ValueError(f"Grad-CAM needs a cut that is a map [B, h, w, C]; the network has {shapes}")
    return found[-1]


def grad_cam(
    model: Any, variables: Mapping[str, Any], x: jax.Array, score: Callable[[Mapping[str, jax.Array]], jax.Array]
) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2) at the last map, float32 [B, h, w] >= 0.

    x: normalised images [B, H, W, C]. score: of the outputs of the network, one number for each example [B], such as
    the logit of a class. A channel counts by the mean of the score's gradient over the map; what lowers the score is 0.
    """
    cut = map_cut(model, variables, x)
    maps = model.apply(variables, x, train=False, stop=cut)[1][cut].astype(jnp.float32)

    def total(maps):
        return score(model.apply(variables, maps.astype(model.dtype), train=False, start=cut)[1]).sum()

    weights = jax.grad(total)(maps).mean(axis=(1, 2), keepdims=True)
    return jax.nn.relu((weights * maps).sum(axis=-1))


def attention_weights(model: Any, variables: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """softmax(q k^T / sqrt(D)) of every attention of a ViT, {path of the module: float32 [B, heads, N, N]}, in order.

    Of the attention that pools the tokens in place of a class token [B, heads, 1, N]. The network files know nothing of
    it: the outputs of the layers that project to q, k and v are taken as their modules are called.
    """
    heads, found = getattr(model, "model", model).heads, {}

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        *path, name = context.module.path or ("",)
        if name == "qkv" and context.method_name == "__call__":
            q, k, _ = (part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(y.astype(jnp.float32), 3, -1))
            q, k = (q[:, :1], k[:, 1:]) if "final" in path else (q, k)  # a query before the tokens that it reads
            found["/".join(path)] = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        return y

    with nn.intercept_methods(record):  # outermost, so that it sees what additions make of the outputs
        model.apply(variables, x, train=False)
    return found


def rollout(model: Any, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928, section 3), float32 [B, h, w] of the patches.

    The product over the blocks of half the attention, averaged over the heads, and half the identity for the residual
    branch: the row of the class token, or of the attention that pools. It is of no class. x: normalised images.
    """
    own, weights = getattr(model, "model", model), attention_weights(model, variables, x)
    pools = [path for path in weights if "final" in path.split("/")]
    blocks = [w.mean(axis=1) for path, w in weights.items() if path not in pools]
    rolled = same = jnp.broadcast_to(jnp.eye(blocks[0].shape[-1]), blocks[0].shape)
    for block in blocks:
        rolled = (0.5 * block + 0.5 * same) @ rolled
    row = (weights[pools[0]].mean(axis=1) @ rolled)[:, 0] if pools else rolled[:, 0]
    height, width = own.grid
    return row[:, -height * width :].reshape(-1, height, width)  # class token, registers and prompts come first
