"""One of two processes that train together is killed or stopped, at its start, in a step, a save or an evaluation.

The other ends too, soon and with the reason; the same command then ends as if nothing had happened.
"""

import itertools
import os
import signal
import subprocess
import sys

import pytest
from faults import effort
from test_distributed import ROOT, finish, free_address, launch, remains

pytestmark = [pytest.mark.battery, pytest.mark.slow, pytest.mark.exhaustive]  # test_distributed.py has some in CI
MOMENTS = {  # a function, and the number of the call after which it happens
    "a step": ("tl_jax.training.single:Single.take_line", 3),
    "the start": ("tl_jax.training.build:load_model", 1),
    "a save": ("tl_jax.runtime.checkpoint:Checkpoints.save", 1),
    "an evaluation": ("tl_jax.training.evaluate:collect", 2),
}
CODES = {"SIGKILL": 1, "SIGTERM": 75}  # of the process that was left alone
LIMIT = 90  # seconds in which both have to end
PROGRAM = """
import os, runpy, signal, sys
sys.path[:0] = [".", "tests"]
import nth_call
place, number, sent = sys.argv[1:4]
sys.argv = sys.argv[4:]
nth_call.behind(place, int(number), lambda: os.kill(os.getpid(), getattr(signal, sent)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OPTIONS = ["--config.method.name=full", "--config.total=(12,'steps')", "--config.eval_every=(3,'steps')"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "w"
    finish(launch(2, folder, *OPTIONS))
    return remains(folder)


CASES = list(itertools.product(MOMENTS, (1, 0), CODES))


@pytest.mark.parametrize(("moment", "rank", "sent"), CASES if effort.many else CASES[:1])
def test_the_other_ends_with_the_reason_and_both_go_on_to_the_same_files(tmp_path, whole, moment, rank, sent):
    flags = ["--coordinator", free_address(), "--num-processes", "2", "--process-id"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = ["launch.py", "--config", "configs/smoke.py", *OPTIONS, "--workdir", str(tmp_path / "w"), *flags]
    processes = []
    for index in range(2):
        program = ["-c", PROGRAM, *map(str, MOMENTS[moment]), sent] if index == rank else []
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *words, str(index)], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[rank] == (-signal.SIGKILL if sent == "SIGKILL" else CODES[sent]), outputs
    assert codes[1 - rank] == CODES[sent], outputs
    if sent == "SIGKILL":
        assert f"because process {rank} of 2" in outputs[1 - rank]
    finish(launch(2, tmp_path / "w", *OPTIONS))
    assert remains(tmp_path / "w") == whole
    effort.tried(f"processes: {sent} at {moment}", "both ended, went on")
