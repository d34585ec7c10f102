"""The text towers of CLIP and SigLIP: the numbers of transformers at every length, files in and out, tokens."""

import functools
import re

import clip_files
import jax
import numpy as np
import pytest
from clip_files import KINDS, LONGEST, VOCAB, torch_reference
from test_pretrained import close

import tl_jax
from tl_jax import models
from tl_jax.data.text import tokenizer
from tl_jax.models import clip_text
from tl_jax.weights import formats, load

torch = torch_reference.torch
EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    clip_files.add_names(monkeypatch)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    return functools.cache(lambda kind: clip_files.write(kind, tmp_path_factory.mktemp(kind)))


def texts(kind, length, left=False):
    """Rows of 1 to `length` random tokens, of CLIP the end token last: as transformers takes them, and ours."""
    rng = np.random.default_rng(0)
    theirs, ours = np.full((length, LONGEST[kind]), 1), np.zeros((length, length, 2), np.int32)
    ours[..., 0] = -1
    for i in range(length):
        own = rng.integers(2, VOCAB - 2, i + 1)
        own[-1] = VOCAB - 1 if kind == "clip" else own[-1]
        theirs[i, : i + 1] = own
        ours[i, slice(length - i - 1, length) if left else slice(i + 1), 0] = own
    return theirs, ours


def run_theirs(kind, ids):
    """transformers' hidden states of every layer, and the embedding."""
    model = clip_files.whole(kind)
    given = {"input_ids": torch.from_numpy(ids)}
    if kind == "clip":
        lengths = np.arange(1, len(ids) + 1)
        given["attention_mask"] = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    with torch.no_grad():
        found = model.text_model(**given, output_hidden_states=True)
        embedding = found.pooler_output
        embedding = model.text_projection(embedding) if kind == "clip" else embedding
    return [x.numpy() for x in found.hidden_states], embedding.numpy()


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("left", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["right", "left"])
def test_every_layer_and_the_embedding_are_those_of_transformers_at_every_length(kind, left, file_of):
    loaded = load.load(KINDS[kind], file_of(kind))
    assert loaded.layout == "hf" and {"new", "missing"}.isdisjoint(loaded.origins.values()) and not loaded.dropped
    assert (loaded.card.vocab, loaded.card.max_length) == (VOCAB, LONGEST[kind])
    apply = jax.jit(loaded.model.apply)
    for length in (LONGEST[kind], 5):  # a shorter batch of the same texts
        ids, x = texts(kind, length, left)
        hidden, embedding = run_theirs(kind, ids)
        logits, out = apply(loaded.variables, x)
        there = x[..., 0] >= 0
        for cut, expected in zip(("stem", "block0", "block1"), hidden, strict=True):
            if kind == "siglip":  # every place is a token
                close(out[cut][..., :-1], expected, 1e-5)
            else:
                own = np.arange(ids.shape[1]) < np.arange(1, length + 1)[:, None]
                close(out[cut][..., :-1][there], expected[own], 1e-5)
        close(logits, embedding, 1e-5)


@pytest.mark.thin(1)
@EACH
def test_logits_of_image_and_text_are_those_of_transformers(kind, file_of):
    model = clip_files.whole(kind)
    pixels = np.random.default_rng(1).standard_normal((4, 32, 32, 3)).astype(np.float32)
    ids, x = texts(kind, 9)
    given = {"pixel_values": torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), "input_ids": torch.from_numpy(ids)}
    if kind == "clip":
        given["attention_mask"] = torch.from_numpy((np.arange(77) <= np.arange(9)[:, None]).astype(np.int64))
    with torch.no_grad():
        expected = model(**given).logits_per_image.numpy()
    towers = {name: load.load(name, file_of(kind)) for name in (f"small_{kind}", KINDS[kind])}
    image, text = (jax.jit(own.model.apply)(own.variables, each)[0]
                   for own, each in zip(towers.values(), (pixels, x), strict=True))  # fmt: skip
    image, text = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (image, text))
    tensors = formats.read(file_of(kind))[0]
    scale, bias = (float(tensors.get(f"logit_{name}", np.zeros(1)).item()) for name in ("scale", "bias"))
    found = np.exp(scale) * image @ text.T + bias
    close(found, expected, 1e-5)


OPENAI = {
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.encoder\.layers": "transformer.resblocks",
    r"\.layer_norm": ".ln_",
    r"self_attn\.out_proj": "attn.out_proj",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_projection\.weight": "text_projection",
    r"^text_model\.head": "text_projection",
}


def renamed(kind, tensors):
    """The text tower as OpenAI's and open_clip's files have it."""
    found = {}
    for key, value in tensors.items():
        if key.startswith(("text_model.", "text_projection.")) and "position_ids" not in key:
            if three := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(\w+)", key):
                value = np.concatenate([tensors[key.replace("q_proj", f"{name}_proj")] for name in "qkv"])
                key = f"{three[1]}.attn.in_proj_{three[2]}"
            for old, new in OPENAI.items():
                key = re.sub(old, new, key)
            if "self_attn" not in key:
                found[key] = value.T if key == "text_projection" else value
    return found if kind == "clip" else {f"text.{key}": value for key, value in found.items()}


