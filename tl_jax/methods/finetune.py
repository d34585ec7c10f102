"""Plain fine-tuning: which blocks train is a list of rules, the loss is cross-entropy."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tl_jax import losses
from tl_jax.methods import Method
from tl_jax.trees import FROZEN, Rules

NAMES = ("linear_probe", "full", "last_k", "rules")
BLOCK = re.compile(r"backbone/((?:stage\d+/)?block\d+)/.*")


def make_rules(name: str, paths: Sequence[str], last_k: int = 0, rules: Rules = ()) -> Rules:
    """The rules of a named way of fine-tuning, for a network with these parameter paths.

    linear_probe trains the head; full trains everything; last_k trains the head, the last `last_k` residual blocks and
    the final norm behind them; rules takes `rules` as given. The head is the group "head", the rest "backbone".
    """
    if name not in NAMES:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(NAMES)}")
    if (name == "rules") != bool(rules):
        raise ValueError(f"method {name!r} with rules {list(rules)}: rules belong to method 'rules', and only to it")
    if last_k < 0 or (name == "last_k") != bool(last_k):
        raise ValueError(
            f"method {name!r} with last_k={last_k}: last_k >= 1 belongs to method 'last_k', and only to it"
        )
    head, rest = ("head/.*", "head"), (".*", FROZEN)
    if name == "rules":
        return [tuple(rule) for rule in rules]
    if name == "full":
        return [head, (".*", "backbone")]
    if name == "linear_probe":
        return [head, rest]
    blocks = sorted({match[1] for match in map(BLOCK.fullmatch, paths) if match}, key=_natural)
    if last_k > len(blocks):
        raise ValueError(f"last_k={last_k}, but the network has {len(blocks)} blocks: {blocks}")
    final_norm = ["norm"] if any(path.startswith("backbone/norm/") for path in paths) else []
    chosen = "|".join(blocks[-last_k:] + final_norm)
    return [head, (f"backbone/({chosen})/.*", "backbone"), rest]


def _natural(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]


def make_method(
    rules: Rules, *, num_classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0
) -> Method:
    """Cross-entropy fine-tuning; mixup and cutmix are Beta parameters (0: off); with both on, each step draws one."""

    def mix(key, images, targets):
        choice_key, mix_key = jax.random.split(key)
        if mixup and cutmix:
            both = [lambda *args: losses.mixup(*args, mixup), lambda *args: losses.cutmix(*args, cutmix)]
            return jax.lax.switch(jax.random.bernoulli(choice_key).astype(jnp.int32), both, mix_key, images, targets)
        if mixup:
            return losses.mixup(mix_key, images, targets, mixup)
        return losses.cutmix(mix_key, images, targets, cutmix) if cutmix else (images, targets)

    def loss(params, batch_stats, batch, forward, key):
        mix_key, forward_key = jax.random.split(key)
        images = batch["image"].astype(jnp.float32)
        images, targets = mix(mix_key, images, losses.smooth_labels(batch["label"], num_classes, label_smoothing))
        logits, _, batch_stats = forward(params, batch_stats, images, forward_key)
        per_example = losses.cross_entropy(logits, targets)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return per_example.mean(), (
            batch_stats,
            {"loss": per_example.sum(), "accuracy": correct.sum(dtype=jnp.float32)},
        )

    return Method(rules, loss)
