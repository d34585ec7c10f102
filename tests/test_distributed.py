"""Several processes as one: how they find their places, stop together, and end together when one is lost."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading

import pytest
from test_train import remains

from tl_jax.runtime import distributed, rollcall
from tl_jax.runtime.distributed import Place, find_place

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEP = {  # as srun sets it, seen in a real step
    "SLURM_JOB_ID": "9000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[007,009-011]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("node1:1234", None, None), "missing: --num-processes, --process-id"),
        ((None, 2, 0), "missing: --coordinator"),
        (("node1:1234", 2, 2), "expected 0 <= process-id < num-processes"),
        (("node1:1234", 0, 0), "expected 0 <= process-id < num-processes"),
        (("node1", 2, 0), "no HOST:PORT"),
        (("node1:99999", 2, 0), "no HOST:PORT"),
    ],
)
def test_incomplete_or_contradicting_flags_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        find_place(*given, {})


def test_flags_come_before_the_environment():
    assert find_place("node1:1234", 3, 2, STEP) == Place("node1:1234", 3, 2)


def test_a_slurm_step_of_several_tasks_has_its_places():
    port = 61440 + 9000 % 4096
    assert find_place(None, None, None, STEP) == Place(f"node007:{port}", 4, 3)
    gpus = {**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert find_place(None, None, None, gpus).devices == [2, 3]
    for nodes, first in [("a", "a"), ("a,b", "a"), ("n[1-3],m", "n1"), ("rack[2-3]n[4,5]", "rack2n4")]:
        place = find_place(None, None, None, {**STEP, "SLURM_STEP_NODELIST": nodes})
        assert place.coordinator == f"{first}:{port}"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "9000", "SLURM_NTASKS": "2"},  # salloc -n2, without srun
        {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script of -n2
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_by_itself_connects_to_nobody(environ):
    assert find_place(None, None, None, environ) is None


def test_open_mpi_gives_the_places_or_says_what_to_do():
    environ = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    port = 61440 + (1531576320 // 4096) % 4096
    assert find_place(None, None, None, environ | uri) == Place(f"10.96.0.1:{port}", 4, 3)
    with pytest.raises(ValueError, match="--coordinator HOST:PORT"):
        find_place(None, None, None, environ)
    local = find_place(None, None, None, environ | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert local.coordinator.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("visible", "tasks", "expected"),
    [("0,1,2,3", 1, None), ("0,1,2,3", 2, [2, 3]), ("0,1,2,3", 4, [1]), ("5", 4, None), ("", 4, None)],
)
def test_processes_of_one_host_share_its_accelerators(visible, tasks, expected):
    assert distributed.own_devices(1, tasks, {"CUDA_VISIBLE_DEVICES": visible} if visible else {}) == expected


def test_only_hosts_of_a_tpu_pod_look_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: name == "libtpu")
    assert not distributed.on_tpu_hosts({}, tmp_path)
    assert not distributed.on_tpu_hosts({"TPU_WORKER_HOSTNAMES": "only"}, tmp_path)
    assert distributed.on_tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path)
    (tmp_path / "accel0").touch()
    assert distributed.on_tpu_hosts({}, tmp_path)
    assert not distributed.on_tpu_hosts({"JAX_PLATFORMS": "cpu"}, tmp_path)
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    assert not distributed.on_tpu_hosts({}, tmp_path)


def test_in_one_process_nothing_is_different():
    def asked():
        return True

    assert distributed.agreed(asked) is asked and distributed.is_first()
    assert distributed.from_first(lambda: 3) == 3
    distributed.fail(ValueError("lr"), 2)


def line_of(count):
    """The ends of a line between `count` processes, all in this one."""
    pairs = {index: socket.socketpair() for index in range(1, count)}
    names = [f"process {index}" for index in range(count)]
    first = rollcall.RollCall(0, names, {index: pair[0] for index, pair in pairs.items()})
    return [first, *(rollcall.RollCall(index, names, {0: pair[1]}) for index, pair in pairs.items())]


def together(functions):
    """What the functions return, each called in a thread of its own."""
    results = [None] * len(functions)

    def call(index):
        results[index] = functions[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("asked", [{0: 30}, {2: 30}, {0: 30, 1: 31, 2: 29}])
def test_all_stop_after_the_same_step_wherever_and_whenever_the_request_comes(asked):
    """As under a collective, nobody is more than two steps ahead; the request reaches some, at different steps."""
    line, turns, draw = line_of(3), threading.Condition(), random.Random(0)
    done = [0, 0, 0]

    def run(index):
        while True:
            with turns:
                turns.wait_for(lambda: done[index] - min(done) < 2)
                done[index] += 1
                turns.notify_all()
            if line[index].stop_requested(index in asked and done[index] >= asked[index]):
                with turns:
                    stopped, done[index] = done[index], 10**9
                    turns.notify_all()
                line[index].finalize()
                return stopped
            sum(range(draw.randrange(20_000)))

    steps = together([lambda index=index: run(index) for index in range(3)])
    assert len(set(steps)) == 1 and min(asked.values()) <= steps[0]


def test_no_request_no_stop_and_everybody_gets_the_first_ones_values():
    line = line_of(3)
    values = [{"a": 1}, None, "text"]

    def run(index):
        got = [line[index].from_first(value if index == 0 else None) for value in values]
        stopped = any(line[index].stop_requested(False) for _ in range(50))
        line[index].finalize()
        return got, stopped

    assert together([lambda index=index: run(index) for index in range(3)]) == [(values, False)] * 3


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_processes_that_do_not_come_are_named():
    with pytest.raises(ValueError, match=r"of 4 processes, these have not come .*: 1, 2, 3\."):
        rollcall.gather(free_address(), 4, str, timeout=0.01)
    with pytest.raises(ValueError, match="process 1 of 2 reached nobody at"):
        rollcall.join(free_address(), 1, 2, timeout=0.01)


@pytest.mark.parametrize(("count", "others"), [(3, [(1, 3), (1, 3)]), (2, [(1, 4)]), (2, [(2, 2)])])
def test_two_processes_with_one_number_and_other_counts_are_refused(count, others):
    address = free_address()

    def text_of(function, *args):
        with pytest.raises(ValueError) as caught:
            function(*args)
        return str(caught.value)

    texts = together([
        lambda: text_of(rollcall.gather, address, count, str),
        *(lambda other=other: text_of(rollcall.join, address, *other) for other in others),
    ])  # fmt: skip
    assert all("needs its own --process-id below the same --num-processes" in text for text in texts)
    assert f"process {others[0][0]} of {others[0][1]} came" in texts[0]


def test_what_is_no_process_of_the_run_is_not_let_in():
    address = free_address()

    def intrude():
        while True:
            try:
                connection = socket.create_connection(rollcall.split(address))
                break
            except ConnectionRefusedError:
                continue
        with connection:
            connection.sendall(b"GET / HTTP/1.1\n")
            assert connection.recv(10) == b""
        return rollcall.join(address, 1, 2)

    ends = together([lambda: rollcall.gather(address, 2, lambda: "x:1"), intrude])
    assert [list(connections) for connections, _, _ in ends] == [[1], [0]]
    assert ends[0][1:] == ends[1][1:] and ends[0][2] == "x:1"
    for connections, _, _ in ends:
        next(iter(connections.values())).close()


MEMBER = """
import os, sys, time
from tl_jax.runtime import rollcall
rollcall.BEAT, rollcall.SILENCE = 0.2, 3.0
address, index, action = sys.argv[1], int(sys.argv[2]), sys.argv[3]
meet = rollcall.join(address, index, 3) if index else rollcall.gather(address, 3, str)
line = rollcall.RollCall(index, meet[1], meet[0])
print("ready", flush=True)
sys.stdin.readline()
if action.startswith("fail"):
    line.fail("no room", int(action[4:]))
