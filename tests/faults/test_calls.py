"""Each call that creates, writes, forces, names a file or makes a folder fails once, or is the last of its process.

The same command, given again, ends with the files of one that nothing happened to. A call that fails ends it in one line.
"""

import errno
import os
import random

import pytest
from faults import commands, effort
from faults.commands import CALLS, KILL, TASKS, Fault

pytestmark = pytest.mark.battery
QUICK = ("a pack", "a conversion")  # that compile nothing


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = commands.Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.server.close()


def faults(bench, name, errors, seed, count):
    """Faults of a task at places drawn at random, of each kind of call as many."""
    rng, places = random.Random(f"{name} {seed}"), []
    for kind in CALLS:
        places.append([(kind, at) for at in range(1, bench.calls(name, kind) + 1)])
        rng.shuffle(places[-1])
    drawn = [
        row for rows in zip(*([*each, *[None] * count][:count] for each in places), strict=True) for row in rows if row
    ]
    for kind, at in drawn[:count]:
        error = rng.choice(errors)
        # A disk stays full, and a file system is read-only for good; a fault of the device passes.
        yield Fault(
            (kind,) if error in (KILL, errno.EIO) else tuple(CALLS), at, error, error in (errno.ENOSPC, errno.EROFS)
        )


def check(bench, name, fault):
    """Tries one fault; returns what it did, or fails."""
    whole = bench.whole(name)
    bench.begin(name)
    ended = bench.run(name, fault)
    told = f"{name}, {fault}: code {ended.code}\n{ended.output[-3000:]}"
    if fault.error == KILL:
        assert ended.code in (-9, 0), told
    else:
        assert ended.code in (0, 2) and "Traceback" not in ended.output, told
        if ended.code:
            last = ended.output.splitlines()[-1]
            assert last.startswith("error: ") and os.strerror(fault.error) in last, told
    hidden = ended.code == 0
    if hidden:
        assert bench.left(name) == whole, told
    again = bench.run(name)
    assert again.code == 0, f"{told}\nthen: {again.output[-3000:]}"
    assert bench.left(name) == whole, told
    return "without effect" if hidden else "killed, went on" if fault.error == KILL else "refused, went on"


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_task_that_is_killed_at_any_call_ends_like_an_unbroken_one(bench, name):
    for fault in faults(bench, name, (KILL,), 0, effort.amount(2, 60)):
        effort.tried("kills", check(bench, name, fault))


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_call_that_fails_ends_a_task_in_one_line_and_nothing_is_lost(bench, name):
    for fault in faults(bench, name, (errno.ENOSPC, errno.EIO, errno.EROFS), 1, effort.amount(3, 60)):
        effort.tried("disk", check(bench, name, fault))
