"""A network of networks with one head: each part reads one kind of input, and what they give is joined.

Late: the pre_logits of the parts, projected to one width, are concatenated or summed. Early: their tokens pass
transformer blocks together, as in ViLT and its relatives (Kim et al. 2021, arXiv:2102.03334, section 3.1).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.core.fields import PRESENT
from tl_jax.models import conversion, text, tokens
from tl_jax.models.layers import Dense, refuse_drop_path
from tl_jax.models.transformer import INIT
from tl_jax.models.variant import Model, Variant

EPS = 1e-6  # of every LayerNorm
SHARED = ("dtype", "remat", "attention", "frozen_norms", "axis_name", "norm_momentum", "fold")  # as in the whole
OWN = ("parent", "name", "num_classes", "head", "head_init", "dropout", "hidden_dropout", "drop_path", "inner", *SHARED)
Inputs = Mapping[str, jax.Array]


class Part(NamedTuple):
    """A network that reads one kind of input: its class, and the fields that are its own."""

    kind: str
    network: type[Model]
    fields: tuple[tuple[str, Any], ...]

    def make(self, **more: Any) -> Model:
        return self.network(num_classes=0, inner=True, **dict(self.fields), **more)


def part_of(kind: str, network: Model) -> Part:
    """The part that computes as `network` does without its head."""
    names = [field.name for field in dataclasses.fields(network) if field.init and field.name not in OWN]
    return Part(kind, type(network), tuple((name, getattr(network, name)) for name in names))


class Project(nn.Module):
    """LayerNorm and a dense layer, [..., D] -> [..., width]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x)
        return Dense(self.width, kernel_init=INIT, dtype=self.dtype, name="proj")(x)


class Late(nn.Module):
    """Features {kind: [B, D]} -> [B, width] or [B, parts * width]; there: {kind: bool [B]}.

    In place of the projection of a missing input stands a learned vector.
    """

    width: int
    merge: str
    dtype: Any

    @nn.compact
    def __call__(self, features: Inputs, there: Inputs) -> jax.Array:
        found = []
        for kind, x in features.items():
            missing = self.param(f"{kind}_missing", INIT, (self.width,), jnp.float32).astype(self.dtype)
            y = Project(self.width, self.dtype, name=kind)(x)
            found.append(jnp.where(there[kind][:, None], y, missing[None]))
        return sum(found) if self.merge == "sum" else jnp.concatenate(found, axis=-1)


class Early(nn.Module):
    """Tokens {kind: [B, N, D]} -> the class token behind `depth` blocks, [B, width]; there: {kind: bool [B]}.

    masks: {kind: bool [B, N]} of inputs with padding. Each kind has an embedding that is added to its tokens, and a
    learned token that is read in their place where the input is missing.
    """

    width: int
    depth: int
    heads: int
    remat: str
    attention: str
    dtype: Any

    @nn.compact
    def __call__(self, features: Inputs, masks: Inputs, there: Inputs, train: bool) -> jax.Array:
        def learned(name):
            return self.param(name, INIT, (self.width,), jnp.float32).astype(self.dtype)[None, None]

        batch = len(next(iter(there.values())))

        def token(vector):
            return jnp.broadcast_to(vector, (batch, 1, self.width))

        found, read = [token(learned("cls_token"))], [jnp.ones((batch, 1), bool)]
        for kind, x in features.items():
            y = Project(self.width, self.dtype, name=kind)(x) + learned(f"{kind}_embed")
            mask, here = masks.get(kind, jnp.ones(x.shape[:2], bool)), there[kind][:, None]
            found += [token(learned(f"{kind}_missing")), y]
            read += [~here, here & mask]
        x, mask = jnp.concatenate(found, axis=1), jnp.concatenate(read, axis=1)
        block = text.recomputed(text.Block, self.remat)
        for i in range(self.depth):
            how = {"norm_eps": EPS, "act": "gelu", "pre_norm": True, "causal": False, "attention": self.attention}
            x = block(self.heads, 0.0, **how, dtype=self.dtype, name=f"block{i}")(x, train, mask)
        return nn.LayerNorm(epsilon=EPS, dtype=jnp.float32, name="norm")(x[:, 0])


