"""The command line of training: one experiment, or a study of many runs. launch.py and `python -m tl_jax train` are it.

Exit codes: 0 done; 2 the config, the data or the workdir does not fit (one message says how); 75 stopped by SIGTERM or
Ctrl-C with everything saved, start the same command again; 1 anything else, such as a run of a study that failed.
"""

import argparse
import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence

from absl import logging
from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax.core import messages, synonyms
from tl_jax.core.console import show
from tl_jax.core.options import OPTIONS
from tl_jax.runtime import preemption
from tl_jax.runtime.compile_cache import keep_compiled_programs

# What a flag or a config file may raise.
INVALID = (argparse.ArgumentError, ValueError, TypeError, AttributeError, KeyError, OSError)


def main(argv: Sequence[str], program: Sequence[str] = ("launch.py",)) -> int:
    """Runs a command line; returns the exit code. program: the arguments of python that start it on another machine."""
    stop_requested = preemption.watch()  # before the imports that take seconds
    logging.set_verbosity(logging.WARNING)
    try:
        args, items = _parse(argv)
        config = None if args.study else read_config(args.config, items)
    except INVALID as error:
        if "--traceback" in argv:
            raise
        return bad_input(error.args[0] if isinstance(error, KeyError) else error)
    from tl_jax.runtime import distributed

    keep_compiled_programs()
    try:
        if config is not None:
            return run_config(args, config, argv, program, stop_requested)
        from tl_jax.studies import launchers

        return launchers.start(
            args.study, args.workdir, launcher=args.launcher, settings=args.slurm or args.cloud, submit=args.submit,
            jobs=args.jobs, dry_run=args.dry_run, retry=args.retry, stop_requested=stop_requested,
        )  # fmt: skip
    except (ValueError, OSError, FloatingPointError) as error:
        if args.traceback:
            raise
        distributed.fail(error, 2)
        return bad_input(error)
    except preemption.Preempted as stop:
        if distributed.is_first():
            show(f"{stop}; everything is saved, the same command goes on from there")
        return preemption.EXIT_CODE


def read_config(text: str, items: Sequence[str] = ()) -> ConfigDict:
    """The locked config of "FILE" or "FILE:ARGUMENT", with items "option=value" set.

    FILE is a python file with get_config, or the config.json of a run, which is that run again.

    Raises FileNotFoundError with the nearest name, and ValueError that lists every item that does not fit.
    """
    name, colon, argument = text.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        near = messages.nearest(name, map(str, path.parent.glob("*.py")))
        raise FileNotFoundError(f"there is no config {name}{near}")
    if path.suffix == ".json" and not colon:
        return options.parse(options.read(path), items)
    spec = importlib.util.spec_from_file_location("tl_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{name} has no function get_config, which makes the config")
    try:
        config = module.get_config(argument) if colon else module.get_config()
    except (AttributeError, KeyError) as error:  # ml_collections adds the whole config to its message
        if not (found := re.search(r'Key "(.+?)" does not exist and cannot be added', str(error))):
            raise
        raise ValueError(f"{name} sets {found[1]}, which does not exist{synonyms.hint(found[1], OPTIONS)}") from error
    found, given = options.parse(config, items), {item.partition("=")[0] for item in items}
    meant = found.method.name in options.WITHOUT_STEPS or "lr" in given or config.lr != options.HEAD_ALONE["lr"]
    if options.trains_head_alone(config) and not options.trains_head_alone(found) and not meant:
        changed = [f"--config.{item}" for item in items if item.startswith(("method.", "method=", "phases="))]
        fix = f"write it behind the colon, {name}:method=NAME, or set --config.lr and --config.total too"
        raise ValueError(f"{', '.join(changed)}: {name} has chosen lr and total for a linear probe; {fix}")
    return found


