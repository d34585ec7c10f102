"""The front door, to one experiment or to a study of many runs:

python launch.py --config configs/NAME.py[:ARGUMENT] [--config.option=value ...] [--workdir W]
python launch.py --study experiments/NAME[:ARGUMENT] [--workdir W] [--launcher local] [--jobs N] [--dry-run] [--retry]

tl_jax/core/options.py lists all options; tl_jax/studies/command.py says what the exit codes mean.
"""

import sys

from tl_jax.runtime.malloc import keep_memory
from tl_jax.studies import command

if __name__ == "__main__":
    keep_memory()
    sys.exit(command.main(sys.argv[1:]))
