"""Transformers of text, which BERT and its relatives (bert.py) and GPT-2 (gpt2.py) are; see tokens.py for the input."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.models import tokens
from tl_jax.models.head import texts_of
from tl_jax.models.layers import Dense, DropPath, drop_path_rates, dropped, recomputed
from tl_jax.models.transformer import GELU, INIT, Attention, Mlp
from tl_jax.models.variant import Model


class Embed(nn.Module):
    """Rows of a table, int [...] -> [..., D]; NaN for a number that it has not, so that a wrong vocabulary shows."""

    count: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, numbers: jax.Array) -> jax.Array:
        table = self.param("embedding", INIT, (self.count, self.width), jnp.float32)
        return jnp.take(table, numbers, axis=0, mode="fill").astype(self.dtype)


class Stem(nn.Module):
    """Embeddings of tokens, positions and segments: x [B, L, 2] -> [B, L, D]; see `Transformer` for the fields.

    Positions count the tokens, so that padding on either side gives a token the same position.
    """

    vocab_size: int
    width: int
    positions: int
    first_position: int
    segments: int
    norm_eps: float
    pre_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        # An export is traced for any number of tokens, which its tokenizer keeps within the positions.
        if isinstance(x.shape[1], int) and x.shape[1] > (most := self.positions - self.first_position):
            raise ValueError(f"texts of {x.shape[1]} tokens, but there are positions for {most}: truncate them")
        numbers = jnp.maximum(x[..., 0], 0)
        y = Embed(self.vocab_size, self.width, self.dtype, name="tok_embed")(numbers)
        table = self.param("pos_embed", INIT, (self.positions, self.width), jnp.float32)
        place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + self.first_position
        y = y + jnp.take(table, place, axis=0).astype(self.dtype)
        if self.segments:
            table = self.param("type_embed", INIT, (self.segments, self.width), jnp.float32)
            segment = jnp.clip(x[..., 1:], 0, self.segments - 1)
            for i in range(self.segments):  # few: their gradient is a sum, where that of a gather adds one by one
                y = y + jnp.where(segment == i, table[i][None, None].astype(self.dtype), 0)
        return y if self.pre_norm else nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y)


class Block(nn.Module):
    """Attention and MLP, [B, L, D] -> [B, L, D]; LayerNorm is behind each residual sum, or before each branch.

    mask: bool [B, L], the tokens that may be read. causal: none behind the token itself. dropout: of both branches.
    With `place`, int [B], -> ([B, L, D], [B, 1, D]): the token there, which must read all others, is also computed by
    itself. Where nothing reads the other tokens, XLA drops the first.
    """

    heads: int
    drop_path: float
    norm_eps: float
    act: str
    pre_norm: bool
    causal: bool
    attention: str
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array, place: Any = None) -> Any:
        attn = Attention(self.heads, self.attention, self.dtype, self.dropout, name="attn")
        mlp = Mlp(self.act, self.dtype, self.dropout, name="mlp")
        only = None if place is None else functools.partial(tokens.one, place=place)

        def attended(x):
            every = attn(x[0], mask=mask, causal=self.causal)
            return (every, attn(x[0], only, mask=mask)) if only else (every,)

        x = (x, only(x)) if only else (x,)
        for i, branch in enumerate((attended, lambda x: tuple(map(mlp, x))), 1):
            norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"norm{i}")
            y = branch(tuple(map(norm, x)) if self.pre_norm else x)
            x = jax.tree.map(jnp.add, x, DropPath(self.drop_path)(y, train))
            x = x if self.pre_norm else tuple(map(norm, x))
        return x if only else x[0]


class TokenHead(nn.Module):
    """BERT's head of masked tokens: dense, activation, LayerNorm; then the embedding of the tokens, and a bias.

    [B, L, D] -> ([B, L, D], which the transposed embedding makes logits of, and what is added to these, [V]).
    """

    vocab_size: int
    act: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = GELU[self.act](Dense(x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="transform")(x))
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        return x, self.param("token_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)


def decode(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B, L, D] by every row of a table [V, D], float32 [B, L, V]; the product has x's type."""
    return jnp.einsum("bld,vd->blv", x, table.astype(x.dtype), preferred_element_type=jnp.float32)


