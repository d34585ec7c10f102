"""The documents promise nothing that is not there."""

import pathlib
import re

import pytest

from tl_jax import models
from tl_jax.config import WHOLE
from tl_jax.core.options import OPTIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"\b(?:tests|configs|benchmarks|tl_jax)/[\w/]+\.(?:py|safetensors)\b", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_and_models_named_in_the_documents_exist(page):
    text = page.read_text()
    named = re.findall(r"--config\.([\w.]+)=", text)
    named += re.findall(r"(?<![\w./])((?:model|data|method|schedule)\.\w+)\b(?![./(])", text)
    for option in named:
        known = option in OPTIONS or option.startswith(tuple(f"{name}." for name in WHOLE))
        assert known or option.endswith((".safetensors", ".py", ".npz", ".md", ".onnx")), option
    for name in re.findall(r"`((?:resnet|deit_|vit_|wide_|resnext)\w*)`", text):
        models.get(name)
