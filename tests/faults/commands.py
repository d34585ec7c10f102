"""Commands of the package in processes that are forked in a moment, in which a call fails, or that end at one.

`Server` starts one process that has imported everything; for each command it forks a child, before jax has started. The
child runs the main function of the command: messages and exit codes are those that a user sees.
"""

import ctypes
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from configs import smoke
from tl_jax import config as options
from tl_jax.studies import store
from tl_jax.studies.study import Study

ROOT = pathlib.Path(__file__).resolve().parents[2]
CALLS = {"open": 1, "write": 2, "fsync": 4, "rename": 8, "mkdir": 16}
KILL = 0  # in place of an error number
LIMIT = 180  # seconds of a command


class Fault(NamedTuple):
    """What happens to calls of some kinds that change files below a folder.

    at: number of the call, from 1; 0: nothing. error: of errno, or KILL. lasting: all later ones fail too. jump: instead,
    the clock is ahead by so many seconds from there on.
    """

    calls: tuple[str, ...] = tuple(CALLS)
    at: int = 0
    error: int = KILL
    lasting: bool = False
    jump: int = 0

    def __str__(self) -> str:
        if self.jump:
            return f"clock {self.jump:+} s after call {self.at}"
        what = "SIGKILL at" if self.error == KILL else f"{errno.errorcode[self.error]} of"
        return f"{what} {'/'.join(self.calls)} {self.at}{' and all later ones' if self.lasting else ''}"


class Ended(NamedTuple):
    """code: of the exit, or minus the signal. output: all it printed. seen: how many calls of the kinds."""

    code: int
    output: str
    seen: int


class Server:
    """Runs commands one after the other in children of one process, which are given `folder` to work below."""

    def __init__(self, folder: pathlib.Path, threads: int = 1):
        self.folder = folder
        shim = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, ROOT / "tests/faults/shim.c", "-ldl"], check=True)
        program = (
            f"import sys; sys.path[:0] = ['.', 'tests']; from faults import commands; commands.serve({str(folder)!r})"
        )
        environment = {**os.environ, "LD_PRELOAD": str(shim), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads),
                       "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self, argv: Sequence[str], fault: Fault = Fault(), devices: int = 1, meanwhile: Callable[[int], None] | None = None,
    ) -> Ended:  # fmt: skip
        """Runs one command to its end. meanwhile: gets the number of its process, to send it signals."""
        self._tell({"argv": [str(word) for word in argv], "fault": fault, "devices": devices})
        number = self._hear()
        if meanwhile:
            meanwhile(number)
        code = self._hear()
        seen, output = self.folder / "seen", (self.folder / "output").read_text(errors="replace")
        return Ended(code, output, int(seen.read_text()) if seen.exists() else 0)

    def _tell(self, request: dict) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> int:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs commands has ended")
        return int(line)


