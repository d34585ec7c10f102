"""Outputs of a network in words: what `predict` writes for each example."""

import csv
import json
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.tasks.binary import threshold_of
from tl_jax.tasks.predictions import OUTPUT
from tl_jax.tasks.task import Spec

TOP = 5
Row = dict[str, Any]


def answers(spec: Spec, outputs: Mapping[str, np.ndarray]) -> list[Row]:
    """One row for each example, as plain JSON data; outputs as in `Predictions`.

    classification: class, probability, and top5, pairs (class, probability) with the most probable first. binary:
    class by the threshold of the spec, and the probability of the class `positive`. multilabel: labels of a
    probability of at least 0.5, and probabilities by label. regression: values by target, in its unit.
    """
    values, names = np.asarray(outputs[OUTPUT[spec.name]], np.float64), spec.class_names
    if spec.name == "regression":
        return [{"values": dict(zip(names, row, strict=True))} for row in values.tolist()]
    if spec.name == "classification":
        p = scipy.special.softmax(values, axis=1)
        order = np.argsort(-p, axis=1, kind="stable")[:, :TOP]
        tops = [[[names[k], float(row[k])] for k in best] for row, best in zip(p, order.tolist(), strict=True)]
        return [{"class": top[0][0], "probability": top[0][1], "top5": top} for top in tops]
    p = np.exp(scipy.special.log_expit(values)).tolist()
    if spec.name == "multilabel":
        rows = [dict(zip(names, row, strict=True)) for row in p]
        return [{"labels": [n for n in row if row[n] >= 0.5], "probabilities": row} for row in rows]
    threshold = threshold_of(spec)
    return [{"class": names[int(x >= threshold)], "positive": names[1], "probability": x} for x in p]


def write_csv(rows: Iterable[Row], file: TextIO) -> None:
    """Rows with columns in place of tables: class_2, probability_2, ... of top5, one of each label or target."""
    for i, row in enumerate(map(_flat, rows)):
        if i == 0:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)


def write_jsonl(rows: Iterable[Row], file: TextIO) -> None:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if key == "top5":
            for rank, (name, p) in enumerate(value[1:], 2):
                flat |= {f"class_{rank}": name, f"probability_{rank}": p}
        elif key == "interval":
            flat |= {
                f"{name}_{end}": x for name, ends in value.items() for end, x in zip(("low", "high"), ends, strict=True)
            }
        elif isinstance(value, dict):
            flat |= {f"{name}_calibrated": x for name, x in value.items()} if key == "calibrated" else value
        else:
            flat[key] = ";".join(value) if isinstance(value, list) else value
    return flat
