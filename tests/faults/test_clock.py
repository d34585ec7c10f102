"""A clock that jumps by an hour or a year while a task runs changes nothing that it leaves."""

import random

import pytest
from faults import effort
from faults.commands import QUICK, TASKS, Fault

pytestmark = pytest.mark.battery
JUMPS = (-365 * 86400, -3600, 3600, 365 * 86400)


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_clock_that_jumps_changes_nothing(bench, name):
    whole, rng = bench.whole(name), random.Random(name)
    calls = sum(bench.seen[name].values())
    for _ in range(effort.amount(2, 6)):
        fault = Fault(at=rng.randrange(calls), jump=rng.choice(JUMPS))
        bench.begin(name)
        ended = bench.run(name, fault)
        assert ended.code == 0 and bench.left(name) == whole, f"{name}, {fault}: {ended.output[-3000:]}"
        effort.tried("clock", "the same files")
