"""The front door: python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]

configs/transfer.py lists all options. Exit codes: 0 done; 2 the config, the data or the workdir does not fit (one
message says how); 75 stopped by SIGTERM or Ctrl-C with everything saved, start the same command again; 1 anything else.
"""

import difflib
import os
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a python file with get_config, and its argument.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; default: workdirs/NAME for configs/NAME.py.")
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(
            bad_input(f"{argv[1:]} are no flags; write --config configs/NAME.py, and options as --config.NAME=VALUE")
        )
    from tl_jax import preemption

    stop_requested = preemption.watch()  # before the imports that take seconds
    from tl_jax import metrics
    from tl_jax.logging import say
    from tl_jax.studies import compare

    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = pathlib.Path(WORKDIR.value or f"workdirs/{pathlib.Path(path).stem}")
    try:
        report = compare.compare(CONFIG.value, workdir, stop_requested)
    except (ValueError, OSError, FloatingPointError) as error:
        if TRACEBACK.value:
            raise
        sys.exit(bad_input(error))
    except preemption.Preempted as stop:
        say(f"{stop}; everything is saved, the same command goes on from there")
        sys.exit(preemption.EXIT_CODE)
    result = report["result"]
    say(metrics.format_table(result["metrics"], of=f"seed {CONFIG.value.seed}, {result['data']}"))
    if result["chosen_on_scored_split"]:
        say("The checkpoint was chosen on the split scored here: these numbers are optimistic (name a data.test)")
    if report["comparison"]:
        say(compare.to_table(report["comparison"]))
    say(f"everything of this run: {workdir.resolve()}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one message for everything that can be wrong with a config on the command line."""
    try:
        positional = flags.FLAGS(argv)
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
        if not any(argument.startswith("--config") for argument in argv):
            text = "which experiment? give --config configs/NAME.py"
        sys.exit(bad_input(text))


def bad_input(message: object) -> int:
    """Prints what is wrong and returns the exit code that says so."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def keep_compiled_programs() -> None:
    """Lets a program that was compiled once start at once the next time; JAX_COMPILATION_CACHE_DIR takes precedence.

    Whoever can write to the folder can run code here, so it is private, or not used.
    """
    import jax

    folder = pathlib.Path.home() / ".cache" / "tl_jax" / "compiled"
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError:
        return  # no home to write to: compile every time
    if facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2**31)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
