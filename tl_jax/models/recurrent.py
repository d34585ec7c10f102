"""Networks on word vectors: LSTM (Hochreiter and Schmidhuber 1997), GRU (Cho et al. 2014, arXiv:1406.1078), a
convolution over words (Kim 2014, arXiv:1408.5882) and their mean (Joulin et al. 2017, arXiv:1607.01759).

They read tokens, see tokens.py, and no segments. Padding on either side changes no number. Names beside those of the
table: (bi)lstm_WIDTHxLAYERS_DIMd, (bi)gru_..., textcnn_DIMd, word_average_HIDDEN_DIMd, such as bilstm_128x2_50d for
word vectors of 50 numbers; see `variant_of`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers, tokens
from tl_jax.models.conversion import DENSE, Layout, Rule, Transform
from tl_jax.models.head import HE, texts_of
from tl_jax.models.kernels import recur
from tl_jax.models.variant import Model, Variant

EMBED = nn.initializers.normal(0.1)


def bounded(width: int) -> Callable[..., jax.Array]:
    """torch's initial values of a recurrent layer of this width: uniform within 1 / sqrt(width)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)


class Stem(nn.Module):
    """The vectors of the tokens: int32 [B, L, 2] -> [B, L, embed_dim], zeros where there is no token."""

    vocab_size: int
    embed_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocab_size, self.embed_dim, dtype=self.dtype, embedding_init=EMBED, name="tok_embed")
        return jnp.where(mask[..., None], table(jnp.maximum(x[..., 0], 0)), 0)


