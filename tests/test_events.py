"""TensorBoard event files: read by the classes that TensorBoard has, they hold metrics.jsonl, each step once."""

import struct

import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core.files import read_rows
from tl_jax.runtime import events
from tl_jax.runtime.log import RunLog
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import artifacts
from tl_jax.training.train import train

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
plugin_hparams_pb2 = pytest.importorskip("tensorboardX.proto.plugin_hparams_pb2")
record_writer = pytest.importorskip("tensorboardX.record_writer")


def read(path):
    """Every event of a file, by another implementation of the CRC and the classes of the protocol buffers."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        length, crc = struct.unpack_from("<QI", data, at)
        assert crc == record_writer.masked_crc32c(data[at : at + 8])
        event = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == record_writer.masked_crc32c(event)
        found.append(event_pb2.Event.FromString(event))
        at += 16 + length
    return found


def scalars(found):
    return [
        {"step": event.step, **{value.tag: value.simple_value for value in event.summary.value}} for event in found[2:]
    ]


def as_shown(rows):
    """Rows in single precision, without what is not known."""
    return [{name: pytest.approx(x, rel=1e-6) for name, x in row.items() if x is not None} for row in rows]


def options_of(event):
    (value,) = event.summary.value
    content = value.metadata.plugin_data
    assert (value.tag, content.plugin_name) == ("_hparams_/session_start_info", "hparams")
    start = plugin_hparams_pb2.HParamsPluginData.FromString(content.content).session_start_info
    return {name: getattr(x, x.WhichOneof("kind")) for name, x in start.hparams.items()}


def test_the_file_of_rows_holds_every_row_and_the_options(tmp_path):
    given = {"lr": 0.1, "seed": 3, "model.name": "a\udcff", "flag": True, "groups": {"a": 1}}
    with RunLog(tmp_path, [], 0, 9, verbose=False, options=given) as log:
        log.write(2, {"train/loss": 1 / 3, "train/lr": 1e-20})
        log.write(300, {"val/loss": float("nan"), "val/accuracy": 1.0})
    found = read(tmp_path / events.ROWS)
    assert found[0].file_version == "brain.Event:2"
    assert options_of(found[1]) == {**given, "model.name": "a\\udcff", "groups": "{'a': 1}"}
    assert scalars(found) == as_shown(read_rows(tmp_path / "metrics.jsonl"))


DAMAGES = (lambda data: data[:-3], lambda data: data[:45] + b"x" + data[46:], lambda data: b"")


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "changed", "empty"])
def test_a_resumed_run_has_each_step_once_and_keeps_the_times(tmp_path, damage):
    rows = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    with RunLog(tmp_path, [], 0, 9, verbose=False, options={}) as log:
        for row in rows:
            log.write(row["step"], {"train/loss": row["train/loss"]})
    path = tmp_path / events.ROWS
    before = [event.wall_time for event in read(path)]
    path.write_bytes(damage(path.read_bytes()))
    with RunLog(tmp_path, rows[:2], 2, 9, verbose=False, options={}) as log:
        log.write(3, {"train/loss": 0.25})
    found = read(path)
    assert scalars(found) == as_shown([*rows[:2], {"step": 3, "train/loss": 0.25}])
    times, kept = [event.wall_time for event in found], {0: 4, 1: 1, 2: 0}[DAMAGES.index(damage)]
    assert times == sorted(times) and times[:kept] == before[:kept]


@pytest.mark.slow
def test_a_run_that_was_stopped_leaves_the_event_files_of_one_that_was_not(tmp_path):
    config = options.override(smoke.get_config(), {"log": ("tensorboard",), "resamples": 10})
    with pytest.raises(Preempted):
        train(config, tmp_path / "a", verbose=False, stop_requested=lambda step: step == 3)
    assert scalars(read(tmp_path / "a" / events.ROWS)) == as_shown(read_rows(tmp_path / "a/metrics.jsonl"))
    result = train(config, tmp_path / "a", verbose=False)
    rows = read_rows(tmp_path / "a/metrics.jsonl")
    assert scalars(read(tmp_path / "a" / events.ROWS)) == as_shown(rows) and rows[-1]["step"] == 4
    found = read(tmp_path / "a" / events.RESULT)
    told = options_of(found[1])
    assert (told["model.name"], told["data.shots"], told["batch_size"]) == ("resnet8_cifar", 4.0, 16.0)
    assert {event.step for event in found[1:]} == {result["step"]}
    (row,) = scalars(found)
    assert row["test/accuracy"] == pytest.approx(result["metrics"]["accuracy"]["value"])
    (tmp_path / "a/one.png").write_bytes(PNG)
    artifacts.log_result(tmp_path / "a", {})
    (image,) = read(tmp_path / "a" / events.RESULT)[-1].summary.value
    assert (image.tag, image.image.width, image.image.height) == ("one", 3, 2)
    assert image.image.encoded_image_string == PNG
    train(options.override(config, {"log": ()}), tmp_path / "b", verbose=False)
    assert not list((tmp_path / "b").glob("events*"))
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == (tmp_path / "a/metrics.jsonl").read_bytes()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000030000000208000000000e8ac6cd0000000e49444154789c63f8cf00010c00020a00ff"
)