while True:
    time.sleep(60)
"""


def members(actions):
    """Three processes of a line, each with its action, once all are on it."""
    address = free_address()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(index), action], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index, action in enumerate(actions)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    return processes


LOST = [(signal.SIGKILL, "was killed or crashed"), (signal.SIGSTOP, "was not heard of for 3 s")]


@pytest.mark.thin(1)
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(("number", "words"), LOST)
def test_a_lost_process_is_named_by_every_other_and_ends_them(lost, number, words):
    processes = members(["wait"] * 3)
    processes[lost].send_signal(number)
    name = f"process {lost} of 3 ({socket.gethostname()}, pid {processes[lost].pid})"
    for index in {0, 1, 2} - {lost}:
        _, text = processes[index].communicate(timeout=30)
        assert processes[index].returncode == 1
        assert text.startswith(f"error: process {index} of 3") and text.count("\n") == 1
        assert f"because {name} {words}" in text and "the same command resumes" in text
    processes[lost].send_signal(signal.SIGCONT)
    _, text = processes[lost].communicate(timeout=30)
    if number == signal.SIGSTOP:  # it goes on, and learns that it was given up
        assert processes[lost].returncode == 1 and text.startswith((f"error: {name} stood", f"error: {name} was not"))


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_ends_all_with_its_code_and_name(failing):
    processes = members(["fail7" if index == failing else "wait" for index in range(3)])
    processes[failing].stdin.write("\n")
    processes[failing].stdin.flush()
    for index, process in enumerate(processes):
        _, text = process.communicate(timeout=30)
        assert process.returncode == 7
        name = f"process {failing} of 3 ({socket.gethostname()}, pid {processes[failing].pid})"
        assert f"{name} failed: no room" in text
        assert text.startswith(f"error: process {index} of 3")


TRAINER = """
import os, sys
import numpy as np
from tl_jax.runtime import distributed, preemption
asked = preemption.watch()
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
stop_requested = distributed.agreed(asked)
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
assert jax.process_count() == 2 and jax.process_index() == int(sys.argv[2])
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
add = jax.jit(lambda total, x: total + x.sum())
total, step = np.float32(0), 0
print("ready", flush=True)
mine = np.full(2, jax.process_index() + 1.0, np.float32)
while not stop_requested():
    total = add(total, jax.make_array_from_process_local_data(sharding, mine))
    step += 1
    if len(sys.argv) > 3 and step == 5:
        raise RuntimeError("a bad disk")
    if step % 10 == 0:
        total.block_until_ready()
