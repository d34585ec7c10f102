"""The weight card: it survives its file, and what it says is not overruled by accident."""

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
    with pytest.raises(ValueError, match="cannot have"):
        CARD.replace(**fields)


def test_another_colour_order_is_refused_rather_than_ignored():
    with pytest.raises(ValueError, match="colour='BGR'"):
        CARD.replace(colour="BGR")
