"""What adaptation adds between sets of digits."""

import functools

from tl_jax.studies.ledger import Claim, of_study

COMMANDS = (
    ("experiments/digits_domains/prepare.py", "{material}/data/digits", "{out}/data"),
    ("launch.py", "--study", "experiments/digits_domains:root={out}/data,task=usps-mnist,methods=few", "--workdir",
     "{out}/study"),
)  # fmt: skip
OURS = "3,000 steps of 36 + 36 images, TLLib 50,000 of 128 + 128; the 10,000 test images of MNIST; three seeds"
PAPERS = {
    "DANN": ("dann", "Ganin et al. 2016, in TLLib's table of digits"),
    "DAN": ("mmd", "Long et al. 2015, in TLLib's table of digits"),
    "MCC": ("mcc", "Jin et al. 2020, in TLLib's table of digits"),
}


def measure(out, arms):
    return of_study(out / "study", arms, "target_test/accuracy")


def claim(title, method, paper):
    arms = {title: {"method": method}, "source only": {"method": "source only"}}
    says = f"From USPS to MNIST {title} is above the source alone."
    how = functools.partial(measure, arms=arms)
    return Claim(f"usps_mnist_{method}", paper, says, {}, 0.0, OURS, COMMANDS, ("data/digits",), how,
                 ((title, "source only"),))  # fmt: skip


CLAIMS = tuple(claim(title, *row) for title, row in PAPERS.items())
