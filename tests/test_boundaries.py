"""Who may import what: the rules of docs/architecture.md, held against the code."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "tl_jax"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Lower files never import higher ones; a file is listed with those of its own height.
FLOORS = [
    {
        "__init__.py",
        "card.py",
        "trees.py",
        "losses.py",
        "formats.py",
        "torch_files.py",
        "preemption.py",
        "options.py",
        "compiled.py",
        "memory.py",
        "rollcall.py",
        "roofline.py",
    },
    {
        "hub.py",
        "leaves.py",
        "metrics.py",
        "data/",
        "models/",
        "optim.py",
        "checkpoint.py",
        "sharding.py",
        "methods/",
        "workdir.py",
    },
    {"pretrained.py", "audit.py", "steps.py", "plots.py", "logging.py"},
    {"evaluate.py", "run.py", "part.py", "outcome.py", "distributed.py", "features.py"},
    {"probe.py"},
    {"train.py", "weight_space.py"},
    {"replicas.py"},
    {"sweep.py"},
    {"studies/"},
]
ONLY = {
    "orbax": {"checkpoint.py"},
    "flax": {"models/"},
    "tensorflow_datasets": {"data/"},
    "safetensors": {"formats.py"},
    "huggingface_hub": {"hub.py"},
    "ml_collections": {
        "options.py",
        "run.py",
        "probe.py",
        "outcome.py",
        "train.py",
        "replicas.py",
        "sweep.py",
        "weight_space.py",
        "studies/",
    },
    "matplotlib": {"plots.py", "data/"},
    "optax": {"optim.py", "steps.py"},
}
NEVER = {
    "data/": {"jax", "flax", "optax", "tensorflow"},
    "models/": {"optax", "ml_collections"},
    "": {"torch", "tensorflow", "timm"},
}


def imported(file: str) -> set[str]:
    """Full names of everything that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(file: str, places: set[str]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def floor_of(file: str) -> int:
    return next(height for height, places in enumerate(FLOORS) if within(file, places))


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_and_stay_inside_their_files(file):
    names = imported(file)
    roots = {name.split(".")[0] for name in names}
    for library, places in ONLY.items():
        assert library not in roots or within(file, places), f"{file} imports {library}"
    for place, libraries in NEVER.items():
        assert not (file.startswith(place) and roots & libraries), f"{file} imports {roots & libraries}"
    for name in names:
        target = name.removeprefix("tl_jax.").replace(".", "/")
        for other in FILES:
            if name.startswith("tl_jax.") and other in (f"{target}.py", f"{target}/__init__.py"):
                assert floor_of(other) <= floor_of(file), f"{file} imports {other}, which stands above it"
