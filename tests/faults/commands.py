"""Commands of the package in processes that are forked in a moment, in which a call fails, or that end at one.

`Server` starts one process that has imported everything; for each command it forks a child, before jax has started. The
child runs the main function of the command: messages and exit codes are those that a user sees.
"""

import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from configs import smoke
from tl_jax import config as options
from tl_jax.studies import store
from tl_jax.studies.study import Study

ROOT = pathlib.Path(__file__).resolve().parents[2]
CALLS = ("open", "write", "fsync", "rename", "mkdir")  # as shim.c numbers them
KILL = 0  # in place of an error number
LIMIT = 180  # seconds of a command


class Fault(NamedTuple):
    """What happens to calls of some kinds that change files below a folder.

    at: number of the call, from 1; 0: nothing. error: of errno, or KILL. lasting: all later ones fail too. jump: no
    call fails, but the clock is ahead by so many seconds from there on.
    """

    calls: tuple[str, ...] = CALLS
    at: int = 0
    error: int = KILL
    lasting: bool = False
    jump: int = 0

    def __str__(self) -> str:
        if self.jump:
            return f"clock {self.jump:+} s after call {self.at}"
        what = "SIGKILL at" if self.error == KILL else f"{errno.errorcode[self.error]} of"
        return f"{what} {'/'.join(self.calls)} {self.at}{' and all later ones' if self.lasting else ''}"


NOTHING = Fault()


class Ended(NamedTuple):
    """code: of the exit, or minus the signal. output: all printed. seen: calls of each kind, if it was not killed."""

    code: int
    output: str
    seen: dict[str, int]


class Server:
    """Runs commands one after the other in children of one process, which are given `folder` to work below."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        shim = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, ROOT / "tests/faults/shim.c", "-ldl"], check=True)
        begin = "import sys; sys.path[:0] = ['.', 'tests']; from faults import commands; commands.serve(sys.argv[1])"
        own = {name: x for name, x in os.environ.items() if name != "COLUMNS"}  # which xdist sets
        environment = {**own, "LD_PRELOAD": str(shim), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
                       "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", begin, str(folder)], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self, argv: Sequence[str], fault: Fault = NOTHING, devices: int = 1,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Ended:  # fmt: skip
        """Runs one command to its end. meanwhile: gets the number of its process, to send it signals."""
        self._tell({"argv": [str(word) for word in argv], "fault": fault, "devices": devices})
        number = self._hear()
        if meanwhile:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                meanwhile(number)
        code = self._hear()
        seen, output = self.folder / "seen", (self.folder / "output").read_text(errors="replace")
        return Ended(code, output, json.loads(seen.read_text()) if seen.exists() else {})

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
    from tl_jax.training import artifacts

    artifacts.draw = lambda *_: None  # the figures of a run take most of its time; "a report" has some
    _tell_restored(pathlib.Path(folder) / "restored")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until a command begins
    for line in sys.stdin:
        (pathlib.Path(folder) / "seen").unlink(missing_ok=True)
        if not (child := os.fork()):
            _child(pathlib.Path(folder), json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _tell_restored(file: pathlib.Path) -> None:
    """Writes the step of each checkpoint that a run goes on from, and the sha256 of each leaf of its state."""
    from tl_jax.core import trees
    from tl_jax.runtime.checkpoint import Checkpoints

    restore = Checkpoints.restore_latest

    def told(self, like):
        found = restore(self, like)
        if found:
            file.write_text(json.dumps({"step": found.step, "leaves": trees.leaf_hashes(found.state)}))
        return found

    Checkpoints.restore_latest = told


def _child(folder: pathlib.Path, request: dict) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={request['devices']}"
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    shim, fault = ctypes.CDLL(None), Fault(*request["fault"])
    kinds = sum(1 << CALLS.index(name) for name in fault.calls)
    shim.shim_arm(str(folder / "work").encode(), kinds, fault.at, fault.error, fault.lasting, fault.jump)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = _main(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # before the command watches
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    (folder / "seen").write_text(json.dumps({name: shim.shim_seen(i) for i, name in enumerate(CALLS)}))
    os._exit(code or 0)


def _main(argv: list[str]) -> int:
    """As launch.py, as what a study's launcher starts, and as `python -m tl_jax`."""
    if argv[0] == "launch.py":
        from tl_jax.studies.command import main
    elif argv[0] == "worker":
        from tl_jax.studies.worker import main
    else:
        from tl_jax.__main__ import main

        sys.argv = ["tl_jax", *argv]
        return main()
    return main(argv[1:])


