"""The front door, to one experiment, to a study of many runs, or to advice on what suits a data set:

python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]
python launch.py --study experiments/NAME[:ARGUMENT] [--workdir W] [--launcher local] [--jobs N] [--dry-run] [--retry]
python launch.py --advise --data SOURCE --weights FILE,FILE,... --budget 10min [--workdir W]

tl_jax/core/options.py lists all options; tl_jax/studies/command.py says what the exit codes mean.
"""

import sys

from tl_jax.runtime.malloc import keep_memory

if __name__ == "__main__":
    keep_memory()
    if "--advise" in sys.argv[1:]:
        from tl_jax.advice import command
    else:
        from tl_jax.studies import command
    sys.exit(command.main(sys.argv[1:]))