def serve(folder: str) -> None:
    """Reads requests from the standard input, one a line; prints the number of each process, then how it ended."""
    import jax

    import tl_jax.__main__
    import tl_jax.api
    import tl_jax.studies.command
    import tl_jax.studies.worker
    import tl_jax.training.train  # noqa: F401

    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for line in sys.stdin:
        (pathlib.Path(folder) / "seen").unlink(missing_ok=True)
        if not (child := os.fork()):
            _child(pathlib.Path(folder), json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(folder: pathlib.Path, request: dict) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={request['devices']}"
    signal.alarm(LIMIT)
    shim, fault = ctypes.CDLL(None), Fault(*request["fault"])
    kinds = sum(CALLS[name] for name in fault.calls)
    shim.shim_arm(str(folder / "work").encode(), kinds, fault.at, fault.error, fault.lasting, fault.jump)
    try:
        code = _main(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    (folder / "seen").write_text(str(shim.shim_seen()))
    os._exit(code or 0)


def _main(argv: list[str]) -> int:
    """As launch.py, as what a study's launcher starts, and as `python -m tl_jax`."""
    if argv[0] == "launch.py":
        from tl_jax.studies.command import main
    elif argv[0] == "worker":
        from tl_jax.studies.worker import main
    else:
        from tl_jax.__main__ import main

        return main(argv)
    return main(argv[1:])


class Task(NamedTuple):
    """A command to try faults on.

    argv: "{work}" is the folder that faults happen below, "{made}" that of `make`. before: of `made`, what is copied into
    work. after: patterns of the files it leaves that are the same each time, relative to work.
    """

    argv: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.before, *re.findall(r"{made}/(\w+)", " ".join(self.argv)))


SMOKE = ("launch.py", "--config", "configs/smoke.py", "--config.resamples=2", "--config.data.test=test[:8%]")
RUN = ("w/result.json", "w/metrics.jsonl", "w/*.safetensors", "w/predictions*.npz", "w/audit.json", "w/choices.json")
TASKS = {
    "a run": Task((*SMOKE, "--config.method.name=full", "--workdir={work}/w"), after=RUN),
    "phases": Task(
        (
            *SMOKE,
            "--config.phases=((('total',(2,'steps')),),(('total',(2,'steps')),('method.name','last_k'),('method.k',1)))",
            "--workdir={work}/w",
        ),
        after=RUN,
    ),
    "cached features": Task(
        (*SMOKE, "--config.cache=features", "--config.cache_dir={work}/cache", "--workdir={work}/w"), after=RUN
    ),
    "a probe": Task((*SMOKE, "--config.method.name=logistic", "--config.select=last", "--workdir={work}/w"), after=RUN),
    "a study": Task(("worker", "{work}/planned"), ("planned",), tuple(f"planned/runs/*/{name[2:]}" for name in RUN)),
    "a report": Task(("report", "{work}/study"), ("study",), ("study/report.*",)),
    "a pack": Task(("pack", "digits", "{work}/packed", "--split=test", "--workers=0"), after=("packed/**/*",)),
    "an export": Task(("export", "{made}/run", "{work}/out"), after=("out/*.safetensors", "out/*.json")),
    "calibration": Task(("calibrate", "{work}/run", "--ood=none"), ("run",), ("run/trust.*", "run/result.json")),
    "a soup": Task(("soup", "{made}/run", "{made}/other", "--out={work}/soup"), after=("soup/*",)),
    "a conversion": Task(
        ("convert", "resnet8_cifar", "builtin:glyphs", "{work}/a.safetensors"), after=("a.safetensors",)
    ),
}


class Bench:
    """Tasks on a server, and what they leave when nothing happens."""

    def __init__(self, folder: pathlib.Path):
        self.work, self.made = folder / "work", folder / "made"
        self.made.mkdir()
        self.server = Server(folder)
        self._whole: dict[str, dict[str, str]] = {}

    def _make(self, name: str) -> None:
        """Makes what tasks begin with: a run and another, a planned study and a finished one."""
        if (self.made / name).exists():
            return
        if name in ("run", "other"):
            seed = f"--config.seed={int(name == 'other')}"
            self._must([*SMOKE, seed, "--config.method.name=full", f"--workdir={self.made / name}"])
        elif name == "planned":
            rates = {"low": {"lr": 1e-3}, "high": {"lr": 1e-2}}
            base = options.override(smoke.get_config(), {"resamples": 2, "data.test": "test[:8%]"})
            store.plan(self.made / name, "rates", "Which rate?", Study(base, {"rate": rates}, seeds=(0,)))
        else:
            self._make("planned")
            shutil.copytree(self.made / "planned", self.made / name)
            self._must(["worker", self.made / name])

    def _must(self, argv: Sequence[object]) -> None:
        ended = self.server.run(argv)
        assert ended.code == 0, ended.output

    def begin(self, name: str) -> None:
        """Empties work, but for what the task needs."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for item in TASKS[name].needs:
            self._make(item)
        for item in TASKS[name].before:
            shutil.copytree(self.made / item, self.work / item)

    def run(self, name: str, fault: Fault = Fault(), **named) -> Ended:
        argv = [word.format(work=self.work, made=self.made) for word in TASKS[name].argv]
        return self.server.run(argv, fault, **named)

    def left(self, name: str) -> dict[str, str]:
        """{file: sha256} of what a task leaves."""
        paths = {path for pattern in TASKS[name].after for path in self.work.glob(pattern) if path.is_file()}
        return {
            str(path.relative_to(self.work)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)
        }

    def whole(self, name: str) -> dict[str, str]:
        """What a task leaves when nothing happens; it is the same twice."""
        if name not in self._whole:
            found = []
            for _ in range(2):
                self.begin(name)
                ended = self.run(name)
                assert ended.code == 0, ended.output
                found.append(self.left(name))
            assert found[0] == found[1] and found[0], [key for key in found[0] if found[0][key] != found[1].get(key)]
            self._whole[name] = found[0]
        return self._whole[name]

    def calls(self, name: str, kind: str) -> int:
        """How many calls of a kind a task makes."""
        self.begin(name)
        return self.run(name, Fault((kind,))).seen
