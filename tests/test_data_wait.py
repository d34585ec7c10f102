"""The wait for data: what timing.jsonl counts of the time that a batch took to come."""

import json

from tl_jax.runtime import log as logging


def test_only_time_in_which_the_devices_have_no_work_counts_as_wait(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logging.time, "perf_counter", lambda: now[0])

    def batches():
        for seconds in (1.0, 2.0, 4.0, 8.0):  # until each batch comes
            now[0] += seconds
            yield seconds

    idle = iter((True, False, True, False))
    with logging.RunLog(tmp_path, [], 0, 4, verbose=False) as log:
        for step, _ in enumerate(logging.feed([log], batches(), lambda: next(idle)), 1):
            now[0] += 0.5  # of the step
            if step % 2 == 0:
                log.progress(step, {"train/loss": 1.0, "train/accuracy": 0.5}, examples=8)
    assert step == 4
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["data_wait_seconds"] for row in rows] == [1.0, 4.0]
    assert [row["data_wait"] for row in rows] == [round(1 / 4, 4), round(4 / 13, 4)]
