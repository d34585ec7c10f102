"""The front door, to one experiment, to a study of many runs, to advice on what suits a data set, and to the ledger:

python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]
python launch.py --study experiments/NAME[:ARGUMENT] [--workdir W] [--launcher local] [--jobs N] [--dry-run] [--retry]
python launch.py --advise --data SOURCE --weights FILE,FILE,... --budget 10min [--workdir W]
python launch.py --ledger [--run] [--material FOLDER] [--only REGEX]

tl_jax/core/options.py lists all options; tl_jax/studies/command.py says what the exit codes mean.
"""

import sys

from tl_jax.runtime.malloc import keep_memory

if __name__ == "__main__":
    keep_memory()
    if "--advise" in sys.argv[1:]:
        from tl_jax.advice.command import main
    elif "--ledger" in sys.argv[1:]:
        from tl_jax.studies.ledger import main
    else:
        from tl_jax.studies.command import main
    sys.exit(main(sys.argv[1:]))
