"""A network of torch's libraries and ours with the same weights give the same numbers, forwards and backwards."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch_reference
from test_pretrained import close

from tl_jax.core import trees
from tl_jax.models import conversion
from tl_jax.weights import formats, load


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, x):
    """(logits, out) of a network of ours, which is traced once for all of its files."""
    return model.apply(variables, x)


def images(height, width=0, batch=1, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width or height, 3)).astype(np.float32)


def check_forward(model, modules, name, path, x, layout, **given):
    """The file at `path` gives the logits of `model` and the outputs of its `modules`, by cut; returns what loaded."""
    expected, features = torch_reference.record(model, modules, x)
    loaded = load.load(name, path, **given)
    assert loaded.layout == layout and "new" not in loaded.origins.values()
    logits, out = run(loaded.model, loaded.variables, x)
    close(logits, expected)
    assert set(features) == set(modules)
    for key, value in features.items():
        close(out[key], value)
    return loaded


def check_export(loaded, twin, x, folder, read=None):
    """`twin`, of other weights, loads our file strictly and gives our logits; read: its keys from those of the file."""
    path = folder / "exported.safetensors"
    variables = jax.tree.map(lambda leaf: leaf * 1.01, loaded.variables)  # as if fine-tuned
    load.export(variables, loaded.card.model, path, card=loaded.card, layout=loaded.layout)
    tensors = {key: torch_reference.torch.from_numpy(np.array(x)) for key, x in formats.read(path)[0].items()}
    twin.load_state_dict(read(tensors) if read else tensors, strict=True)
    close(run(loaded.model, variables, x)[0], torch_reference.record(twin.eval(), {}, x)[0])


def check_gradient(loaded, model, x, names=lambda key: key):
    """The gradient of a function of the logits in training mode equals torch's, each leaf to 1e-3 of its largest value.

    names: of the parameter of `model` that the table calls `key`.
    """
    table, found = load.models.get(loaded.card.model).layouts[loaded.layout], dict(model.named_parameters())
    params = loaded.variables["params"]
    rest = {kind: tree for kind, tree in loaded.variables.items() if kind != "params"}

    def loss(params):
        (logits, _), _ = loaded.model.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits))

    gradient = trees.flatten(jax.jit(jax.grad(loss))(params))
    logits = model.train()(torch_reference.torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    getattr(logits, "logits", logits).sin().sum().backward()
    checked = 0
    for path, ours in gradient.items():
        assert np.isfinite(ours).all()
        keys, transform = conversion.sources_of(table, f"params/{path}")
        for key, value in zip(keys, transform.export(np.asarray(ours)), strict=True):
            if re.fullmatch(table.ignore, key):  # no weight
                continue
            theirs = found[names(key)].grad
            if theirs is not None and float(theirs.abs().max()) > 1e-6:
                close(value, theirs.numpy(), 1e-3)
                checked += 1
    assert checked > len(gradient) // 2
