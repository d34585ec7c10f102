"""Published accuracies of classic transfer on Office-Caltech10 with SURF features, in percent."""

import csv

from tl_jax.studies.ledger import Claim

COMMANDS = (("experiments/office_caltech/run.py", "{material}/data/office_caltech10_surf", "{out}"),)
FAMILY = "the first of two families of published tables, which disagree"


def of(method):
    """The accuracies of a method with 1-NN on two tasks, from table.csv; nothing is random, so intervals are points."""

    def measure(out):
        with (out / "table.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if (row["method"], row["classifier"]) == (method, "1nn")]
        values = {row["task"]: 100 * float(row["accuracy_value"]) for row in rows}
        return {task: (values[task],) * 3 for task in ("C-A", "C-W")}

    return measure


def claim(method, title, paper, numbers, tolerance):
    published = dict(zip(("C-A", "C-W"), numbers, strict=True))
    says, needs = f"{title} and 1-NN, from Caltech to Amazon and to Webcam.", ("data/office_caltech10_surf",)
    return Claim(method, paper, says, published, tolerance, FAMILY, COMMANDS, needs, of(method))


CLAIMS = (
    claim("none", "No adaptation", "Gong et al. 2012, Long et al. 2013", (23.70, 25.76), 0.01),
    claim("pca", "PCA", "Long et al. 2013", (36.95, 32.54), 0.01),
    claim("gfk", "The geodesic flow kernel", "Gong et al. 2012, as in Long et al. 2013", (41.02, 40.68), 0.01),
    claim("tca", "Transfer component analysis", "Pan et al. 2011, as in Long et al. 2013", (38.20, 38.64), 0.15),
    claim("jda", "Joint distribution adaptation", "Long et al. 2013", (44.78, 41.69), 0.15),
)
