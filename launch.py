"""The front door: python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]

Exit codes: 0 done; 2 the config, the data or the workdir does not fit (one message says how); 75 stopped by SIGTERM
with everything saved, start the same command again; 1 anything else.
"""

import json
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a python file with get_config, and its argument.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; default: workdirs/NAME for configs/NAME.py.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}; every option reads --config.NAME=VALUE")
    # The imports take seconds: flags are checked first.
    from tl_jax import metrics, train
    from tl_jax.logging import say
    from tl_jax.studies import compare

    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = pathlib.Path(WORKDIR.value or f"workdirs/{pathlib.Path(path).stem}")
    try:
        report = compare.compare(CONFIG.value, workdir)
    except (ValueError, FileNotFoundError, OSError, FloatingPointError) as error:
        say(f"error: {error}")
        sys.exit(2)
    except train.Preempted as stop:
        say(str(stop))
        sys.exit(train.EXIT_PREEMPTED)
    say(metrics.format_table(json.loads((workdir / "result.json").read_text())["metrics"]))
    if len(report["accuracy"]) > 1 or len(report["seeds"]) > 1:
        say(compare.to_table(report))
    say(f"everything of this run: {workdir.resolve()}")


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
    app.run(main)
