"""Leave-one-out accuracy of the nearest neighbour on scikit-learn's digits, printed:

python experiments/digits_neighbours/run.py
"""

import pathlib
import sys

import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tl_jax.data import resample
from tl_jax.methods.classic import CLASSIFIERS


def leave_one_out(features: np.ndarray, labels: np.ndarray) -> float:
    """The share of examples whose nearest other has the same label."""
    fit, splits = CLASSIFIERS["1nn"], resample.leave_one_out(labels)
    return float(np.mean([fit(features[a], labels[a], None)(features[b]) == labels[b] for a, b in splits]))


if __name__ == "__main__":
    data = load_digits()
    print(leave_one_out(data.data, data.target))
