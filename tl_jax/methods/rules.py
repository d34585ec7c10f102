"""Plain fine-tuning: which parts of the network train is a list of rules, the loss is cross-entropy plus penalties."""

import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from tl_jax.core import messages
from tl_jax.core.trees import FROZEN, Rules
from tl_jax.methods import Method, mixing
from tl_jax.methods.penalties import Pass, Regularizer
from tl_jax.tasks import losses

NAMES = ("linear_probe", "full", "last_k", "first_k", "blocks", "bitfit", "norm_only", "rules")


def make_rules(
    name: str, paths: Sequence[str], k: int = 0, blocks: Sequence[str] = (), rules: Rules = ()
) -> list[tuple[str, str]]:
    """The rules of a named way of fine-tuning, for a network with these parameter paths.

    All train the new head (group "head"); of the rest (group "backbone") train
      linear_probe  nothing;
      full          everything;
      last_k        the last `k` residual blocks and the final norm behind them;
      first_k       the stem and the first `k` blocks (for shifts of the input: Lee et al. 2023, surgical fine-tuning);
      blocks        the parts named in `blocks`, such as stem, stage2, stage2/block0, block3, norm;
      bitfit        biases alone (Ben Zaken et al. 2022);
      norm_only     scales and biases of the normalisation layers alone (Frankle et al. 2021).
    rules takes `rules` as given. Parameters beside the network's are a group of their own, see `beside`.
    """
    if name not in NAMES:
        raise ValueError(f"unknown method {name!r}{messages.nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    given = {"k": bool(k), "blocks": bool(blocks), "rules": bool(rules)}
    wanted = {"last_k": "k", "first_k": "k", "blocks": "blocks", "rules": "rules"}.get(name)
    if problems := [option for option in given if given[option] != (option == wanted)]:
        values = {"k": k, "blocks": list(blocks), "rules": list(rules)}
        raise ValueError(
            f"method {name!r} with {', '.join(f'{option}={values[option]!r}' for option in problems)}: "
            f"k >= 1 belongs to last_k and first_k, blocks to blocks, rules to rules, and to no other"
        )
    head, rest = ("head/.*", "head"), (".*", FROZEN)
    if name == "rules":
        return [tuple(rule) for rule in rules]
    if name == "full":
        return [head, (".*", "backbone")]
    if name == "linear_probe":
        return [head, rest]
    if name == "bitfit":
        return [head, ("backbone/.*/bias", "backbone"), rest]
    if name == "norm_only":
        return [head, (r"backbone/(.*/)?norm\d*/(scale|bias)", "backbone"), rest]
    if name == "blocks":
        return [head, *((f"backbone/{block}/.*", "backbone") for block in blocks), rest]
    all_blocks = block_names(paths)
    if k > len(all_blocks):
        raise ValueError(f"k={k}, but the network has {len(all_blocks)} blocks: {all_blocks}")
    final_norm = ["norm"] if any(path.startswith("backbone/norm/") for path in paths) else []
    chosen = all_blocks[-k:] + final_norm if name == "last_k" else ["stem", *all_blocks[:k]]
    return [head, (f"backbone/({'|'.join(chosen)})/.*", "backbone"), rest]


def beside(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Rules for what stands beside the network: a frozen reference, the weight file's head, added parameters."""
    known = {"reference": FROZEN, "source_head": "head"}
    kinds = dict.fromkeys(path.split("/")[0] for path in paths)
    return [(f"{kind}/.*", known.get(kind, kind)) for kind in kinds if kind not in ("backbone", "head")]


def block_names(paths: Sequence[str]) -> list[str]:
    """The network's residual blocks in the order of the data, such as stage1/block0 or block11."""
    names = set(parts(paths).values()) - {"stem", "norm"}
    return sorted(names, key=lambda block: [int(number) for number in re.findall(r"\d+", block)])


def parts(paths: Iterable[str]) -> dict[str, str]:
    """The part of the backbone that each path is in: stem, a block or the final norm; the head is in none."""
    found = {path: re.match(r"(?:.+/)?backbone/(stem|norm|(?:stage\d+/)?block\d+)(?:/|$)", path) for path in paths}
    return {path: match[1] for path, match in found.items() if match}


def frozen_in_front(paths: Sequence[str], moving: Sequence[str], drop_path: float = 0.0) -> int:
    """How many parts of the backbone, counted from the images, compute the same in every step.

    The parts are the stem, the blocks in order, and what is behind them. moving: the paths of trained parameters and
    of BatchNorm layers that update their statistics. With stochastic depth, blocks behind the first draw at random.
    """
    place, blocks = places([*paths, *moving]), len(block_names(paths))
    first = [place[path] for path in moving if path in place] + [blocks + 2]
    return min(first + [2] if drop_path and blocks > 1 else first)


def places(paths: Iterable[str]) -> dict[str, int]:
    """The place of each path's part on the way of the data: 0 the stem, i + 1 block i, then what is behind them."""
    part = parts(paths)
    order = {"stem": 0, **{block: i for i, block in enumerate(block_names(list(part)), 1)}}
    return {path: order.get(name, len(order)) for path, name in part.items()}


def layer_multipliers(paths: Sequence[str], decay: float) -> dict[str, float]:
    """Layer-wise learning rate decay: the factor `decay ** (depth + 1 - layer)` on each path's learning rate.

    Layer 0 is the stem, layer i + 1 block i, together with the norm behind the last one, and depth + 1 the head (Clark
    et al. 2020, ELECTRA, with timm's layers). Added parameters have the factor of the block that they stand in.
    """
    blocks = block_names(paths)
    layers = {"stem": 0, **{block: i + 1 for i, block in enumerate(blocks)}, "norm": len(blocks)}
    part = parts(paths)
    return {path: decay ** (len(blocks) + 1 - layers.get(part.get(path), len(blocks) + 1)) for path in paths}


def make_method(
    rules: Rules,
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    regularizers: Sequence[Regularizer] = (),
) -> Method:
    """Cross-entropy plus the penalties of `regularizers`.

    mixup and cutmix are Beta parameters (0: off); with both on, each step draws one.
    """

    def mix(key, images, targets):
        choice_key, mix_key = jax.random.split(key)
        if mixup and cutmix:
            both = [lambda *args: mixing.mixup(*args, mixup), lambda *args: mixing.cutmix(*args, cutmix)]
            return jax.lax.switch(jax.random.bernoulli(choice_key).astype(jnp.int32), both, mix_key, images, targets)
        if mixup:
            return mixing.mixup(mix_key, images, targets, mixup)
        return mixing.cutmix(mix_key, images, targets, cutmix) if cutmix else (images, targets)

    def loss(params, batch_stats, batch, forward, key):
        mix_key, forward_key = jax.random.split(key)
        images = batch["image"].astype(jnp.float32)
        images, targets = mix(mix_key, images, losses.smooth_labels(batch["label"], num_classes, label_smoothing))
        logits, out, new_batch_stats = forward(params, batch_stats, images, forward_key)
        per_example = losses.cross_entropy(logits, targets)
        penalty = jnp.zeros(())
        for i, regularizer in enumerate(regularizers):
            seen = Pass(
                params, batch_stats, images, targets, batch["label"], logits, out, forward,
                jax.random.fold_in(forward_key, i),
            )  # fmt: skip
            penalty = penalty + regularizer.penalty(seen)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        sums = {
            "loss": per_example.sum(),
            "penalty": penalty * len(per_example),
            "accuracy": correct.sum(dtype=jnp.float32),
        }
        return per_example.mean() + penalty, (new_batch_stats, sums)

    return Method(rules, loss)
