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

_FOUND_IN = {
    "api.model": ("load", "zero_shot", "Model", "predict", "outputs", "features", "evaluate", "Metrics"),
    "api.generate": ("generate",),
    "api.rank": ("rank",),
    "api.run": ("fit", "Run", "load_run", "knn"),
    "config": ("make as make_config", "override"),
    "core.card": ("Card",),
    "data.examples": ("Source as Dataset",),
    "data.sources": ("load as load_data",),
    "methods.classic": ("adapt as adapt_features",),
    "methods.probes": ("fit as fit_probe",),
    "methods.recipes": ("list_methods",),
    "models": ("list_models",),
    "serving.artefact": ("export", "load as load_export"),
    "tasks": ("summarize", "paired_difference", "load_predictions"),
    "training.train": ("train",),
    "weights.delta": ("load as load_delta",),
    "weights.inspection": ("inspect",),
    "weights.load": ("export as save_weights",),
}
_NAMES = {text.split()[-1]: (room, text.split()[0]) for room, texts in _FOUND_IN.items() for text in texts}
_ROOMS = (
    "config",
    "core",
    "data",
    "models",
    "tasks",
    "runtime",
    "weights",
    "methods",
    "training",
    "studies",
    "api",
    "serving",
)
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tl_jax.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'tl_jax' has no attribute {name!r}; it has {', '.join(_NAMES)}")
    module, attribute = _NAMES[name]
    value = globals()[name] = getattr(importlib.import_module(f"tl_jax.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_ROOMS})