@EACH
def test_files_of_both_publishers_are_read_alike_and_written_bit_for_bit(kind, file_of, tmp_path):
    tensors = formats.read(file_of(kind))[0]
    theirs = renamed(kind, tensors)
    more = {"logit_scale": np.ones((), np.float32), "visual.proj": np.ones((3, 4), np.float32)}
    formats.write_safetensors(tmp_path / "w.safetensors", theirs | more, {})
    own, other = (load.load(KINDS[kind], path) for path in (file_of(kind), tmp_path / "w.safetensors"))
    assert other.layout == {"clip": "openai", "siglip": "open_clip"}[kind]
    jax.tree.map(np.testing.assert_array_equal, own.variables, other.variables)
    text = {key: x for key, x in tensors.items() if key.startswith("text_") and "position_ids" not in key}
    bare = {key.removeprefix("text_model."): x for key, x in text.items()}
    formats.write_safetensors(tmp_path / "bare.safetensors", bare, {})
    alone = load.load(KINDS[kind], tmp_path / "bare.safetensors")
    jax.tree.map(np.testing.assert_array_equal, own.variables, alone.variables)
    expected = {"hf": text, other.layout: {key.removeprefix("text."): x for key, x in theirs.items()}}
    for layout, state in expected.items():
        load.export(own.variables, KINDS[kind], tmp_path / "again.safetensors", card=own.card, layout=layout)
        found = formats.read(tmp_path / "again.safetensors")[0]
        assert set(found) == set(state)
        for key, value in state.items():
            np.testing.assert_array_equal(found[key], value)


@EACH
def test_a_text_too_long_keeps_its_end_and_capitals_mean_nothing(kind, file_of):
    card = load.load(KINDS[kind], file_of(kind)).card
    read = tokenizer.known(card)
    short, loud, long = (read.encode([(text,)], 6) for text in ("a photo", "A PHOTO", "a photo of a zero " * 9))
    end = {"clip": VOCAB - 1, "siglip": 1}[kind]
    assert long.cut and long.counts.tolist() == [6] and long.flat[-1, 0] == short.flat[-1, 0] == end
    np.testing.assert_array_equal(short.flat, loud.flat)
    assert len(short.flat) < 6 and short.flat[0, 0] == (VOCAB - 2 if kind == "clip" else short.flat[0, 0])


def test_names_tell_sizes_and_published_towers_have_their_number_of_parameters():
    # Of the published files, with logit_scale, and SigLIP's logit_bias.
    published = {
        "vit_base_patch32_clip_224": 151_277_313,
        "vit_large_patch14_clip_224": 427_616_513,
        "vit_base_patch16_siglip_224": 203_155_970,
    }
    for name, count in published.items():
        found = 2 if "siglip" in name else 1
        for tower in (name, clip_text.TOWERS[name]):
            leaves = jax.tree.leaves(load.default_shapes(tower), is_leaf=lambda x: isinstance(x, tuple))
            bias = 0 if "siglip" in name else models.get(tower).card.num_classes  # ours, of zeros
            found += sum(map(np.prod, leaves)) - bias
        assert found == count
    assert clip_text.variant_of("siglip_text_l1_h8_a2_quickgelu") is None
    with pytest.raises(ValueError, match="a width of 9 is no multiple of 2 heads"):
        models.get("clip_text_l1_h9_a2")
    quick, plain = (models.get(f"clip_text_l1_h8_a2{end}").module.keywords["act"] for end in ("_quickgelu", ""))
    assert (quick, plain) == ("quick_gelu", "gelu")
    assert all(name in models.MODELS and models.get(text) for name, text in clip_text.TOWERS.items())


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_two_texts_and_exports_for_any_number_of_tokens(kind, file_of, tmp_path):
    path = file_of(kind)
    pair = load.load(KINDS[kind], path, 1, head=(("cosine", {}),))
    rows, read = [("a photo", "a drawing of the zero"), ("two", "three four five")], tokenizer.known(pair.card)
    one, other = (read.encode([(row[i],) for row in rows], 77).batch(np.arange(2), 16) for i in (0, 1))
    features = [pair.model.clone(num_classes=0).apply(pair.variables, x)[0] for x in (one, other)]
    a, b = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in features)
    found = pair.model.apply(pair.variables, np.concatenate([one, other], axis=1))[1]["embedding"]
    close(found[:, 0], (a * b).sum(axis=1), 1e-5)
    whole = tl_jax.load(KINDS[kind], path)
    tl_jax.export(whole, tmp_path / "export")
    texts = ["a photo of a zero", "one", "two three four five six seven eight in black and white"]
    close(tl_jax.outputs(tl_jax.load_export(tmp_path / "export"), texts), tl_jax.outputs(whole, texts), 1e-5)
