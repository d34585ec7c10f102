"""Which network and which way of adapting it suit a data set, found under a budget of time or operations:

python launch.py --advise --data SOURCE --weights FILE,FILE,... --budget 10min [--workdir W] [--config.OPTION=VALUE ...]

It ranks the networks, races ways of adapting them in rounds that val decides, and writes W/advice.md and the config of
the winner, W/chosen.json. Exit codes as of tl_jax/studies/command.py.
"""

import argparse
import pathlib
from collections.abc import Sequence

from absl import logging

from tl_jax.core.console import show
from tl_jax.runtime import preemption
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.studies import command


def main(argv: Sequence[str]) -> int:
    """Runs a command line with --advise; returns the exit code."""
    stop_requested = preemption.watch()  # before the imports that take seconds
    logging.set_verbosity(logging.WARNING)
    try:
        args, others = make_parser().parse_known_args(argv)
        items = command.options_among(others)
    except (argparse.ArgumentError, ValueError) as error:
        return command.bad_input(error)
    from tl_jax.advice import race

    keep_compiled_programs()
    try:
        how = {"methods": [*filter(None, args.methods.split(","))], "jobs": args.jobs, "stop_requested": stop_requested}
        race.run(args.data, args.weights.split(","), args.budget, pathlib.Path(args.workdir), items, **how)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        return command.bad_input(error)
    except preemption.Preempted as stop:
        show(f"{stop}; everything is saved, the same command goes on from there")
        return preemption.EXIT_CODE
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags but --config.OPTION=VALUE."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    add = parser.add_argument
    add("--advise", action="store_true", required=True, help="give advice")
    add("--data", required=True, help="a labelled source, such as folder:PATH, or its path")
    add("--weights", required=True, help="with commas: FILE, NAME=FILE, NAME= for random weights, builtin:NAME, ...")
    add("--budget", required=True, help="10min, 600s, 2h, or floating-point operations: 500TFLOP, 3PFLOP")
    add("--methods", default="", help="with commas: race these ways alone, see docs/methods.md")
    add("--workdir", default="workdirs/advice", help="where everything is written; default: workdirs/advice")
    add("--jobs", type=int, default=0, help="runs at once; 0: one, or one a GPU")
    add("--traceback", action="store_true", help="show where in the code an error came from")
    return parser
