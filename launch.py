"""The front door, to one experiment or to a study of many runs:

python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]
python launch.py --study experiments/NAME[:ARGUMENT] [--workdir W] [--launcher local] [--jobs N] [--dry-run] [--retry]

tl_jax/core/options.py lists all options. Exit codes: 0 done; 2 the config, the data or the workdir does not fit (one
message says how); 75 stopped by SIGTERM or Ctrl-C with everything saved, start the same command again; 1 anything else,
such as a run of a study that failed.
"""

import difflib
import pathlib
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.runtime.malloc import keep_memory

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a python file with get_config, and its argument.", lock_config=True
)
STUDY = flags.DEFINE_string("study", None, "The study: the folder of a study.py with get_study, and its argument.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default: workdirs/NAME.")
LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm", "tpu", "gke"], "Where the work is done.")
SLURM = flags.DEFINE_string("slurm", "", "Options of sbatch for --launcher slurm: partition=gpu,time=2:00:00,...")
CLOUD = flags.DEFINE_string("cloud", "", "Where --launcher tpu or gke works: name=...,zone=..., see its file.")
JOBS = flags.DEFINE_integer("jobs", 0, "Runs of a study at once; 0: what suits the machine.", lower_bound=0)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Check a study, print its runs and what they would cost, run nothing.")
RETRY = flags.DEFINE_bool("retry", False, "Do the failed runs of a study again.")
SUBMIT = flags.DEFINE_bool("submit", False, "Run the command that hands the work to a cluster, do not only print it.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for one run in several processes.")
PROCESSES = flags.DEFINE_integer(
    "num-processes", None, "How many processes there are; SLURM and others tell by themselves."
)
PROCESS = flags.DEFINE_integer("process-id", None, "Which of them this is, from 0.")
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(
            bad_input(f"{argv[1:]} are no flags; write --config configs/NAME.py, and options as --config.NAME=VALUE")
        )
    from tl_jax.runtime import preemption

    stop_requested = preemption.watch()  # before the imports that take seconds
    from tl_jax.runtime import distributed

    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    try:
        sys.exit(run_study(stop_requested) if STUDY.value else run_config(stop_requested))
    except (ValueError, OSError, FloatingPointError) as error:
        if TRACEBACK.value:
            raise
        distributed.fail(error, 2)
        sys.exit(bad_input(error))
    except preemption.Preempted as stop:
        if distributed.is_first():
            print(f"{stop}; everything is saved, the same command goes on from there", flush=True)
        sys.exit(preemption.EXIT_CODE)


def run_study(stop_requested: Callable[..., bool]) -> int:
    """Plans and launches a study, or shows what it would be; returns the exit code."""
    from tl_jax.studies.cluster import launchers

    return launchers.start(
        STUDY.value, WORKDIR.value, launcher=LAUNCHER.value, settings=SLURM.value or CLOUD.value, submit=SUBMIT.value,
        jobs=JOBS.value, dry_run=DRY_RUN.value, retry=RETRY.value, stop_requested=stop_requested,
    )  # fmt: skip


def run_config(stop_requested: Callable[..., bool]) -> int:
    """Runs an experiment with its seeds and its baseline and prints the result, or hands it to a cluster."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = pathlib.Path(WORKDIR.value or f"workdirs/{pathlib.Path(path).stem}")
    settings = SLURM.value or CLOUD.value
    if LAUNCHER.value != "local" or settings or SUBMIT.value:
        from tl_jax.studies.cluster import launchers, submit

        command = ["launch.py", *submit.own_arguments(sys.argv[1:])]
        return launchers.hand_over(command, workdir, LAUNCHER.value, settings, SUBMIT.value)
    from tl_jax.runtime import distributed
    from tl_jax.studies import inprocess

    distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    inprocess.show(inprocess.run(CONFIG.value, workdir, distributed.agreed(stop_requested)), CONFIG.value, workdir)
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one message for everything that can be wrong with a config on the command line."""
    try:
        positional = flags.FLAGS(argv)
        if problem := conflict():
            raise ValueError(problem)
        if not STUDY.value:
            CONFIG.value.keys()  # a file that cannot be loaded is an error only when the config is read
        return positional
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        if "--traceback" in argv:
            raise
        text = str(error)
        if misspelt := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text):
            text = f"the config has no option {misspelt[2]!r} (did you mean {misspelt[1]!r}?)"
        elif isinstance(error, AttributeError | KeyError):
            text = f"the config has no option {text.strip(chr(34))} (an empty section is set whole: NAME='{{...}}')"
        elif missing := re.search(r"No such file or directory: '(.*)'", text):
            near = difflib.get_close_matches(missing[1], map(str, pathlib.Path("configs").glob("*.py")), n=1)
            text = f"there is no config {missing[1]}" + (f" (did you mean {near[0]!r}?)" if near else "")
        elif "Traceback" in text:  # what get_config raised, as text
            text = text.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(bad_input(text))


def conflict() -> str:
    """What is wrong with the flags taken together; "" where nothing is."""
    given = [name for name in ("config", "study") if flags.FLAGS[name].present]
    if not given:
        return "which experiment? give --config configs/NAME.py, or --study experiments/NAME"
    if len(given) > 1:
        return "--config and --study are two things to run; a study's base config is in its study.py"
    if DRY_RUN.value and (RETRY.value or SUBMIT.value):
        return "--dry-run runs nothing: leave out --retry and --submit"
    several = [f"--{name}" for name in ("coordinator", "num-processes", "process-id") if flags.FLAGS[name].present]
    if several and STUDY.value:
        return f"{', '.join(several)}: these are of one run in several processes, --config; a study has workers"
    only = [f"--{name}" for name in ("jobs", "dry-run", "retry") if flags.FLAGS[name].present]
    return f"{', '.join(only)}: only a study has these, see --study" if only and given == ["config"] else ""


def bad_input(message: object) -> int:
    """Prints what is wrong and returns the exit code that says so."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    keep_memory()
    app.run(main, flags_parser=parse_flags)
