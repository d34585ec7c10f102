"""docs/models.md: its figures are those of the tests of parameter counts, and its example works as it is written."""

import importlib
import pathlib
import re
import sys

import jax
import pytest
from test_mobile import COUNTS as MOBILE
from test_models import COUNTS, images, random_variables

from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import peft

PAGE = (pathlib.Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
FAMILY, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_parameters_of_the_table_are_those_that_are_tested():
    named = re.findall(r"`([\w.]+)` ([\d.]+) M", PAGE)
    assert len(named) > 20
    assert [(name, f"{(COUNTS | MOBILE)[name] / 1e6:.1f}") for name, _ in named] == named


def test_every_family_is_in_the_table():
    files = set(re.findall(r"`(\w+)\.py`", " ".join(re.findall(r"^\| ([^|]+) \|", PAGE, re.MULTILINE))))
    makers = [getattr(variant.module, "func", variant.module) for variant in models.MODELS.values()]
    assert {maker.__module__.rpartition(".")[2] for maker in makers} <= files


@pytest.fixture
def darknet(monkeypatch, tmp_path):
    """The example's family, put where the page says."""
    for name, code in {"darknet": FAMILY, "test_darknet": TEST}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("darknet")
    monkeypatch.setitem(sys.modules, "tl_jax.models.darknet", family)
    monkeypatch.setattr(models, "darknet", family, raising=False)
    for name, variant in family.VARIANTS.items():
        monkeypatch.setitem(models.MODELS, name, variant)
    yield family
    for name in ("darknet", "test_darknet"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_example_is_timms_by_its_own_test(darknet, monkeypatch, tmp_path):
    pytest.importorskip("torch_reference")
    test = importlib.import_module("test_darknet")
    test.test_timm_gives_the_same_logits_stages_and_gradient_and_takes_the_export(monkeypatch, tmp_path)


def test_the_example_has_the_published_size_and_is_known_by_its_names(darknet):
    tree = jax.eval_shape(models.get("darknet53").module(num_classes=1000).init, jax.random.key(0), images(64, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == 41609928
    model = darknet.DarkNet(num_classes=3, depths=(1, 2, 1), width=8)
    variables = random_variables(model, 16)
    paths = list(trees.flatten(variables["params"]))
    blocks = ["stage1/block0", "stage2/block0", "stage2/block1", "stage3/block0"]
    assert rules.block_names(paths, model.cuts) == blocks
    trained = trees.match_rules(paths, rules.make_rules("last_k", paths, model.cuts, k=1))
    assert {path.split("/")[1] for path, rule in trained.items() if rule.value == "backbone"} == {"stage3"}
    decays = rules.layer_multipliers(paths, model.cuts, 0.5)
    assert decays["backbone/stem/conv/kernel"] == 0.5**5 and decays["head/kernel"] == 1
    assert decays["backbone/stage3/block0/downsample/conv/kernel"] == 0.5
    added = trees.flatten(peft.init(model, variables, [("lora", {"rank": 2})], jax.random.key(0)))
    assert {path.split("/")[-3] for path in added} == {"downsample", "unit2"} | {"stem"}
