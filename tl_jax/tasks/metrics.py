"""`python -m tl_jax.tasks.metrics W/predictions.npz` recomputes all numbers of a run without the run."""

import argparse
import json
import sys

import rich.console

from tl_jax import tasks


def main(argv=None) -> None:
    """Prints the metrics of a predictions.npz; --json writes all of them."""
    parser = argparse.ArgumentParser(prog="python -m tl_jax.tasks.metrics", description=main.__doc__)
    parser.add_argument("path", help="predictions.npz of a run")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    try:
        predictions = tasks.load_predictions(options.path)
        summary = tasks.summarize(predictions, resamples=options.resamples, level=options.level, seed=options.seed)
    except FileNotFoundError:
        sys.exit(f"error: there is no {options.path}; a finished run leaves predictions.npz in its workdir")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        tables = (tasks.format_table(summary), tasks.format_classes(summary))
        rich.console.Console().print(*filter(None, tables))


if __name__ == "__main__":
    main()