print(step, float(total), flush=True)
sys.exit(preemption.EXIT_CODE)
"""


def trainers(*last):
    """Two processes of jax; `last`: a further argument of the second."""
    address = free_address()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, address, str(index), *(last if index else ())], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_of_jax_stops_both_after_the_same_step():
    processes = trainers()
    for process in processes:
        while process.stdout.readline() != "ready\n":
            pass
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    lines = [out.splitlines()[-1] for out, _ in outputs]
    step, total = lines[0].split()
    assert lines[0] == lines[1] and float(total) == 6.0 * int(step)  # 2 x 1 + 2 x 2 in every step


@pytest.mark.slow
def test_an_exception_in_one_process_of_jax_ends_the_other_and_is_named():
    processes = trainers("fail")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "process 1 of 2" in outputs[0][1] and "failed: RuntimeError: a bad disk" in outputs[0][1]
    assert "Traceback" in outputs[1][1] and "Traceback" not in outputs[0][1]


def launch(count, workdir, *options, config="configs/smoke.py"):
    """A config in `count` processes of one device each; of smoke, four examples of a batch of 16 on each of four."""
    address = free_address()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "launch.py", "--config", str(config), *options, "--workdir", str(workdir)]
    flags = ["--coordinator", address, "--num-processes", str(count), "--process-id"] if count > 1 else []
    return [
        subprocess.Popen(
            [*command, *flags, *([str(index)] if flags else [])], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(count)
    ]  # fmt: skip


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row.get("train/loss", row.get("val/loss")) for row in rows]


@pytest.mark.slow
def test_two_processes_train_as_one_and_only_the_first_speaks(tmp_path):
    options = ["--config.method.name=full", "--config.eval_batch_size=10"]
    finish(launch(1, tmp_path / "one", *options))
    outputs = finish(launch(2, tmp_path / "two", *options))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["metrics"]["confusion"] == results[1]["metrics"]["confusion"]
    assert "step 4/4" in outputs[0] and all("Gloo" in line for line in outputs[1].splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, 1)])
def test_two_processes_of_which_one_is_stopped_or_killed_end_bit_equal_to_unbroken_ones(tmp_path, number, code):
    options = ["--config.method.name=full", "--config.total=(20,'steps')", "--config.eval_every=(10,'steps')"]
    finish(launch(2, tmp_path / "whole", *options))
    processes = launch(2, tmp_path / "broken", *options)
    for line in processes[0].stdout:
        if "step 7/" in line:
            processes[1].send_signal(number)
            break
    output, _ = processes[0].communicate(timeout=60)
    processes[1].communicate(timeout=60)
    assert processes[0].returncode == code, output
    assert ("the same command goes on" if code == 75 else "because process 1 of 2") in output
    finish(launch(2, tmp_path / "broken", *options))
    assert remains(tmp_path / "broken") == remains(tmp_path / "whole")