class Transformer(Model):
    """Transformer on tokens x int32 [B, L, 2], see tokens.py; see `Model` for what all networks share.

    The cuts: stem (embeddings), block0, block1, ..., with `pre_norm` norm (the last LayerNorm), [B, L, D + 1] each, and
    pre_logits [B, D]. `token_logits` makes logits of every token from the last of them before pre_logits.
    pooling: of the tokens into pre_logits, see tokens.pool. positions: rows of the position embedding, of which the
    first token has the one numbered first_position. segments: rows of the segment embedding; 0: none. norm_eps: of
    every LayerNorm. act: a name of transformer.GELU. pre_norm: LayerNorm before the branches instead of behind their
    sums. causal: a token reads those before it alone. token_head: without classes, the head is `TokenHead`; without
    this field the logits of tokens need no parameters but the embedding. decodes: `out` has what makes logits of
    tokens too: hidden [B, L, D], table [V, D] and, of a TokenHead, token_bias [V]; the network has no classes. fill:
    the number of a token that fills every text up to `positions`, and is read as any other; -1: none does. tied: the
    embedding was trained to make logits of tokens too.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    positions: int = 512
    first_position: int = 0
    segments: int = 0
    pooling: str = "cls"
    norm_eps: float = 1e-12
    act: str = "gelu"
    pre_norm: bool = False
    causal: bool = False
    token_head: bool = False
    decodes: bool = False
    fill: int = -1
    tied: bool = True

    @property
    def next_token(self) -> bool:
        """Whether `token_logits` are those of the next token."""
        return self.causal and self.tied

    drops_inside = True

    @property
    def cuts(self) -> tuple[str, ...]:
        behind = ("norm",) if self.pre_norm else ()
        return ("stem", *(f"block{i}" for i in range(self.depth)), *behind, "pre_logits")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: str | None = None, stop: str | None = None):
        if self.token_head and not self.num_classes and self.is_initializing():
            self.token_head_module(name="head")(jnp.zeros((1, 1, self.width), self.dtype))
        if not self.decodes or stop is not None or self.is_initializing():
            return super().__call__(x, train, start, stop)
        y, out = self.backbone(x, train, start, stop)
        hidden = out.get(self.cuts[-2], x)[..., : self.width]  # x, where that is the cut `start`
        table = self.variables["params"]["backbone"]["stem"]["tok_embed"]["embedding"]
        if not self.token_head:
            return y, {**out, "logits": y, "hidden": hidden.astype(self.dtype), "table": table}
        hidden, bias = self.token_head_module(name="head")(hidden)
        return y, {**out, "logits": y, "hidden": hidden, "table": table, "token_bias": bias}

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        own = {name: getattr(self, name) for name in ("norm_eps", "pre_norm", "dtype")}
        table = {name: getattr(self, name) for name in ("vocab_size", "positions", "first_position", "segments")}
        dropout = self.hidden_dropout if train else 0.0
        how = {"act": self.act, "causal": self.causal, "attention": self.attention, "dropout": dropout, **own}
        block, alone = functools.partial(recomputed(Block, self.remat), self.heads, **how), []
        last_norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm") if self.pre_norm else None

        def call(module, read_alone, x, mask):
            if not read_alone:
                return module(x, train, mask)
            x, one = module(x, train, mask, tokens.place(mask, self.pooling))
            alone.append(one)
            return x

        def stem(x, mask):
            return dropped(self, dropout, Stem(width=self.width, **table, **own, name="stem")(x, mask))

        def norm(x, mask):
            alone[:] = map(last_norm, alone)  # LayerNorm works token by token
            return last_norm(x)

        def pre_logits(x, mask):
            if not alone:
                return tokens.pool(x, mask, self.pooling)
            return tokens.pool(alone[0], mask.any(axis=1, keepdims=True), self.pooling)

        # Of one token that reads all others, pre_logits need no more; dropout would give it masks of its own.
        of_one = not dropout and (self.pooling == "last" or (self.pooling == "cls" and not self.causal))
        parts = [stem]
        for i, rate in enumerate(drop_path_rates(self.drop_path, self.depth)):
            its = block(drop_path=rate, name=f"block{i}")
            parts.append(functools.partial(call, its, of_one and i == self.depth - 1))
        parts += [norm, pre_logits] if self.pre_norm else [pre_logits]
        count = texts_of(self)
        if self.fill >= 0 and start is None:  # each text by itself
            x = tokens.filled(x.reshape(count * x.shape[0], x.shape[1] // count, 2), self.positions, self.fill)
            x = x.reshape(-1, count * self.positions, 2)
        return tokens.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop, count)

    @property
    def token_head_module(self):
        return functools.partial(TokenHead, self.vocab_size, self.act, self.norm_eps, self.dtype)

    def token_logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the vocabulary, float32 [B, L, V], by `model.apply(variables, hidden, method="token_logits")`.

        hidden: out[model.cuts[-2]], [B, L, D + 1] or without its last column. For a causal network those of the next
        token. They are the product with the embedding (Press & Wolf 2017, arXiv:1608.05859), behind a `TokenHead` if
        there is one. Where there is no token they mean nothing.
        """
        params: Mapping[str, Any] = self.variables["params"]
        hidden, table = hidden[..., : self.width], params["backbone"]["stem"]["tok_embed"]["embedding"]
        if not self.token_head:
            return decode(hidden.astype(self.dtype), table)
        if "transform" not in params.get("head", {}):
            raise ValueError("the network has classes in the place of a token_head: take num_classes=0 for its logits")
        hidden, bias = self.token_head_module(parent=None).apply({"params": params["head"]}, hidden)
        return decode(hidden, table) + jnp.expand_dims(bias, (0, 1))
