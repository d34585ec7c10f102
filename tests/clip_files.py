"""Small files of CLIP and SigLIP as transformers writes them, with a tokenizer.json beside them, random weights."""

import functools

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors, trainers

from tl_jax import models
from tl_jax.core.card import Card
from tl_jax.models import clip, clip_text, vit

torch_reference = pytest.importorskip("torch_reference")
transformers = pytest.importorskip("transformers")

SIZE = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 16}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VOCAB, EMBEDDING = 120, 24
KINDS = {"clip": "clip_text_l2_h32_a2_quickgelu", "siglip": "siglip_text_l2_h32_a2"}  # with their text towers
LONGEST = {"clip": 77, "siglip": 64}
TEXTS = ("a photo of a {}.", "a drawing of the {}, in black and white!", "zero one two three four five six seven eight")


def add_names(monkeypatch):
    """small_clip and small_siglip, in the table of models."""
    towers = {"clip": {"norm_eps": 1e-5, "pre_norm": True, "act": "quick_gelu"}, "siglip": {"pool": "map"}}
    made = {}
    for kind, publisher in {"clip": ("openai",), "siglip": ()}.items():
        module = functools.partial(vit.ViT, **SIZE, **towers[kind])
        card = Card(
            f"small_{kind}", EMBEDDING if kind == "clip" else 0, SIZE["image_size"], mean=clip.MEAN, std=clip.STD
        )
        made |= getattr(clip, f"{kind}_variants")(module, card, *publisher)
        monkeypatch.setitem(clip_text.TOWERS, f"small_{kind}", KINDS[kind])
    for name, variant in made.items():
        monkeypatch.setitem(models.MODELS, name, variant)


@functools.cache
def whole(kind):
    """transformers' network of both towers; logits are as large as those of trained ones."""
    vision = {**SHAPE, "image_size": 32, "patch_size": 16}
    text = {**SHAPE, "vocab_size": VOCAB, "eos_token_id": VOCAB - 1, "bos_token_id": VOCAB - 2, "pad_token_id": 1}
    if kind == "clip":
        towers = {"text_config": text, "vision_config": vision}
        model = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=EMBEDDING))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    places = {name: x.clone() for name, x in model.named_buffers() if name.endswith("position_ids")}
    torch_reference.randomize(model)
    for name, x in model.named_buffers():
        x.copy_(places.get(name, x))
    model.logit_scale.data.fill_(3.0)
    if kind == "siglip":
        model.logit_bias.data.fill_(-7.5)
    return model


def write(kind, folder):
    """model.safetensors and tokenizer.json in a folder; the path of the first."""
    whole(kind).save_pretrained(folder)
    make_tokenizer(kind).save(str(folder / "tokenizer.json"))
    return folder / "model.safetensors"


def make_tokenizer(kind):
    """As CLIP's, pairs of bytes with `</w>` at the end of words, lower case, between two special tokens; SigLIP's ends
    a text with the token that fills it."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    ends = ["<unk>", "</s>"] if kind == "siglip" else []
    options = {"show_progress": False, "special_tokens": ends, "end_of_word_suffix": "</w>"}
    found.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=VOCAB - 2, **options))
    if kind == "siglip":
        found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return found
    for i in range(VOCAB - 2 - found.get_vocab_size()):
        found.add_tokens([f"unused{i}"])
    found.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    ends = [(name, found.token_to_id(name)) for name in ("<|startoftext|>", "<|endoftext|>")]
    found.post_processor = processors.RobertaProcessing(ends[1], ends[0], False)
    return found