def run_config(args, config: ConfigDict, argv: Sequence[str], program: Sequence[str], stop: Callable[..., bool]) -> int:
    """Runs an experiment with its seeds and its baseline and prints the result, or hands it to a cluster."""
    workdir = pathlib.Path(args.workdir or f"workdirs/{pathlib.Path(args.config.partition(':')[0]).stem}")
    if args.launcher != "local":
        from tl_jax.studies import launchers

        command, settings = [*program, *launchers.own_arguments(argv)], args.slurm or args.cloud
        return launchers.hand_out(args.launcher, workdir, command=command, settings=settings, submit=args.submit)
    from tl_jax.runtime import distributed, wall
    from tl_jax.studies import inprocess

    wall.count_start()
    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    if not args.prove_no_leak:
        inprocess.show(inprocess.run(config, workdir, distributed.agreed(stop)), config, workdir)
        return 0
    from tl_jax.studies import leak

    found, differences = leak.prove(config, workdir, distributed.agreed(stop))
    inprocess.show(found, config, workdir)
    if differences and distributed.is_first():
        show(f"leak test: FAILED, target labels decide\n{messages.listed(differences)}", stderr=True)
    elif distributed.is_first():
        show("leak test: passed")
    return int(bool(differences))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the items "option=value" of --config.OPTION=VALUE; ValueError for what does not fit together."""
    args, rest = make_parser().parse_known_args(argv)
    items = options_among(rest)
    if not args.config and not args.study:
        raise ValueError("which experiment? give --config configs/NAME.py, or --study experiments/NAME")
    if args.config and args.study:
        raise ValueError("--config and --study are two things to run; a study's base config is in its study.py")
    if args.launcher == "local" and (args.slurm or args.cloud or args.submit):
        raise ValueError("--submit, --slurm and --cloud are for a cluster: add --launcher slurm, tpu or gke")
    if args.dry_run and (args.retry or args.submit):
        raise ValueError("--dry-run runs nothing: leave out --retry and --submit")
    if args.jobs < 0:
        raise ValueError(f"--jobs {args.jobs}: expected a number of at least 0")
    if args.prove_no_leak and args.study:
        raise ValueError("--prove-no-leak is of one experiment, --config: give it the options of a run of the study")
    others, why = ("--jobs", "--dry-run", "--retry"), "only a study has these, see --study"
    if args.study:
        others = ("--coordinator", "--num-processes", "--process-id")
        why = "these are of one run in several processes, --config; a study has workers"
    if given := [flag for flag in others if getattr(args, flag[2:].replace("-", "_"))]:
        raise ValueError(f"{', '.join(given)}: {why}")
    return args, items


def options_among(others: Sequence[str]) -> list[str]:
    """The items "option=value" of the words --config.OPTION=VALUE; ValueError for other words."""
    items, unknown, words = [], [], iter(others)
    for word in words:
        if found := re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL):
            items.append(f"{found[1]}={next(words, '') if found[2] is None else found[2]}")
        else:
            unknown.append(word)
    if unknown:
        near = synonyms.hint(unknown[0].lstrip("-").partition("=")[0], OPTIONS)
        raise ValueError(f"{unknown} are no flags; write options of the config as --config.NAME=VALUE{near}")
    return items


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags but --config.OPTION=VALUE."""
    epilog = "--config.OPTION=VALUE sets an option of the config; tl_jax/core/options.py lists all."
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, **style)
    add = parser.add_argument
    add("--config", metavar="FILE[:ARGUMENT]", help="a python file with get_config, and its argument, or a config.json")
    add("--study", metavar="FOLDER[:ARGUMENT]", help="the study: the folder of a study.py with get_study")
    add("--workdir", help="where everything is written; default: workdirs/NAME")
    add("--launcher", default="local", choices=["local", "slurm", "tpu", "gke"], help="where the work is done")
    add("--slurm", default="", help="options of sbatch for --launcher slurm: partition=gpu,time=2:00:00,...")
    add("--cloud", default="", help="where --launcher tpu or gke works: name=...,zone=..., see its file")
    add("--jobs", type=int, default=0, help="runs of a study at once; 0: what suits the machine")
    add("--dry-run", action="store_true", help="check a study, print its runs and their cost, run nothing")
    add("--retry", action="store_true", help="do the failed runs of a study again")
    add("--submit", action="store_true", help="run the command that hands the work to a cluster, do not only print it")
    add("--prove-no-leak", action="store_true", help="train and choose again with target labels poisoned, and compare")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, for one run in several processes")
    add("--num-processes", type=int, help="how many processes there are; SLURM and others tell by themselves")
    add("--process-id", type=int, help="which of them this is, from 0")
    add("--traceback", action="store_true", help="show where in the code an error came from")
    return parser


def bad_input(message: object) -> int:
    """Prints what is wrong and returns the exit code that says so."""
    show(f"error: {message}", stderr=True)
    return 2
