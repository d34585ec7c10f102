"""Which rule of selection sees that a method generalises: ERM, IRM, V-REx and GroupDRO on ColoredMNIST?

A digit is below 5 or not, with a quarter of the labels wrong. Its colour agrees with the label in 90 and in 80 % of
the two training environments, and in 10 % of the target. The network of Arjovsky et al. (2019) is trained for 600 steps
with ten draws of the options from the ranges of their own random search; the first draw is what they published.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.core import files
from tl_jax.studies import store
from tl_jax.studies.report import selection
from tl_jax.studies.study import Study

SOURCES, TARGET = ("e10", "e20"), "e90"  # files of prepare.py
DRAWS, STEPS = 10, 600
ETAS = (0.001, 0.01, 0.1)  # of DomainBed's range; an argument of a term is the same in all replicas
RULES = {"train-val": "source_risk", "oracle": "oracle at the last step", "no choice": "last"}
RESULT = "result.json"
METHODS = ("ERM", "IRM", "V-REx", "GroupDRO")


def draw(method: str, i: int) -> dict:
    """The options of draw i of a method, from the ranges of Arjovsky et al.; 0: those they published."""
    rng = np.random.default_rng((METHODS.index(method), i))

    def power(low: float, high: float, published: float) -> float:
        value = 10 ** rng.uniform(low, high)
        return float(f"{value if i else published:.3g}")

    options: dict = {"lr": power(-3.5, -2.5, 4.9e-4), "weight_decay": 2 * power(-5, -2, 1.1e-3)}  # of l2 |w|^2: 2 l2 w
    if method == "GroupDRO":
        options["terms"] = {"groupdro": {"eta": ETAS[(i + 1) % 3]}}
    elif method != "ERM":
        weight, start = power(2, 6, 9.13e4), int(rng.integers(50, 251)) if i else 190
        name = method.replace("-", "").lower()
        options["terms"] = {name: {"weight": ("step", {"first": 1.0, "value": weight, "at": start / STEPS})}}
    return options


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER, what prepare.py made, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root = given.pop("root", "colored")
    model = given.pop("model", "mlp_colored_mnist")
    base = transfer.get_config(f"model={model},method=full")
    with base.unlocked():
        base.model.head_init = "xavier"
        base.data.source = tuple(f"arrays:{root}/{name}.npz" for name in SOURCES)
        base.data.train, base.data.val, base.data.test = "train", "val", ""
        target = f"arrays:{root}/{TARGET}.npz"
        base.data.extra_eval = (("target", target, "test"),)
        base.data.candidates = ("oracle", target, "val")
        base.batch_size = 512  # 256 of each environment
        base.optimizer, base.clip, base.schedule.name = "adam", 0.0, "constant"
        base.total = (float(STEPS), "steps")
        base.log_every, base.eval_every = (100.0, "steps"), (100.0, "steps")
        base.select = "last"
        base.resamples = 200
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"draw": {f"{method} {i}": draw(method, i) for method in METHODS for i in range(DRAWS)}},
        seeds=(0, 1, 2),
        metrics=("target/accuracy", "accuracy"),
        together="all",
    )


def main(folder: pathlib.Path) -> None:
    """Prints the mean and the standard error over seeds, in %, of each method under three rules of selection.

    folder/rules.json gets {method: {rule: [accuracy of each seed]}}.
    """
    known = {}
    runs = [row for row in store.read_plan(folder)["runs"] if (store.run_folder(folder, row["key"]) / RESULT).exists()]
    print("\t".join(["method", "runs", *RULES]))
    for method in METHODS:
        own = [row for row in runs if row["levels"]["draw"].rpartition(" ")[0] == method]
        found: dict[str, list[float]] = {rule: [] for rule in RULES}
        for seed in sorted({row["seed"] for row in own}):
            pairs = [
                (row["levels"]["draw"], store.run_folder(folder, row["key"])) for row in own if row["seed"] == seed
            ]
            home = folder / "selected" / f"{method}_{seed}"  # gets choices.json
            home.mkdir(parents=True, exist_ok=True)
            rows = {row["selector"]: row for row in selection.over_runs({str(seed): pairs}, home)["rows"]}
            for rule, name in RULES.items():
                found[rule].append(100 * rows[name]["accuracy"])
            print(f"  {method}, seed {seed}: {[rows[name]['chosen'] for name in RULES.values()]}", file=sys.stderr)
        known[method] = found
        cells = [f"{np.mean(x):.1f} +- {np.std(x, ddof=1) / len(x) ** 0.5:.1f}" for x in found.values() if len(x) > 1]
        print("\t".join([method, str(len(own)), *cells]))
    files.write_json(folder / "rules.json", known)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/colored_mnist/study.py W, behind --study ... --workdir W")
    main(pathlib.Path(sys.argv[1]))
