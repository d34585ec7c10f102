"""Whether a tokenizer keeps upper case: read from its file, on the card, shown, and refused where the two disagree."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

import tl_jax
from tl_jax.core.card import Card
from tl_jax.data.text import tokenizer
from tl_jax.training import audit
from tl_jax.weights import inspection, load
from tl_jax.weights.text_inputs import Text

RULES = {
    "none": (None, False),
    "bert": (normalizers.BertNormalizer(lowercase=True), True),
    "bert cased": (normalizers.BertNormalizer(lowercase=False, strip_accents=True), False),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), False),
    "sequence": (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), True),
    "nested": (normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.Lowercase()])]), True),
    "clip": (normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]), True),
    "prefix": (normalizers.Prepend("a"), False),
}


def write(folder, rule, pretty=False):
    """A tokenizer of three words, and a token whose text looks like a rule."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "abc": 1, "ABC": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if rule is not None:
        words.normalizer = rule
    words.add_special_tokens(['"normalizer":{"type":"Lowercase","lowercase":true}'])
    folder.mkdir(exist_ok=True)
    words.save(str(folder / "tokenizer.json"), pretty=pretty)
    return tokenizer.read(folder)


@pytest.mark.parametrize("name", RULES)
def test_the_card_says_whether_upper_case_is_read_as_lower_case(name, tmp_path):
    rule, expected = RULES[name]
    for pretty in (True, False):
        own = write(tmp_path / str(pretty), rule, pretty)
        same = own.open().encode("ABC").ids == own.open().encode("abc").ids  # "[UNK]" both, behind a prefix
        assert own.lowercase is expected and (same is expected or name == "prefix")
    card = load.load("word_average_8_4d", "", 2, text=Text(own)).card
    assert card.lowercase is expected and Card.from_json(card.to_json()) == card
    assert json.loads(card.to_json())["lowercase"] is expected
    line = audit._input(json.loads(card.to_json()))
    assert f"(tokenizer {own.sha256[:12]}, {own.size} tokens, " in line
    assert ("tokens, lower case)" in line) is expected and ("upper and lower case)" in line) is not expected


def test_a_card_that_says_otherwise_stops_and_inspect_shows_both(tmp_path):
    own = write(tmp_path, normalizers.Lowercase())
    made = load.load("word_average_8_4d", "", 2, text=Text(own))
    path = tmp_path / "model.safetensors"
    load.export(made.variables, made.card.model, path, card=made.card)
    assert load.load("", path).card.lowercase and tl_jax.load("", str(path)).card.lowercase
    shown = inspection.inspect(path)
    card = Card.from_json(shown.rpartition("card ")[-1])
    assert (card.tokenizer, card.max_length, card.pooling, card.lowercase) == (own.sha256, 256, "mean", True)
    assert f"\ntokenizer.json: sha256 {own.sha256}, {own.size} tokens, lower case\n" in shown
    load.export(made.variables, made.card.model, path, card=made.card.replace(lowercase=None))  # of before
    assert load.load("", path).card.lowercase
    load.export(made.variables, made.card.model, path, card=made.card.replace(lowercase=False))
    with pytest.raises(ValueError, match=r"reads lower case, the card says upper and lower case$"):
        load.load("", path)


@pytest.mark.slow
def test_inspect_of_a_genuine_encoder_tells_what_its_texts_are(shared):
    shown = inspection.inspect(shared / "weights/all_minilm_l6_v2/model.safetensors")
    assert "30,522 tokens, lower case\nfits minilm_l6" in shown
    assert "texts of at most 256 tokens of 30,522, pooling mean" in shown
