"""Which part of a network is tuned best under which shift."""

import functools

from tl_jax.studies.ledger import Claim, of_study

COMMANDS = (
    ("experiments/surgical_shift/prepare.py", "{out}/data"),
    ("launch.py", "--study", "experiments/surgical_shift:root={out}/data", "--workdir", "{out}/study"),
)
OURS = "ResNet-8 on digits, three stages, 100 steps at a rate of 0.01 for every part; one shift of each kind"
PARTS = ("first", "last", "head", "all")


def measure(out, shift):
    arms = {part: {"shift": shift, "trained": part, "rate": "0.01"} for part in PARTS}
    return of_study(out / "study", arms)


def claim(shift, says, *above):
    paper = "Lee et al. 2023, Surgical fine-tuning improves adaptation to distribution shifts"
    return Claim(shift, paper, says, {}, 0.0, OURS, COMMANDS, (), functools.partial(measure, shift=shift), above)


CLAIMS = (
    claim("input", "If the input has changed, the first block alone is above all layers, and above the last.",
          ("first", "all"), ("first", "last")),
    claim("label", "If the labels have changed, the last layers alone are above all layers, and above the first.",
          ("last", "all"), ("last", "first")),
)  # fmt: skip
