"""What an answer costs with each network of the study: GFLOP, as XLA counts them, and milliseconds of one photo.

taskset -c 0 python experiments/backbones/inference.py [ARGUMENT OF THE STUDY]

The milliseconds are those of a batch of 16 on the cores that the process has, divided by 16: least of 20, and median.
"""

import pathlib
import statistics
import sys
import timeit

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.backbones.study import get_study
from tl_jax.methods.term import MODEL
from tl_jax.runtime import sharding
from tl_jax.studies.study import grid
from tl_jax.training import steps
from tl_jax.training.build import build

BATCH = 16


def measure(config) -> tuple[float, list[float]]:
    """FLOPs of a photo, and the seconds of batches."""
    parallel = sharding.make_parallel()
    run = build(config, parallel)
    reader, variables = run.material.readers[MODEL], parallel.place(run.material.variables)
    answer = parallel.evaluate(steps.make_eval_step(reader, run.task, None))
    x = parallel.put_batch(np.zeros((BATCH, reader.card.input_size, reader.card.input_size, 3), np.uint8))
    flops = answer.lower(variables, x).cost_analysis()["flops"] / BATCH
    jax.block_until_ready(answer(variables, x))
    return flops, timeit.repeat(lambda: jax.block_until_ready(answer(variables, x)), number=1, repeat=20)


def main(argument: str = "") -> None:
    print("| network | GFLOP a photo | ms a photo, least | median |\n| --- | ---: | ---: | ---: |")
    for run in grid(get_study(argument)._replace(seeds=(0,))):
        if run.levels["trained"] == "head":
            flops, seconds = measure(run.config)
            least, middle = (1000 * value / BATCH for value in (min(seconds), statistics.median(seconds)))
            print(f"| {run.levels['network']} | {flops / 1e9:.2f} | {least:.1f} | {middle:.1f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
