"""BERT (Devlin et al. 2019, arXiv:1810.04805), its small sizes (Turc et al. 2019, arXiv:1908.08962), and its relatives.

MiniLM (Wang et al. 2020, arXiv:2002.10957), DistilBERT (Sanh et al. 2019, arXiv:1910.01108), RoBERTa (Liu et al. 2019,
arXiv:1907.11692). `bert_l{L}_h{H}_a{A}` has L blocks of width H with A heads; `variant_of` makes it.

The published head for classes is a square dense layer with tanh on the first token, the pooler, and a dense one;
DistilBERT's has ReLU. A file with classes brings it whole. BERT's files without classes hold a pooler too, trained to
tell whether one sentence follows another. It is the beginning of a head that is not there, so it is left out, as every
new head leaves out the old one; `model.head = (("square", {}), ("tanh", {}))` makes a new one.

NAME.mlm has the head of masked tokens in the place of one for classes, which gives `Transformer.token_logits`. Its
decoder is the embedding of the tokens: a file's own copy of that is written, and not read.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from tl_jax.core.card import Card
from tl_jax.models.conversion import NATIVE, QKV, SAME, Layout, Transform, rules_of, vocabulary
from tl_jax.models.text import Transformer
from tl_jax.models.variant import Variant
from tl_jax.models.vit import BLOCK, qkv_rules

STEM = "backbone/stem"
POOLER = {"bert": ("square", "tanh"), "roberta": ("square", "tanh"), "distilbert": ("square", "relu")}
_TWICE = Transform(lambda w, *_: w, lambda w: (w, w))


def _layer(kind: str) -> tuple[dict[str, str], list[str]]:
    """The names of the parts of a block in a file, {our path: theirs}, and those of query, key and value."""
    if kind == "distilbert":
        own = r"distilbert.transformer.layer.\1"
        names = ("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
        three = [f"{own}.attention.{name}_lin" for name in "qkv"]
    else:
        own = rf"{kind}.encoder.layer.\1"
        names = (
            "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
            "output.LayerNorm",
        )  # fmt: skip
        three = [f"{own}.attention.self.{name}" for name in ("query", "key", "value")]
    paths = ("attn/proj", "norm1", "mlp/fc1", "mlp/fc2", "norm2")
    return {f"{BLOCK}/{path}": f"{own}.{name}" for path, name in zip(paths, names, strict=True)}, three


# Of a kind of files: the dense layers of the head for classes; transform, norm, bias, decoder of that for tokens.
_HEADS = {
    "bert": (("bert.pooler.dense", "classifier"), r"cls\..+", (
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
        "cls.predictions.decoder",
    )),
    "roberta": (("classifier.dense", "classifier.out_proj"), r"lm_head\..+", (
        "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder",
    )),
    "distilbert": (("pre_classifier", "classifier"), r"vocab_(transform|layer_norm|projector)\..+", (
        "vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector",
    )),
}  # fmt: skip


def layout(kind: str, token_head: bool = False) -> Layout:
    """The files of transformers; kind: "bert", "roberta" or "distilbert"."""
    blocks, three = _layer(kind)
    (dense, out), tokens, (transform, norm, bias, decoder) = _HEADS[kind]
    embed, embedding = f"{kind}.embeddings", f"{STEM}/tok_embed/embedding"
    names: dict[str, Any] = {
        embedding: ((f"{embed}.word_embeddings.weight",), SAME),
        f"{STEM}/pos_embed": ((f"{embed}.position_embeddings.weight",), SAME),
        f"{STEM}/type_embed": ((f"{embed}.token_type_embeddings.weight",), SAME),
        f"{STEM}/norm": f"{embed}.LayerNorm",
        **blocks,
        "head/dense0": dense,
        "head/out": out,
    }
    # A pooler of a network without classes, numbers of the positions, and what is left of the pretraining.
    ignore = rf"{kind}\.(pooler\..+|embeddings\.position_ids)"
    if token_head:
        # Their copies are written for strict readers; the bias has one in the files of some.
        names[embedding] = (f"{embed}.word_embeddings.weight", f"{decoder}.weight"), _TWICE
        own_bias = bias == f"{decoder}.bias"
        names["head/token_bias"] = ((bias,), SAME) if own_bias else ((bias, f"{decoder}.bias"), _TWICE)
        names |= {"head/transform": transform, "head/norm": norm}
        more = "weight" if own_bias else "(weight|bias)"
        ignore += rf"|{re.escape(decoder)}\.{more}|cls\.seq_relationship\..+"
    else:
        ignore += f"|{tokens}"
    return Layout(
        (*rules_of(names), *qkv_rules([f"{name}.{{}}" for name in three], QKV)),
        head=rf"{re.escape(dense)}\..+|{re.escape(out)}\..+|{tokens}",
        ignore=ignore,
        aliases=(
            (r"\.gamma$", ".weight"),  # of the first files
            (r"\.beta$", ".bias"),
            (r"^(embeddings|encoder|transformer|pooler)\.", rf"{kind}.\1."),  # a bare network
        ),
        pixels=vocabulary(f"{embed}.word_embeddings.weight"),
        layers=POOLER[kind],
    )


LAYOUTS = {kind: {"hf": layout(kind), "native": NATIVE} for kind in _HEADS}
TOKEN_LAYOUTS = {kind: {"hf": layout(kind, token_head=True), "native": NATIVE} for kind in _HEADS}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "bert": {"segments": 2},
    # Its files number the first token 2, since 1 is that of padding; all segments are one.
    "roberta": {"segments": 1, "positions": 514, "first_position": 2, "norm_eps": 1e-5},
    "distilbert": {},
}


def variants(name: str, kind: str, size: tuple[int, int, int], vocab: int = 30522, **card: Any) -> dict[str, Variant]:
    """NAME and NAME.mlm; size: blocks, width, heads; card: its fields where they are not those of BERT."""
    geometry = dict(zip(("depth", "width", "heads"), size, strict=True))
    if geometry["width"] % geometry["heads"]:
        raise ValueError(f"{name}: a width of {size[1]} is no multiple of {size[2]} heads")
    head = tuple((layer, {}) for layer in POOLER[kind])  # of the classes that a file brings, see the top
    own = {"max_length": 512, "pooling": "cls", **card}
    fields = {**geometry, **FIELDS[kind], "vocab_size": vocab, "pooling": own["pooling"]}
    its_card = Card(name, 0, mean=(), std=(), input="text", vocab=vocab, head=head, **own)
    masked = functools.partial(Transformer, **fields, token_head=True)
    return {
        name: Variant(functools.partial(Transformer, **fields), its_card, LAYOUTS[kind], {}),
        f"{name}.mlm": Variant(masked, its_card.replace(model=f"{name}.mlm"), TOKEN_LAYOUTS[kind], {}),
    }


@functools.cache
def variant_of(name: str) -> Variant | None:
    """That of a name such as bert_l3_h192_a3 or bert_l3_h192_a3.mlm; None for another name."""
    found = re.fullmatch(r"(bert_l([1-9]\d*)_h([1-9]\d*)_a([1-9]\d*))(\.mlm)?", name)
    return variants(found[1], "bert", tuple(map(int, found.group(2, 3, 4))))[name] if found else None


def _all_variants() -> dict[str, Variant]:
    sizes = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "medium": (8, 512, 8)}
    sizes |= {"base": (12, 768, 12), "large": (24, 1024, 16)}
    made = {}
    for size, geometry in sizes.items():
        made |= variants(f"bert_{size}", "bert", geometry)
    made |= variants("bert_base_chinese", "bert", sizes["base"], 21128)
    for depth in (6, 12):  # as sentence-transformers have them, which pool and truncate so
        made |= variants(f"minilm_l{depth}", "bert", (depth, 384, 12), pooling="mean", max_length=256)
    made |= variants("distilbert_base", "distilbert", (6, 768, 12))
    made |= variants("roberta_base", "roberta", sizes["base"], 50265)
    return made | variants("distilroberta_base", "roberta", (6, 768, 12), 50265)


VARIANTS: dict[str, Variant] = _all_variants()
