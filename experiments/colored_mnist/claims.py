"""What a rule of selection sees of the methods that generalise."""

from tl_jax.core import files
from tl_jax.studies.ledger import Claim
from tl_jax.studies.report import statistics

COMMANDS = (
    ("experiments/colored_mnist/prepare.py", "{material}/data/digits", "{out}/data"),
    ("launch.py", "--study", "experiments/colored_mnist:root={out}/data", "--workdir", "{out}/study"),
    ("experiments/colored_mnist/study.py", "{out}/study"),
)
OURS = "an MLP on 6,400 images, ten draws of the options; DomainBed: a convolutional network on 50,000, twenty draws"
ARMS = {f"{method}, {rule}": (method, rule) for method in ("IRM", "ERM") for rule in ("oracle", "train-val")}


def measure(out):
    found = files.read_json(out / "study" / "rules.json")
    values = {arm: found[method][rule] for arm, (method, rule) in ARMS.items()}
    rows = {arm: statistics.mean_interval(each) for arm, each in values.items()}
    rows |= {f"{a} - {b}": statistics.paired(values[a], values[b]) for a in values for b in values if a != b}
    return {name: (row["mean"], row["low"], row["high"]) for name, row in rows.items()}


CLAIMS = (
    Claim("selection", "Gulrajani & Lopez-Paz 2021, In search of lost domain generalization (ColoredMNIST, -90 %)",
          "Chosen on the training domains IRM is no better than ERM; chosen with target labels it is, by far.",
          {"ERM, train-val": 10.0, "IRM, train-val": 10.2, "ERM, oracle": 28.7, "IRM, oracle": 58.5}, 1.0, OURS,
          COMMANDS, ("data/digits",), measure),
)  # fmt: skip
