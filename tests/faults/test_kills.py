"""SIGKILL at each call that changes a file, and at any moment: the same command ends as if nothing had happened."""

import os
import random
import signal
import time

import pytest
from faults import effort
from faults.commands import KILL, QUICK, TASKS

pytestmark = pytest.mark.battery


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_task_that_is_killed_at_a_call_ends_like_an_unbroken_one(bench, name):
    for fault in bench.faults(name, (KILL,), effort.amount(2, 32)):
        effort.tried("kills", bench.survives(name, fault))


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_task_that_is_killed_at_any_moment_ends_like_an_unbroken_one(bench, name):
    bench.whole(name)
    rng = random.Random(name)
    for _ in range(effort.amount(2, 10)):
        moment = rng.uniform(0, bench.took[name])

        def kill(process, moment=moment):
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)

        effort.tried("kills", bench.survives(name, meanwhile=kill))


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_task_that_is_killed_again_and_again_ends_like_an_unbroken_one(bench, name):
    whole, kills = bench.whole(name), 0
    bench.begin(name)
    for fault in bench.faults(name, (KILL,), effort.amount(3, 10)):
        kills += bench.run(name, fault).code == -signal.SIGKILL
    ended = bench.run(name)
    assert ended.code == 0 and kills, ended.output
    assert bench.left(name) == whole
    effort.tried("kills", "killed, went on", kills)
