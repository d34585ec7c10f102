"""How far down the layers of a network are general."""

from tl_jax.studies.ledger import Claim, of_study

COMMANDS = (
    ("experiments/yosinski/prepare.py", "{out}/data"),
    ("launch.py", "--study", "experiments/yosinski:root={out}/data", "--workdir", "{out}/study"),
)
PAPER = "Yosinski et al. 2014, How transferable are features in deep neural networks?, figure 2"
OURS = "ResNet-8 of four parts on 37 classes of rendered letters, 300 steps"
ARMS = {"B from random weights": {"copied": "0", "from": "B"}, "A1B": {"copied": "1 frozen", "from": "A"},
        "A4B": {"copied": "4 frozen", "from": "A"}, "B4B": {"copied": "4 frozen", "from": "B"},
        "A4B+": {"copied": "4 trained", "from": "A"}}  # fmt: skip


def measure(out):
    return of_study(out / "study", ARMS)


CLAIMS = (
    Claim("specific", PAPER, "Frozen layers of another task are worse the more of them are copied, and than one's own.",
          {}, 0.0, OURS, COMMANDS, (), measure, (("A1B", "A4B"), ("B4B", "A4B"))),
    Claim("boost", PAPER, "Layers of another task that are trained further are better than random ones.",
          {}, 0.0, OURS, COMMANDS, (), measure, (("A4B+", "B from random weights"),)),
)  # fmt: skip