class Fusion(Model):
    """x: {kind: what its part reads}, and {kind + ":present": bool [B]}, without which all are there; see `Model`.

    The cuts: those of each part, image/stem, image/block0, ..., of which the last, its output, has the name of the part
    alone; and pre_logits. At a cut x holds the outputs of the parts up to it, and what the others read. Behind a part
    there are its pre_logits [B, D], or with kind="early" the output of the cut before it. So nothing that a part gives
    depends on another, and the parts that come first can be frozen while the others train.

    parts: in order. kind: "late" or "early". width: that all are projected to. merge: of late, "concat" or "sum".
    depth, heads: of the blocks of early. drop: pairs (kind, probability that training leaves that input out); an
    example of which all would be left out keeps them.
    """

    parts: tuple[Part, ...] = ()
    kind: str = "late"
    width: int = 256
    merge: str = "concat"
    depth: int = 2
    heads: int = 4
    drop: tuple[tuple[str, float], ...] = ()

    def of_part(self, one: Part) -> tuple[str, ...]:
        """The cuts of a part that are run, by its own names."""
        cuts = one.make(parent=None).cuts
        return cuts if self.kind == "late" else cuts[:-1]

    @property
    def towers(self) -> dict[str, tuple[str, ...]]:
        """The cuts of each part, by the names that they have here."""
        inner = {part.kind: self.of_part(part)[:-1] for part in self.parts}
        return {kind: (*(f"{kind}/{cut}" for cut in cuts), kind) for kind, cuts in inner.items()}

    @property
    def cuts(self) -> tuple[str, ...]:
        return (*(cut for tower in self.towers.values() for cut in tower), "pre_logits")

    @property
    def deterministic_cuts(self) -> tuple[str, ...]:
        return self.cuts[:-1]  # modality dropout, and a frozen prefix is kept part by part

    @property
    def networks(self) -> dict[str, tuple[str, ...]]:
        """All cuts of the network of each part, by its own names."""
        return {part.kind: part.make(parent=None).cuts for part in self.parts}

    @nn.compact_name_scope
    def backbone(self, x: Inputs, train: bool, start: str | None, stop: str | None):
        refuse_drop_path(self)
        cuts = self.cuts
        for argument, name in {"start": start, "stop": stop}.items():
            if name is not None and name not in cuts:
                raise ValueError(f"{argument}={name!r} is no cut of this model; its cuts: {list(cuts)}")
        first, last = cuts.index(start) + 1 if start else 0, cuts.index(stop) if stop else len(cuts)
        if start == cuts[-1]:
            return x, {}
        x, out, shared = dict(x), {}, {name: getattr(self, name) for name in SHARED}
        for part in self.parts:
            names, own = self.towers[part.kind], self.of_part(part)
            places = [cuts.index(name) for name in names]
            if part.kind not in x or first > places[-1] or last < places[0]:
                continue
            begin = own[places.index(first - 1)] if first - 1 in places else None
            end = own[places.index(last)] if last in places else own[-1]
            x[part.kind], found = part.make(**shared, name=part.kind)(x[part.kind], train, begin, end)
            out |= {names[own.index(name)]: value for name, value in found.items()}
        if stop is not None and stop != cuts[-1]:
            return x, out
        out["pre_logits"] = self.joined(x, train).astype(jnp.float32)
        return out["pre_logits"], out

    @nn.nowrap
    def joined(self, x: Inputs, train: bool) -> jax.Array:
        """What the parts gave, as one vector [B, D]."""
        kinds = [part.kind for part in self.parts]
        count = len(x[kinds[0]])
        there = {kind: x.get(f"{kind}{PRESENT}", jnp.ones(count, bool)) for kind in kinds}
        there = self.left_out(there) if train and self.drop else there
        features = {kind: x[kind] for kind in kinds}
        if self.kind == "late":
            return Late(self.width, self.merge, self.dtype, name="fuse")(features, there)
        masks = {}
        if "text" in features:  # the last column of its tokens
            masks["text"] = tokens.mask_of(features["text"])
            features["text"] = features["text"][..., :-1]
        features = {kind: y.reshape(count, -1, y.shape[-1]) for kind, y in features.items()}
        how = (self.width, self.depth, self.heads, self.remat, self.attention, self.dtype)
        return Early(*how, name="fuse")(features, masks, there, train)

    @nn.nowrap
    def left_out(self, there: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`there` without what modality dropout leaves out."""
        rates, key, kept = dict(self.drop), self.make_rng("dropout"), {}
        for i, (kind, here) in enumerate(there.items()):
            lost = jax.random.bernoulli(jax.random.fold_in(key, i), rates.get(kind, 0.0), here.shape)
            kept[kind] = here & ~lost
        some = jnp.stack(list(kept.values())).any(axis=0)
        return {kind: jnp.where(some, kept[kind], here) for kind, here in there.items()}


CARD = Card("fusion", 0, mean=(), std=(), input="several")
LAYOUTS = {"native": conversion.NATIVE}


def variant_of(name: str) -> Variant | None:
    """The network of parts that a card names; None where another name is asked for."""
    return Variant(functools.partial(Fusion), CARD, LAYOUTS, {}) if name == CARD.model else None
