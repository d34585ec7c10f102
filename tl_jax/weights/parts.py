"""The parts of a fusion, models/fusion.py: each is loaded from its own weights, and joined they are one network."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from tl_jax.core import checks, messages, trees
from tl_jax.core.card import Card
from tl_jax.models import fusion as networks
from tl_jax.weights import load as pretrained
from tl_jax.weights.text_inputs import NO_TEXT, Text

KINDS = ("image", "text", "table")  # the order of the parts, where none is given


def load(
    parts: Mapping[str, Mapping[str, Any]],
    fusion: Mapping[str, Any],
    num_classes: int,
    *,
    columns: Sequence[str] = (),
    text: Text = NO_TEXT,
    channels: int = 0,
    head: Sequence = (),
    head_init: str = "zeros",
    seed: int = 0,
) -> pretrained.Loaded:
    """A fusion of networks by name, {kind of input: {name, weights, image_size}}, with a new head.

    fusion: fields of `models.fusion.Fusion`, such as kind and width, and the order of the parts. columns: of the part
    for a table. text: of that for texts. channels: of that for images. The parts begin from their weights without their
    heads, what joins them from `seed`. Of an early fusion the layers that make a part's pre_logits are left out.
    ValueError for what does not fit, and for a part whose network reads another input.
    """
    _check(fusion, parts)
    found, order = {}, fusion.get("order") or KINDS
    for kind in sorted(parts, key=order.index):
        given = parts[kind]
        how = {"table": {"columns": columns}, "text": {"text": text}, "image": {"channels": channels}}[kind]
        loaded = pretrained.load(
            given["name"], given.get("weights", ""), 0, seed=seed, image_size=given.get("image_size") or None, **how
        )
        if loaded.card.input != kind:
            raise ValueError(f"the part {kind!r} is {given['name']}, which reads an input {loaded.card.input!r}")
        found[kind] = loaded
    drop = tuple((kind, float(rate)) for kind, rate in fusion.get("drop", {}).items() if rate)
    fields = {name: value for name, value in sorted(fusion.items()) if name not in ("drop", "order")}
    card = Card(
        networks.CARD.model, num_classes, mean=(), std=(), input="several", head=tuple(head) if num_classes else (),
        parts=tuple(loaded.card.replace(sha256=loaded.sha256) for loaded in found.values()),
        fusion=tuple((fields | ({"drop": drop} if drop else {})).items()),
    )  # fmt: skip
    begun = pretrained.new(card, head_init, seed)
    given = {
        path.replace("/backbone/", f"/backbone/{kind}/", 1): (leaf, loaded.origins[path])
        for kind, loaded in found.items()
        for path, leaf in trees.flatten(loaded.variables).items()
    }
    given = {path: pair for path, pair in given.items() if path in begun.origins}
    variables = trees.merge(begun.variables, {path: leaf for path, (leaf, _) in given.items()})
    hashes = {kind: loaded.sha256 for kind, loaded in found.items()}
    return begun._replace(
        variables=jax.device_put(variables),
        origins={**begun.origins, **{path: origin for path, (_, origin) in given.items()}},
        sha256=messages.fingerprint(hashes) if any(hashes.values()) else "",
    )


def _check(fusion: Mapping[str, Any], parts: Collection[str]) -> None:
    """Raises one ValueError for what makes no network."""
    fields = {name: fusion.get(name, getattr(networks.Fusion, name)) for name in ("kind", "width", "heads")}
    problems = [] if len(parts) > 1 else [f"a fusion has two parts or three, of different inputs; found {list(parts)}"]
    if fields["kind"] == "early" and fields["width"] % fields["heads"]:
        problems.append(f"width = {fields['width']} is no multiple of heads = {fields['heads']}")
    if "order" in fusion and sorted(fusion["order"]) != sorted(parts):
        problems.append(f"order names {', '.join(fusion['order'])}, and the parts are {', '.join(parts)}")
    unknown = [kind for kind in fusion.get("drop", {}) if kind not in parts]
    problems += [f"drop names {kind!r}, and the parts are {', '.join(parts)}" for kind in unknown]
    if fields["kind"] == "late":
        problems += [f"{name} belongs to kind = 'early'" for name in ("depth", "heads") if name in fusion]
    elif "merge" in fusion:
        problems.append("merge belongs to kind = 'late'")
    checks.refuse("the fusion cannot be made", problems)
