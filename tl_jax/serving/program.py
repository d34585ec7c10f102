"""The programs of an exported network: StableHLO of a function of weights and inputs, for any batch on any platform."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from tl_jax.api.model import Model
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models.kernels import convolve
from tl_jax.runtime.sharding import OPTIONS

BATCHES = (1, 2, 4, 8, 16, 32)  # of the programs for one batch
PLATFORMS = {"cpu": ("cpu",), "accelerator": ("cuda", "tpu")}  # those that share a program
CHUNKS = "stablehlo.while"  # what computes a few images at a time, which a program for any batch cannot
Programs = dict[str, dict[str, bytes]]


def trace(network: Model) -> Programs:
    """{"cpu" | "accelerator": {"any" or a batch: a serialised jax.export.Exported}} of `network.answer`.

    The function takes (weights, inputs): {path: float32 array} of the leaves, and [B, *card.shape] of the type of the
    card's pixels, before normalisation, or tokens [B, T, 2] of any T. A CPU gets a program for a batch of its own where
    that one computes a few images at a time so that they stay in the cache (models/kernels/convolve.py).
    """
    network = dataclasses.replace(network, module=network.module.clone(attention="xla"))  # cuDNN's is of one machine
    return {platform: _of_platform(network, platform) for platform in PLATFORMS}


def _of_platform(network: Model, platform: str) -> dict[str, bytes]:
    leaves = {path: jax.ShapeDtypeStruct(x.shape, np.float32) for path, x in trees.flatten(network.variables).items()}

    def answer(leaves: Mapping[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        return network.answer(trees.unflatten(leaves), x)

    def exported(batch: Any) -> export.Exported:
        scope, text = export.SymbolicScope(), network.card.input == "text"
        batch = batch or export.symbolic_shape("b", scope=scope)[0]
        texts = "t" if network.card.texts == 1 else "2*t"
        length = export.symbolic_shape(texts, scope=scope) if text else ()  # of the tokens
        x = jax.ShapeDtypeStruct((batch, *length, *network.card.shape[len(length) :]), input_type(network.card))
        with convolve.traced_for(platform):
            return export.export(jax.jit(answer), platforms=PLATFORMS[platform])(leaves, x)

    programs = {"any": bytes(exported(None).serialize())}
    for batch in reversed(BATCHES) if platform == "cpu" and network.card.input == "image" else ():
        own = exported(batch)
        if batch == BATCHES[-1] and CHUNKS not in own.mlir_module():
            break  # the program for any batch computes the same
        programs[str(batch)] = bytes(own.serialize())
    return programs


def input_type(card: Card) -> np.dtype:
    """Of the inputs of a network, before normalisation."""
    if card.input == "text":
        return np.dtype(np.int32)
    return np.dtype(card.form.dtype if card.input == "image" else np.float32)


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], limit: float) -> list[str]:
    """A line for each output that is off by more than `limit` times the largest expected value."""
    wrong = []
    for name, values in expected.items():
        largest = np.abs(values).max()
        if not (error := np.abs(found[name] - values).max()) <= limit * largest:
            wrong.append(f"{name}: off by {error:.2g}, and the largest value is {largest:.2g}")
    return wrong


def compile_for(programs: Mapping[str, bytes], platform: str) -> Any:
    """(weights, inputs) -> outputs, which takes the program for the batch of the inputs, or that for any."""
    known = {batch: export.deserialize(bytearray(data)) for batch, data in programs.items()}
    calls = {batch: jax.jit(its.call, compiler_options=OPTIONS.get(platform)) for batch, its in known.items()}
    return lambda weights, x: calls.get(str(len(x)), calls["any"])(weights, x)
