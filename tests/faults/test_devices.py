"""What n devices saved, m devices go on from: the same state bit by bit, and no example is repeated or skipped."""

import itertools
import json
import os
import signal
import time

import pytest
from faults import effort

from tl_jax.core import files
from tl_jax.runtime import leaves

pytestmark = pytest.mark.battery
PAIRS = [*itertools.product((1, 2, 4, 8), repeat=2)]
NAME = "a longer run"  # all of a network trains, with BatchNorm and moments of AdamW; a checkpoint every five steps


def losses(bench):
    """{step: loss of the batch}; one entry a step."""
    rows = [row for row in files.read_rows(bench.work / "w" / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [*range(1, 31)]
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def unbroken(bench):
    bench.begin(NAME)
    assert bench.run(NAME).code == 0
    return losses(bench)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "behind"), PAIRS if effort.many else [(1, 8), (4, 2)])
def test_a_run_goes_on_with_other_devices_from_the_same_bits(bench, unbroken, before, behind):
    first = bench.work / "w" / "checkpoints" / "5"  # it has its name when it is complete

    def stop(process):
        deadline = time.monotonic() + 120
        while not first.is_dir() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process, signal.SIGTERM)

    bench.begin(NAME)
    ended = bench.run(NAME, devices=before, meanwhile=stop)
    assert ended.code == 75, ended.output
    hashes = {}
    for path in (bench.work / "w" / "checkpoints").glob("*/state"):
        hashes[int(path.parent.name)] = {leaf: row["sha256"] for leaf, row in leaves.read_index(path).leaves.items()}
    told = bench.server.folder / "restored"
    told.unlink(missing_ok=True)
    again = bench.run(NAME, devices=behind)
    assert again.code == 0, again.output
    restored = json.loads(told.read_text())
    assert restored["leaves"] == hashes[restored["step"]]
    assert losses(bench) == pytest.approx(unbroken, rel=1e-4)
    effort.tried(f"devices: {before} -> {behind}", "the same state and losses")
