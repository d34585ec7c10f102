"""Rules that choose what trains, and the order of the parts of a network."""

import re
from collections.abc import Iterable, Mapping, Sequence

from tl_jax.core import messages
from tl_jax.core.trees import FROZEN, Rules
from tl_jax.methods import recipes

NAMES = ("linear_probe", "full", "last_k", "first_k", "blocks", "bitfit", "norm_only", "rules")
PROBES = ("knn", "logistic", "ridge", "tip_adapter", "none")  # which follow no rules
WORDS = {  # of other libraries
    "full": "finetune fine_tune finetuning fine_tuning full_finetune full_finetuning all end_to_end",
    "linear_probe": "linear probe head head_only linear_probing feature_extraction feature_extract frozen freeze",
    "last_k": "last last_layers top_k partial unfreeze",
}
HEAD = ("head/.*", "head")
FUSE = ("backbone/fuse/.*", "head")  # what joins the parts of a fusion is as new as its head
FINAL = ("norm", "final")  # what may lie behind the last block: a norm, or layers of any kind


def make_rules(
    name: str, paths: Sequence[str], cuts: Sequence[str], k: int = 0, blocks: Sequence[str] = (), rules: Rules = ()
) -> list[tuple[str, str]]:
    """The rules of a named way of fine-tuning, for a network with these parameter paths and cuts.

    All train the new head and what joins the parts of a fusion (group "head"); of the rest (group "backbone") train
      linear_probe  nothing;
      full          everything;
      last_k        the last `k` blocks and the norm or layers behind them;
      first_k       the stem and the first `k` blocks (for shifts of the input: Lee et al. 2023, surgical fine-tuning);
      blocks        the parts named in `blocks`, such as stem, stage2, stage2/block0, block3, norm;
      bitfit        biases alone (Ben Zaken et al. 2022);
      norm_only     scales and biases of the normalisation layers alone (Frankle et al. 2021).
    rules takes `rules` as given. What is neither backbone nor head has rules of its own, see `auxiliary`.
    """
    if name not in NAMES:
        raise ValueError(f"unknown method {name!r}{_unknown(name)}; known: {', '.join((*NAMES, *PROBES))}")
    values = {"k": k, "blocks": list(blocks), "rules": list(rules)}
    wanted = {"last_k": "k", "first_k": "k", "blocks": "blocks", "rules": "rules"}.get(name)
    if wrong := [f"{option}={value!r}" for option, value in values.items() if bool(value) != (option == wanted)]:
        owners = "k >= 1 belongs to last_k and first_k, blocks to blocks, rules to rules, and to no other"
        raise ValueError(f"method {name!r} with {', '.join(wrong)}: {owners}")
    if name == "rules":
        return [tuple(rule) for rule in rules]
    new = [
        rule for rule, begin in ((HEAD, "head/"), (FUSE, "backbone/fuse/")) if any(p.startswith(begin) for p in paths)
    ]
    if name == "full":
        return [*new, (".*", "backbone")]
    all_blocks = block_names(paths, cuts)
    if k > len(all_blocks):
        raise ValueError(f"k={k}, but the network has {len(all_blocks)} blocks: {all_blocks}")
    behind = [name for name in FINAL if any(path.startswith(f"backbone/{name}/") for path in paths)]
    trained = {
        "linear_probe": [],
        "last_k": [f"({'|'.join(all_blocks[-k:] + behind)})/.*"],
        "first_k": [f"({'|'.join(['stem', *all_blocks[:k]])})/.*"],
        "blocks": [f"{block}/.*" for block in blocks],
        "bitfit": [".*/bias"],
        "norm_only": [r"(.*/)?norm\d*/(scale|bias)"],
    }
    return [*new, *((f"backbone/{regex}", "backbone") for regex in trained[name]), (".*", FROZEN)]


def _unknown(name: str) -> str:
    """What an unknown method.name may be about: a way of several options, another library's word, a slip."""
    if changes := recipes.methods(10.0).get(name):
        told = " and ".join(f"{key} = {value!r}" for key, value in changes.items())
        return f", which is more than a choice of what trains: --config configs/methods.py:{name},... or {told}"
    meant = next((ours for ours, words in WORDS.items() if name.lower().replace("-", "_") in words.split()), "")
    return f" (it is {meant!r} here)" if meant else messages.nearest(name, (*NAMES, *recipes.METHODS))


def auxiliary(paths: Sequence[str], groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rules for all but backbone and head: further networks by `groups`, added parameters by their own name."""
    kinds = dict.fromkeys(path.split("/")[0] for path in paths)
    return [(f"{kind}/.*", groups.get(kind, kind)) for kind in kinds if kind not in ("backbone", "head")]


def block_names(paths: Iterable[str], cuts: Sequence[str]) -> list[str]:
    """The network's residual blocks in the order of its cuts, such as stage1/block0 or block11."""
    return sorted(set(parts(paths).values()) - {"stem", *FINAL}, key=lambda block: _place(block, cuts))


def parts(paths: Iterable[str]) -> dict[str, str]:
    """The part of the backbone that each path of it is in: stem, a block or what is behind the last one."""
    found = {
        path: re.match(r"(?:.+/)?backbone/(stem|norm|final|(?:stage\d+/)?block\d+)(?:/|$)", path) for path in paths
    }
    return {path: match[1] for path, match in found.items() if match}


def frozen_cuts(trained: Iterable[str], cuts: Sequence[str]) -> int:
    """How many cuts, from the input on, depend on no `trained` path: of parameters or of updated statistics."""
    return min([*places(trained, cuts).values(), len(cuts)])


def places(paths: Iterable[str], cuts: Sequence[str]) -> dict[str, int]:
    """The index of the first cut that each path of the backbone acts on; added parameters have that of their layer."""
    found = {path: re.match(r"(?:.+/)?backbone/(.+)", path) for path in paths}
    return {path: _place(match[1], cuts) for path, match in found.items() if match}


def _place(path: str, cuts: Sequence[str]) -> int:
    """The cut whose name begins the path, the longest such name; that of what has none, the final norm, is the last."""
    begins = [i for i, cut in enumerate(cuts) if f"{path}/".startswith(f"{cut}/")]
    return max(begins, key=lambda i: len(cuts[i]), default=len(cuts) - 1)


def layer_multipliers(
    paths: Iterable[str], cuts: Sequence[str], decay: float, parts: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float]:
    """Layer-wise learning rate decay: the factor `decay ** (depth + 1 - layer)` on each path's learning rate.

    Layer 0 is the stem, layer i + 1 block i (the last with what lies behind it), depth + 1 the head, as in timm
    (Clark et al. 2020, ELECTRA). Added parameters have the factor of their block. parts: of a fusion, the cuts of the
    network of each part, which counts its own layers; what joins them is as the head.
    """
    if parts:
        found = dict.fromkeys(paths, 1.0)
        for kind, its in parts.items():
            inner = {p: re.sub(rf"^((?:.+/)?backbone/){kind}/", r"\1", p) for p in found}
            inner = {path: own for path, own in inner.items() if own != path}
            factors = layer_multipliers(inner.values(), its, decay)
            found |= {path: factors[own] for path, own in inner.items()}
        return found
    depth = sum(cut not in FINAL for cut in cuts) - 2  # without the stem and pre_logits
    layers = {path: min(place, depth) for path, place in places(paths, cuts).items()}
    return {path: decay ** (depth + 1 - layers.get(path, depth + 1)) for path in paths}
