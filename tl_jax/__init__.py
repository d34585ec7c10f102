"""tl_jax: a transfer-learning laboratory in JAX.

    import tl_jax
    model = tl_jax.load("deit_tiny_patch16_224", "deit.safetensors")
    run = tl_jax.fit(model, "folder:photos", method="lora", epochs=5)
    run.metrics, run.predict("new_photos"), run.save("adapted.safetensors")

Names are loaded where they are first used, so that `import tl_jax` costs nothing. docs/notebook.md is the tour.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    # networks
    "load": "tl_jax.api.model",
    "Model": "tl_jax.api.model",
    "list_models": "tl_jax.models",
    "inspect": "tl_jax.weights.load",
    "export": "tl_jax.weights.load",
    "load_delta": "tl_jax.weights.delta:load",
    "Card": "tl_jax.core.card",
    # data
    "Dataset": "tl_jax.data.examples:Source",
    "load_data": "tl_jax.data.sources:load",
    # adapting
    "fit": "tl_jax.api.run",
    "list_methods": "tl_jax.methods.recipes",
    "Run": "tl_jax.api.run",
    "load_run": "tl_jax.api.run",
    # using
    "predict": "tl_jax.api.model",
    "outputs": "tl_jax.api.model",
    "features": "tl_jax.api.model",
    "evaluate": "tl_jax.api.model",
    "knn": "tl_jax.api.run",
    "fit_probe": "tl_jax.methods.probes:fit",
    # numbers
    "Metrics": "tl_jax.api.model",
    "summarize": "tl_jax.tasks",
    "paired_difference": "tl_jax.tasks",
    "load_predictions": "tl_jax.tasks",
    # configs, as on the command line
    "make_config": "tl_jax.config:make",
    "override": "tl_jax.config",
    "train": "tl_jax.training.train",
}
_ROOMS = ("config", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training", "studies", "api")
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tl_jax.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'tl_jax' has no attribute {name!r}; it has {', '.join(_NAMES)}")
    module, _, attribute = _NAMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_ROOMS})
