"""GPT-2 (Radford et al. 2019, Language Models are Unsupervised Multitask Learners) and DistilGPT-2.

`gpt2_l{L}_h{H}_a{A}` has L blocks of width H with A heads; `variant_of` makes it. The last token, which has read all
others, stands for the text. The published head for classes is one dense layer without bias; a head whose bias is not
zero is stored under our own names. `Transformer.token_logits` gives the logits of the next token, whose decoder is the
embedding of the tokens: a file's copy of that is not read.
"""

import functools
import re
from typing import Any

from tl_jax.core.card import Card
from tl_jax.models.bert import STEM
from tl_jax.models.conversion import ABSENT, DENSE, NATIVE, SAME, Layout, rules_of, vocabulary
from tl_jax.models.text import Transformer
from tl_jax.models.variant import Variant
from tl_jax.models.vit import BLOCK

_LAYER, _TABLE = r"transformer.h.\1", "transformer.wte.weight"
_DENSE = {"attn/qkv": "attn.c_attn", "attn/proj": "attn.c_proj", "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj"}
_NAMES: dict[str, Any] = {
    f"{STEM}/tok_embed/embedding": ((_TABLE,), SAME),
    f"{STEM}/pos_embed": (("transformer.wpe.weight",), SAME),
    f"{BLOCK}/norm1": f"{_LAYER}.ln_1",
    f"{BLOCK}/norm2": f"{_LAYER}.ln_2",
    "backbone/norm": "transformer.ln_f",
    "head/kernel": (("score.weight",), DENSE),
    "head/bias": ((), ABSENT),
}
for _ours, _theirs in _DENSE.items():  # kernels lie [in, out] in the files too
    _NAMES[f"{BLOCK}/{_ours}/kernel"] = ((f"{_LAYER}.{_theirs}.weight",), SAME)
    _NAMES[f"{BLOCK}/{_ours}/bias"] = ((f"{_LAYER}.{_theirs}.bias",), SAME)
HF = Layout(
    tuple(rules_of(_NAMES)),
    head=r"score\..+",
    # causal masks, and the tied decoder
    ignore=r"transformer\.h\.\d+\.attn\.(masked_)?bias|lm_head\.weight",
    aliases=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),  # a bare network
    pixels=vocabulary(_TABLE),
)
LAYOUTS = {"hf": HF, "native": NATIVE}


def variant(name: str, size: tuple[int, int, int]) -> Variant:
    """size: blocks, width, heads."""
    geometry = dict(zip(("depth", "width", "heads"), size, strict=True))
    if geometry["width"] % geometry["heads"]:
        raise ValueError(f"{name}: a width of {size[1]} is no multiple of {size[2]} heads")
    how = {"norm_eps": 1e-5, "act": "gelu_tanh", "pre_norm": True, "causal": True, "pooling": "last"}
    module = functools.partial(Transformer, **geometry, **how, vocab_size=50257, positions=1024)
    card = Card(name, 0, mean=(), std=(), input="text", vocab=50257, max_length=1024, pooling="last")
    return Variant(module, card, LAYOUTS, {})


@functools.cache
def variant_of(name: str) -> Variant | None:
    """That of a name such as gpt2_l3_h192_a3; None for another name."""
    found = re.fullmatch(r"gpt2_l([1-9]\d*)_h([1-9]\d*)_a([1-9]\d*)", name)
    return variant(name, tuple(map(int, found.groups()))) if found else None


_SIZES = {
    "gpt2": (12, 768, 12), "gpt2_medium": (24, 1024, 16), "gpt2_large": (36, 1280, 20), "distilgpt2": (6, 768, 12),
}  # fmt: skip
VARIANTS: dict[str, Variant] = {name: variant(name, size) for name, size in _SIZES.items()}
