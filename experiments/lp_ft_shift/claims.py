"""Linear probing, fine-tuning, and one after the other, under a shift of the data."""

import functools

from tl_jax.studies.ledger import Claim, of_study

ARMS = {"probe": {"method": "linear probe"}, "full": {"method": "full, lr 5e-05"},
        "LP-FT": {"method": "LP-FT, lr 5e-05"}}  # fmt: skip
COMMANDS = ((
    "launch.py", "--study", "experiments/lp_ft_shift:weights={material}/weights/deit_tiny_patch16_224/"
    "deit_tiny_patch16_224.safetensors,root={material}/data/pacs_40", "--workdir", "{out}",
),)  # fmt: skip
NEEDS = ("weights/deit_tiny_patch16_224", "data/pacs_40")
OURS = "DeiT-tiny from 196 photos of PACS at 128 pixels, 40 steps; scored on cartoons"
PAPER = "Kumar et al. 2022, Fine-tuning can distort pretrained features"


def claim(name, says, metric, *above):
    measure = functools.partial(of_study, arms=ARMS, metric=metric)
    return Claim(name, PAPER, says, {}, 0.0, OURS, COMMANDS, NEEDS, measure, above)


CLAIMS = (
    claim("shifted", "Out of distribution a probe is above fine-tuning, and LP-FT above both.", "cartoon/accuracy",
          ("probe", "full"), ("LP-FT", "probe")),
    claim("in_distribution", "In distribution fine-tuning is above a probe, and LP-FT above both.", "accuracy",
          ("full", "probe"), ("LP-FT", "full")),
)  # fmt: skip
