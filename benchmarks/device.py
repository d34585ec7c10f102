"""Everything that is measured on a device, with one command: the other benchmarks one after the other, and their rows.

python benchmarks/device.py --device gpu
python benchmarks/device.py --device gpu --only step,vs_torch

Each is a process of its own, so that one that fails, as for want of PyTorch or of memory, does not end the others.
OUT/NAME holds what each writes, OUT/NAME.log what it said, OUT/rows.json the rows of all; the exit code is the number
of those that failed. --quick: little work, to see that all of it runs.
"""

import json
import pathlib
import subprocess
import sys
import time

import common
from absl import app, flags

ONLY = flags.DEFINE_list("only", [], "Of the names below, those to run; all if empty.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Examples per step.")
QUICK = flags.DEFINE_bool("quick", False, "Tiny networks and batches, one round.")
HERE = pathlib.Path(__file__).parent


def commands() -> dict[str, list[str]]:
    """The script and the flags of each; of step.py one model a process, so that the device's peak is that of one."""
    size, resnet, vit = BATCH_SIZE.value, "resnet50", "vit_base_patch16_224"
    if QUICK.value:
        size, resnet, vit = 8, "resnet8_cifar", "vit_tiny_patch16_224"
    steps = "--steps=1" if common.DEVICE.value in ("", "cpu") else "--steps=20"
    found = {
        "step_resnet": ["step.py", f"--models={resnet}", f"--batch_size={size}"],
        "step_vit": ["step.py", f"--models={vit}", f"--batch_size={size}", "--attention=xla,cudnn"],
        "step_vit_remat": ["step.py", f"--models={vit}", f"--batch_size={size}", "--ways=full", "--remat=dots"],
        "vs_torch": [
            "vs_torch.py", f"--models={'resnet18' if QUICK.value else resnet},{vit}", f"--batch_size={size}", steps,
        ],
        "cache": ["cache.py", f"--batch_size={size}"],
        "scaling": ["scaling.py", f"--models={vit},{resnet}", f"--batch_size={size}",
                    f"--batch_sizes={size // 4},{size // 2},{size}", *(["--devices=1,2"] if QUICK.value else [])],
    }  # fmt: skip
    return {name: line for name, line in found.items() if not ONLY.value or any(name.startswith(x) for x in ONLY.value)}


def main(argv: list[str]) -> None:
    del argv
    folder, everything = common.start("device"), {}
    shared = [f"--device={common.DEVICE.value}", f"--rounds={1 if QUICK.value else common.ROUNDS.value}"]
    for name, (script, *more) in commands().items():
        command = [sys.executable, str(HERE / script), *more, *shared, f"--out={folder / name}"]
        print(f"\n{name}: python benchmarks/{script} {' '.join([*more, *shared])}", flush=True)
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (folder / f"{name}.log").write_text(done.stdout)
        shown = done.stdout if not done.returncode else "\n".join(done.stdout.strip().splitlines()[-3:])
        print(f"{shown}\n{name}: exit code {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        rows = folder / name / "rows.json"
        everything[name] = {"exit_code": done.returncode, **(json.loads(rows.read_text()) if rows.exists() else {})}
        (folder / "rows.json").write_text(json.dumps(everything, indent=1) + "\n")
    failed = [name for name, result in everything.items() if result["exit_code"]]
    print(
        f"\n{len(everything) - len(failed)} of {len(everything)} done; failed: {', '.join(failed) or 'none'}; {folder}"
    )
    sys.exit(len(failed))


if __name__ == "__main__":
    app.run(main)
