"""Seconds from the start of the process to the end of the first training step, with and without kept programs.

python benchmarks/startup.py --images folder:hymenoptera --deit deit_tiny.safetensors --resnet resnet18.safetensors

Cold: a home without a cache of compiled programs, as on a new machine; warm: the second start there. Each is a whole
process, `launch.py` as anyone would start it, imports and the loading of weights and data included; the rounds of cold
and warm alternate. Where the time goes is taken inside the process: imports, the building of the run, the state and the
first batch, tracing and lowering, compilation or the reading of the kept program, and the first step.
Without --images only the quickstart runs, which needs no files.
"""

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

if __package__ is None:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
CHILD = "TL_JAX_STARTUP"  # set in the measured process: the monotonic time at which it was started
PARTS = ("imports", "build", "state", "lower", "compile", "step")


def measured() -> None:
    """launch.py with a clock: notes the time behind each part, and ends behind the first step."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import launch

    launch.keep_memory()
    times = [float(os.environ[CHILD])]
    real = launch.run_config

    def run_config(stop_requested):
        import jax

        from tl_jax.runtime import sharding
        from tl_jax.studies import inprocess  # noqa: F401 (as launch.py does)
        from tl_jax.training import train

        times.append(time.monotonic())
        assemble = train.assemble

        def timed_assemble(*args):
            run = assemble(*args)
            times.append(time.monotonic())
            return run

        def timed_compile(parallel, train_step, state, batch):
            jax.block_until_ready((state, batch))
            times.append(time.monotonic())
            lowered = parallel.train(train_step).lower(state, batch)
            times.append(time.monotonic())
            options = sharding.OPTIONS.get(parallel.mesh.devices.flat[0].platform)
            compiled = lowered.compile(compiler_options=options)
            times.append(time.monotonic())
            jax.block_until_ready(compiled(state, batch))
            times.append(time.monotonic())
            print(json.dumps([after - before for before, after in itertools.pairwise(times)]), flush=True)
            os._exit(0)

        train.assemble, sharding.Parallel.compile = timed_assemble, timed_compile
        return real(stop_requested)

    launch.run_config = run_config
    app.run(launch.main, flags_parser=launch.parse_flags)


def first_step(options: list[str], home: pathlib.Path) -> dict[str, float]:
    """Seconds of each part, and in all, of one process whose home is `home`."""
    with tempfile.TemporaryDirectory() as folder:
        # A user's fonts are listed once per home, which is no business of this benchmark.
        environment = {**common.plain_environment(), "HOME": str(home), "MPLCONFIGDIR": folder}
        environment[CHILD] = str(time.monotonic())
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, __file__, *options, "--workdir", f"{folder}/w"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    parts = dict(zip(PARTS, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return {"all": sum(parts.values()), **parts}


def main(argv: list[str]) -> None:
    del argv
    folder = common.start("startup")
    cases = {"quickstart": ["--config", "configs/quickstart.py"]}
    if IMAGES.value:
        base = "configs/hymenoptera.py:data=" + IMAGES.value
        deit = ["--config", f"{base},weights={DEIT.value}"]
        cases["DeiT-tiny linear probe"] = deit
        cases["DeiT-tiny full"] = [deit[0], deit[1] + ",method=full"]
        cases["ResNet-18 full"] = ["--config", f"{base},model=resnet18,weights={RESNET.value},method=full"]
        cases["ResNet-50 full"] = ["--config", f"{base},model=resnet50,weights=,method=full"]
    if unknown := set(ONLY.value) - cases.keys():
        sys.exit(f"--only {sorted(unknown)}: expected some of {list(cases)}; all but the first need --images")
    rows = []
    for name in [case for case in cases if not ONLY.value or case in ONLY.value]:
        times: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(common.ROUNDS.value):
            with tempfile.TemporaryDirectory() as home:
                for way in times:
                    times[way].append(first_step(cases[name], pathlib.Path(home)))
        quotient = common.ratios([t["all"] for t in times["warm"]], [t["all"] for t in times["cold"]])
        for way, rounds in times.items():
            whole = common.summary([t["all"] for t in rounds])
            parts = {part: statistics.median(t[part] for t in rounds) for part in PARTS}
            ratio = {"warm/cold": quotient["median"]} if way == "warm" else {}
            rows.append({"case": f"{name}, {way}", **whole, **parts, **ratio})
            print(rows[-1], flush=True)
    columns = ["case", "median", "low", "high", *PARTS, "warm/cold"]
    common.report(folder, rows, "Seconds to the end of the first step", ("case", "median", "seconds"), columns)


if __name__ == "__main__":
    if CHILD in os.environ:
        measured()
    else:
        import common

        IMAGES = flags.DEFINE_string("images", "", "Source of two classes of photos for configs/hymenoptera.py.")
        DEIT = flags.DEFINE_string("deit", "", "Weights of deit_tiny_patch16_224; empty: random ones.")
        RESNET = flags.DEFINE_string("resnet", "", "Weights of resnet18; empty: random ones.")
        ONLY = flags.DEFINE_list("only", [], "Measure these cases alone.")
        app.run(main)
