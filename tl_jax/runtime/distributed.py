"""Several processes, one run: how they find each other, and what they do together. In one process it does nothing."""

import atexit
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tl_jax.runtime import preemption, rollcall

HEARTBEAT = 60  # seconds, of jax: the second line behind the roll call, and so slower
# What a collective says when another process has gone: that one, not this, is to be named.
ECHO = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION)\b")
PORTS = range(61440, 65536)  # above those that systems give away: for SLURM and Open MPI

_line: rollcall.RollCall | None = None


class Place(NamedTuple):
    """A process among others: where process 0 waits, how many they are, and which one this is."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None  # its accelerators, by number on its host; None: all that it sees


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of this run, if any; must come before jax's devices are used.

    Without arguments it finds them in a SLURM step, under Open MPI and on the hosts of a TPU pod. Raises
    ValueError for incomplete arguments, and where the processes do not come together.
    """
    global _line
    place = find_place(coordinator, num_processes, process_id, os.environ)
    # jax would catch SIGTERM for its preemption service, in place of preemption.watch().
    jax.config.update("jax_enable_preemption_service", False)
    if place is not None and place.count > 1:
        _line = _meet(place)
    elif place is None and on_tpu_hosts(os.environ):
        _line = _meet_on_tpu()
    if _line is not None:
        preemption.ALONE[0] = False
        sys.excepthook = lambda kind, error, traceback: fail(error, 1, traceback=True)
        atexit.register(_line.finalize)


def agreed(stop_requested: Callable[..., bool]) -> Callable[..., bool]:
    """A `stop_requested` that becomes true on all processes after the same number of calls."""
    line = _line
    return stop_requested if line is None else lambda step=0: line.stop_requested(stop_requested())


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns on process 0, plain JSON data, on every process: other hosts may see older files."""
    value = make() if is_first() else None
    return value if _line is None else _line.from_first(value)


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return _line is None or _line.index == 0


def wait_for_cause(error: BaseException) -> None:
    """Waits, where an error may only say that another process has gone, until that is named and ends this one too."""
    if _line is not None and ECHO.match(str(error)):
        time.sleep(rollcall.SILENCE + 2 * rollcall.BEAT)


def fail(error: BaseException, code: int, traceback: bool = False) -> None:
    """Ends all processes because of this one's error, and names it; returns where there is one process only."""
    if _line is None:
        return
    wait_for_cause(error)
    if traceback:
        sys.__excepthook__(type(error), error, error.__traceback__)
    code = 1 if ECHO.match(str(error)) else code
    _line.fail(str(error) if code == 2 else f"{type(error).__name__}: {error}", code)


def find_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> Place | None:
    """The place of this process by the three arguments or by its environment; None for a process by itself."""
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"{', '.join(given)} belong together; missing: {', '.join(missing)}")
        return _slurm_place(environ) or _open_mpi_place(environ)
    if num_processes < 1 or not 0 <= process_id < num_processes:
        found = f"--process-id {process_id} of --num-processes {num_processes}"
        raise ValueError(f"{found}: expected 0 <= process-id < num-processes")
    rollcall.split(coordinator)
    return Place(coordinator, num_processes, process_id)


def _slurm_place(environ: Mapping[str, str]) -> Place | None:
    """By the variables of a step: those of the allocation are there without srun, too."""
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or "SLURM_PROCID" not in environ:
        return None
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).split(",")[0]
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])  # 2(x3),1 is 2, 2, 2, 1
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))][int(environ["SLURM_NODEID"])]
    devices = own_devices(int(environ["SLURM_LOCALID"]), tasks, environ)
    count, index = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_PROCID"])
    return Place(f"{first}:{PORTS[(job + 97 * step) % len(PORTS)]}", count, index, devices)


def _open_mpi_place(environ: Mapping[str, str]) -> Place | None:
    count = int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    if count < 2:
        return None
    index, local = int(environ["OMPI_COMM_WORLD_RANK"]), int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])
    # Such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911: the job, and where mpirun runs.
    uri = re.match(r"(\d+)\.\d+;tcp6?://\[?([^],:]+(?::[^],]+)*)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    local_only = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(count)
    if not (uri or local_only):
        flags = '--coordinator HOST:PORT --num-processes "$OMPI_COMM_WORLD_SIZE" --process-id "$OMPI_COMM_WORLD_RANK"'
        raise ValueError(f"this Open MPI does not say where process 0 is; start every process with {flags}")
    job, host = int(uri[1]) // 4096 if uri else os.getppid(), "127.0.0.1" if local_only else uri[2]
    devices = own_devices(local, int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)), environ)
    return Place(f"{host}:{PORTS[job % len(PORTS)]}", count, index, devices)


def own_devices(local: int, tasks: int, environ: Mapping[str, str]) -> list[int] | None:
    """The accelerators of the `local`-th of `tasks` processes on a host: an equal share; None: all that it sees."""
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    share = len(visible) // tasks
    return None if tasks == 1 or not share else list(range(local * share, (local + 1) * share))


def on_tpu_hosts(environ: Mapping[str, str], devices: str = "/dev") -> bool:
    """Whether this is a host of a TPU pod: TPU devices, the library that drives them, and not known to be alone."""
    if find_spec("libtpu") is None or environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    if "TPU_WORKER_HOSTNAMES" in environ:
        return "," in environ["TPU_WORKER_HOSTNAMES"] or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    return any(Path(devices).glob("accel[0-9]*")) or any(Path(devices, "vfio").glob("[0-9]*"))


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _roll_call(address: str, count: int, index: int, start: Callable[[], Any]) -> rollcall.Meeting:
    return rollcall.join(address, index, count) if index else rollcall.gather(address, count, start)


def _meet(place: Place) -> rollcall.RollCall:
    """The roll call at the coordinator's address, then jax at a port that process 0 finds free."""
    host, _ = rollcall.split(place.coordinator)
    host = f"[{host}]" if ":" in host else host
    connections, names, address = _roll_call(*place[:3], lambda: f"{host}:{_free_port()}")
    jax.distributed.initialize(
        address, place.count, place.index, local_device_ids=place.devices, cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
    )  # fmt: skip
    return rollcall.RollCall(place.index, names, connections)


def _meet_on_tpu() -> rollcall.RollCall | None:
    """jax finds the hosts of a pod by itself; process 0 then tells the others where its roll call is."""
    from jax.experimental import multihost_utils

    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return None
    own = [int(octet) for octet in socket.gethostbyname(socket.gethostname()).split(".")]
    *octets, port = map(int, multihost_utils.broadcast_one_to_all(np.array([*own, _free_port()], np.int32)))
    connections, names, _ = _roll_call(f"{'.'.join(map(str, octets))}:{port}", count, index, lambda: "")
    return rollcall.RollCall(index, names, connections)
