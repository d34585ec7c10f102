"""Who may import what: a folder is a rule, one line each, held against the code."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "tl_jax"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What each room may import of the others; "" is config.py, "face" what else stands directly in tl_jax/.
ROOMS = {
    "core": set(),
    "": {"core"},
    "data": {"", "core"},
    "models": {"", "core"},
    "tasks": {"", "core"},
    "runtime": {"", "core"},
    "weights": {"", "core", "models", "data"},
    "methods": {"", "core", "models", "tasks"},
    "training": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods"},
    "studies": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training"},
    "api": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training"},
    "serving": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training", "api"},
    "advice": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training", "studies", "api"},
    "face": {"", "core", "data", "models", "tasks", "runtime", "weights", "methods", "training", "studies", "api"}
    | {"serving"},
}
FACE = {"__init__.py": "face", "__main__.py": "face", "commands.py": "face", "config.py": ""}
# Libraries that one room alone imports.
ONLY = {
    "orbax": "runtime/checkpoint.py",
    "flax": "models/",
    "tensorflow_datasets": "data/",
    "safetensors": "weights/",
    "h5py": "weights/keras_files.py",
    "huggingface_hub": "weights/hub.py",
}
NEVER = {
    "data/": {"jax", "flax", "optax"},
    "methods/classic/": {"jax", "flax", "optax"},
    "tasks/trust.py": {"jax", "flax", "optax"},
    "tasks/outliers.py": {"jax", "flax", "optax"},
    "models/": {"optax", "ml_collections"},
    "": {"torch", "tensorflow", "timm", "keras"},
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


def room_of(file: str) -> str:
    return file.partition("/")[0] if "/" in file else FACE[file]


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_room_may(file):
    names = imported(file)
    roots = {name.split(".")[0] for name in names}
    for library, place in ONLY.items():
        assert library not in roots or file.startswith(place), f"{file} imports {library}"
    for place, libraries in NEVER.items():
        assert not (file.startswith(place) and roots & libraries), f"{file} imports {roots & libraries}"
    for name in names:
        target = name.removeprefix("tl_jax.").replace(".", "/")
        for other in FILES:
            if name.startswith("tl_jax.") and other in (f"{target}.py", f"{target}/__init__.py"):
                allowed = ROOMS[room_of(file)] | {room_of(file)}
                assert room_of(other) in allowed, f"{file} imports {other}"
