"""The weight card: it survives its file, and what it says is not overruled by accident."""

import json

import pytest

from tl_jax.core.card import Card

CARD = Card("resnet50", 10, class_names=("a", "b"), source="x.pth", licence="BSD-3-Clause", sha256="0" * 64)


def test_a_card_survives_its_json():
    assert Card.from_json(CARD.to_json()) == CARD


@pytest.mark.parametrize(
    ("text", "message"), [('{"model": "m"}', "num_classes"), ('{"model": "m", "num_classes": 1, "x": 2}', "x")]
)
def test_a_card_with_missing_or_unknown_fields_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Card.from_json(text)


def test_overrides_that_change_pixels_need_permission_and_others_do_not():
    with pytest.raises(ValueError, match=r"override_card=True[\s\S]*mean: the card says[\s\S]*crop"):
        CARD.override({"mean": [0.5, 0.5, 0.5], "crop": 0.9}, allowed=False)
    assert CARD.override({"mean": [0.5, 0.5, 0.5]}, allowed=True).mean == (0.5, 0.5, 0.5)
    assert CARD.override({"licence": "MIT", "crop": CARD.crop}, allowed=False).licence == "MIT"


@pytest.mark.parametrize(
    "fields", [{"mean": (0.5, 0.5)}, {"std": (0.0, 1.0, 1.0)}, {"crop": 0}, {"input_size": 16.5}, {"mean": ("a", 1, 1)}]
)
def test_a_card_that_no_image_can_satisfy_is_refused(fields):
    with pytest.raises(ValueError, match="invalid weight card"):
        CARD.replace(**fields)


def test_a_card_of_a_table_has_one_mean_and_deviation_a_column():
    fields = {"input": "table", "columns": ("age", "bmi"), "mean": (40.0, 25.0), "std": (10.0, 4.0)}
    card = CARD.replace(**fields, task="regression", target_mean=(1.5,), target_std=(0.5,), head=(("relu", {}),))
    assert Card.from_json(card.to_json()) == card
    with pytest.raises(ValueError, match="2 means, 2 deviations"):
        card.replace(mean=(40.0,))
    with pytest.raises(ValueError, match="expected an input of image, table"):
        CARD.replace(input="sound")


def test_a_field_at_its_default_that_came_later_leaves_no_trace_in_the_json():
    assert not set(json.loads(CARD.to_json())) & {"input", "columns", "task", "target_mean", "threshold", "head"}