class Direction(nn.Module):
    """A recurrent layer read in one direction: [B, L, D] -> its states [B, L, width]; cell: of recur.CELLS.

    reverse: from the last token to the first. `ih` acts on the input and `hh` on the state before; gates are in torch's
    order, i f g o and r z n.
    """

    cell: str
    width: int
    reverse: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        init, dtype = bounded(self.width), self.policy.dtype
        settings = {"features": recur.CELLS[self.cell].gates * self.width, "kernel_init": init, "bias_init": init}
        order = slice(None, None, -1 if self.reverse else 1)  # a loop that runs backwards has no form in ONNX
        x = layers.Dense(**settings, dtype=dtype, name="ih")(jnp.swapaxes(x, 0, 1)[order])
        kernel, bias = self.affine(nn.Dense(**settings, name="hh"))
        y = recur.states(self.cell, x.astype(jnp.float32), mask.T[order], kernel.astype(dtype), bias)
        return jnp.swapaxes(y[order], 0, 1).astype(dtype)

    def affine(self, layer: nn.Dense) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias of a layer, with what an interceptor of its calls adds to it where `fold` is off."""
        if self.policy.fold and not self.is_initializing():
            params = layer.variables["params"]
            return params["kernel"], params["bias"]
        y = layer(jnp.eye(self.width + 1, self.width))  # the last row is zeros
        return y[:-1] - y[-1:], y[-1]


class Block(nn.Module):
    """A recurrent layer, [B, L, D] -> [B, L, width], or twice the width of both directions."""

    cell: str
    width: int
    bidirectional: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array) -> jax.Array:
        names = {"forward": False, "reverse": True} if self.bidirectional else {"forward": False}
        how = (self.cell, self.width)
        return jnp.concatenate(
            [Direction(*how, reverse, self.policy, name=name)(x, mask) for name, reverse in names.items()], axis=-1
        )


class Recurrent(Model):
    """LSTM or GRU on tokens int32 [B, L, 2]; see `Model` for what all networks share, tokens.py for the cuts.

    The cuts: stem, block0, block1, ... (a layer each), pre_logits. The state stands still where there is no token, so
    the reverse direction begins at the last token of each example. cell: "lstm" or "gru". bidirectional: both
    directions, each of `width`, forward first. pooling: "last" is the final state of each direction, as torch's h_n;
    others are over the states of all tokens. drop_path must be 0.
    """

    cell: str
    width: int
    vocab_size: int
    embed_dim: int = 300
    layers: int = 1
    bidirectional: bool = False
    pooling: str = "last"

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i}" for i in range(self.layers)), "pre_logits")

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        make = functools.partial(layers.recomputed(Block, self.remat), self.cell, self.width, self.bidirectional)

        def block(i, x, mask):
            return make(self.policy, name=f"block{i}")(x, train, mask)

        def pre_logits(x, mask):
            if not (self.bidirectional and self.pooling == "last"):
                return tokens.pool(x, mask, self.pooling)
            ends = zip(jnp.split(x, 2, axis=-1), ("last", "cls"), strict=True)
            return jnp.concatenate([tokens.pool(states, mask, end) for states, end in ends], axis=-1)

        stem = Stem(self.vocab_size, self.embed_dim, self.dtype, name="stem")
        parts = [stem, *(functools.partial(block, i) for i in range(self.layers)), pre_logits]
        return tokens.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop, texts_of(self))


class Windows(nn.Module):
    """Convolutions over words of several widths and ReLU, side by side: [B, L, D] -> [B, L, len(widths) features].

    Each has one window a token, with zeros beyond the ends, as torch's padding="same".
    """

    widths: tuple[int, ...]
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array) -> jax.Array:
        length, x = x.shape[1], jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
        maps = []
        for width in self.widths:
            before = (width - 1) // 2
            padded = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, width - 1 - before, 0), (0, 0, 0)))
            windows = jnp.concatenate([padded[:, i : i + length] for i in range(width)], axis=-1)
            maps.append(layers.Dense(self.features, kernel_init=HE, dtype=self.dtype, name=f"window{width}")(windows))
        return nn.relu(jnp.concatenate(maps, axis=-1))


class TextCNN(Model):
    """Convolutions over the words int32 [B, L, 2], pooled; see `Model` for what all networks share.

    The cuts: stem, block0 (the maps of all widths, [B, L, features each]), pre_logits. Kim's windows also stand wholly
    beyond the ends of a text; here each is centred at a word. His dropout of 0.5 before the classifier is `dropout`.
    pooling: "max" over time, as his, or another. drop_path must be 0.
    """

    vocab_size: int
    embed_dim: int = 300
    widths: tuple[int, ...] = (3, 4, 5)
    features: int = 100
    pooling: str = "max"
    cuts = ("stem", "block0", "pre_logits")

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        windows = layers.recomputed(Windows, self.remat)(self.widths, self.features, self.dtype, name="block0")
        parts = {
            "stem": Stem(self.vocab_size, self.embed_dim, self.dtype, name="stem"),
            "block0": lambda x, mask: windows(x, train, mask),
            "pre_logits": lambda x, mask: tokens.pool(x, mask, self.pooling),
        }
        return tokens.run_parts(parts, x, start, stop)


class WordAverage(Model):
    """The mean of the vectors of the words int32 [B, L, 2]; see `Model` for what all networks share.

    The cuts: stem, pre_logits. hidden: above 0, of a dense layer with ReLU on the mean, which is `final` (Iyyer et al.
    2015, deep averaging networks). pooling: "mean", or another. drop_path must be 0.
    """

    vocab_size: int
    embed_dim: int = 300
    hidden: int = 0
    pooling: str = "mean"
    cuts = ("stem", "pre_logits")

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)

        def pre_logits(x, mask):
            x = tokens.pool(x, mask, self.pooling)
            if not self.hidden:
                return x
            dense = layers.Dense(self.hidden, kernel_init=HE, dtype=self.dtype, name="final")
            return nn.relu(dense(x)).astype(jnp.float32)

        stem = Stem(self.vocab_size, self.embed_dim, self.dtype, name="stem")
        return tokens.run_parts({"stem": stem, "pre_logits": pre_logits}, x, start, stop)


# Names that people give to the same parts of a torch module, and ours.
_ALIASES = (
    (r"^(emb|embed|embeddings|word_embeddings)\.", "embedding."),
    (r"^(linear|classifier|out|output|decoder)\.(?=(weight|bias)$)", "fc."),
)
_VOCABULARY = conversion.vocabulary("embedding.weight")
_ENDS = [
    Rule("params/backbone/stem/tok_embed/embedding", ("embedding.weight",), conversion.SAME),
    *conversion.dense("head", "fc"),
]


def recurrent_layout(cell: str) -> Layout:
    """The table of a torch module with `embedding`, `lstm` or `gru` (or `rnn`; files of it alone too), and `fc`."""
    rows = []
    for direction, suffix in {"forward": "", "reverse": "_reverse"}.items():
        for layer in ("ih", "hh"):
            path = rf"params/backbone/block(\d+)/{direction}/{layer}"
            for leaf, key, transform in (("kernel", "weight", DENSE), ("bias", "bias", conversion.SAME)):
                rows.append(Rule(f"{path}/{leaf}", (rf"{cell}.{key}_{layer}_l\1{suffix}",), transform))
    aliases = ((r"^(rnn\.)?(?=(weight|bias)_[ih]h_l\d)", f"{cell}."), *_ALIASES)
    return Layout((*_ENDS, *rows), r"fc\..+", aliases=aliases, pixels=_VOCABULARY)


def windows_layout(widths: Sequence[int]) -> Layout:
    """The table of a torch module with `embedding`, a list `convs` of Conv1d, and `fc`."""
    rows = []
    for i, width in enumerate(widths):
        transform = Transform(  # [features, D, width] <-> [width D, features]
            lambda w: w.transpose(2, 1, 0).reshape(-1, w.shape[0]),
            lambda w, width=width: (w.reshape(width, -1, w.shape[1]).transpose(2, 1, 0),),
        )
        rows += conversion.affine(f"backbone/block0/window{width}", f"convs.{i}", transform)
    return Layout((*_ENDS, *rows), r"fc\..+", aliases=_ALIASES, pixels=_VOCABULARY)


LAYOUTS = {cell: {"torch": recurrent_layout(cell), "native": conversion.NATIVE} for cell in recur.CELLS}
WINDOWS_LAYOUTS = {"torch": windows_layout((3, 4, 5)), "native": conversion.NATIVE}
_MEAN_ROWS = (*_ENDS, *conversion.dense("backbone/final", "hidden"))
_MEAN = Layout(_MEAN_ROWS, r"fc\..+", aliases=_ALIASES, pixels=_VOCABULARY)
MEAN_LAYOUTS = {"torch": _MEAN, "native": conversion.NATIVE}
VOCAB, MAX_LENGTH = 20000, 256  # where no vocabulary and no data say another
_SIZE = r"([1-9]\d{0,3})"
_RECURRENT = re.compile(rf"(bi)?(lstm|gru)_{_SIZE}(?:x([1-9]))?(?:_{_SIZE}d)?")
_OTHERS = re.compile(rf"(?:(textcnn)|word_average(?:_{_SIZE})?)(?:_{_SIZE}d)?")


def variant_of(name: str) -> Variant | None:
    """The network of a name such as bilstm_256x2_50d, gru_128, textcnn_100d or word_average_64; None: it is no such.

    Numbers: the width, x the layers (1), _ the size of the word vectors and d (300d). Of word_average the width is that
    of the hidden layer, and there is none without.
    """

    def variant(kind, pooling, layouts, dim, **fields):
        card = Card(name, 2, mean=(), std=(), input="text", vocab=VOCAB, max_length=MAX_LENGTH, pooling=pooling)
        own = {"embed_dim": int(dim or 300), "vocab_size": VOCAB, "pooling": pooling}
        return Variant(functools.partial(kind, **fields, **own), card, layouts, {})

    if match := _RECURRENT.fullmatch(name):
        both, cell, width, depth, dim = match.groups()
        fields = {"cell": cell, "width": int(width), "layers": int(depth or 1), "bidirectional": bool(both)}
        return variant(Recurrent, "last", LAYOUTS[cell], dim, **fields)
    if match := _OTHERS.fullmatch(name):
        windows, hidden, dim = match.groups()
        if windows:
            return variant(TextCNN, "max", WINDOWS_LAYOUTS, dim)
        return variant(WordAverage, "mean", MEAN_LAYOUTS, dim, hidden=int(hidden or 0))
    return None


NAMES = ("lstm_256", "bilstm_256", "lstm_256x2", "gru_256", "bigru_256", "textcnn", "word_average")
VARIANTS: dict[str, Variant] = {name: variant_of(name) for name in NAMES}
