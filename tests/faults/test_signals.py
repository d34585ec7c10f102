"""SIGTERM and SIGINT at any moment: a run saves and says how it goes on, and then ends as if nothing had happened."""

import os
import random
import signal
import time

import pytest
from faults import effort
from faults.commands import QUICK, TASKS

pytestmark = pytest.mark.battery


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_task_that_is_asked_to_stop_stops_and_goes_on_to_the_same_files(bench, name, sent):
    bench.whole(name)
    rng = random.Random(f"{name} {sent}")
    for _ in range(effort.amount(1, 5)):
        moment = rng.uniform(0, bench.took[name])

        def ask(process, moment=moment):
            time.sleep(moment)
            os.kill(process, getattr(signal, sent))

        effort.tried("signals", bench.survives(name, meanwhile=ask))