class Task(NamedTuple):
    """A command to try faults on.

    argv: "{work}" is the folder that faults happen below, "{made}" has what tasks begin with. before: of `made`, what
    is copied into work. after: patterns of the files it leaves that are the same each time, relative to work.
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
    "a longer run": Task(
        (
            *SMOKE,
            "--config.method.name=full",
            "--config.total=(30,'steps')",
            "--config.eval_every=(5,'steps')",
            "--workdir={work}/w",
        ),
        after=RUN,
    ),
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
    "a soup": Task(
        ("soup", "{made}/run", "{made}/other", "--out={work}/soup"), after=("soup/*.safetensors", "soup/*.json")
    ),
    "a conversion": Task(
        ("convert", "resnet8_cifar", "builtin:glyphs", "{work}/a.safetensors"), after=("a.safetensors",)
    ),
}

QUICK = ("a pack",)  # of a fifth of a second


class Bench:
    """Tasks on a server, and what they leave when nothing happens."""

    def __init__(self, folder: pathlib.Path):
        self.work, self.made = folder / "work", folder / "made"
        self.made.mkdir()
        self.server = Server(folder)
        self.seen: dict[str, dict[str, int]] = {}
        self.took: dict[str, float] = {}  # seconds
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
        self.work.mkdir(exist_ok=True)
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for item in TASKS[name].needs:
            self._make(item)
        for item in TASKS[name].before:
            shutil.copytree(self.made / item, self.work / item)

    def run(self, name: str, fault: Fault = NOTHING, **named) -> Ended:
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
                began = time.monotonic()
                ended = self.run(name)
                assert ended.code == 0, ended.output
                self.seen[name], self.took[name] = ended.seen, time.monotonic() - began
                found.append(self.left(name))
            assert found[0] == found[1] and found[0], [key for key in found[0] if found[0][key] != found[1].get(key)]
            self._whole[name] = found[0]
        return self._whole[name]

    def faults(self, name: str, errors: Sequence[int], count: int) -> Iterator[Fault]:
        """Faults of a task at calls drawn at random, of each kind as many as there are."""
        rng = random.Random(f"{name} {errors}")
        self.whole(name)
        drawn = [(kind, at) for kind, n in self.seen[name].items() for at in rng.sample(range(1, n + 1), min(n, count))]
        rng.shuffle(drawn)
        for kind, at in drawn[:count]:
            error = rng.choice(errors)
            # A disk stays full, and a file system is read-only for good; a fault of the device passes.
            stays = error in (errno.ENOSPC, errno.EROFS)
            yield Fault(CALLS if stays else (kind,), at, error, stays)

    def survives(self, name: str, fault: Fault = NOTHING, **named) -> str:
        """Runs a task with a fault, then again without; returns what the fault did. AssertionError says what is wrong.

        It ends as asked (by its signal, or with one line that names what failed), and in the end its files are those of
        a task that nothing happened to.
        """
        whole = self.whole(name)
        self.begin(name)
        ended = self.run(name, fault, **named)
        told = f"{name}, {fault}, {named}: code {ended.code}\n{ended.output[-3000:]}"
        assert ended.code in (0, 2, 75, 130, -signal.SIGKILL, -signal.SIGTERM), told
        assert "Traceback" not in ended.output, told
        if ended.code == 2:
            last = ended.output.splitlines()[-1]
            assert fault.error and last.startswith("error: ") and os.strerror(fault.error) in last, told
        if ended.code == 0:
            assert self.left(name) == whole, told
            return "without effect"
        again = self.run(name)
        assert again.code == 0, f"{told}\nthen: {again.output[-3000:]}"
        assert self.left(name) == whole, told
        return {2: "refused in one line, went on", 75: "saved, went on"}.get(ended.code, "killed, went on")
