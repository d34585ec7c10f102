"""TensorBoard event files, in the few fields of their protocol buffers that a run needs.

A file is records: the length as little-endian uint64, a CRC of it, an Event (tensorflow/core/util/event.proto), a CRC
of that; the CRC is CRC-32C (Castagnoli), rotated and shifted, as in tensorflow/core/lib/io/record_writer.h. The fields
of hyperparameters are those of tensorboard/plugins/hparams/plugin_data.proto.
"""

import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_jax.core import files

ROWS, RESULT = "events.out.tfevents.0.rows", "events.out.tfevents.1.result"  # read by TensorBoard in this order
_WIDTH, _HEIGHT = slice(16, 20), slice(20, 24)  # where the sides of a PNG stand


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        table.append(byte)
    return table


_CRC = _table()


def masked_crc(data: bytes) -> int:
    """CRC-32C of the bytes as a record has it: rotated right by 15 bits, plus a constant."""
    crc, table = 0xFFFFFFFF, _CRC
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _message(*fields: tuple[int, Any]) -> bytes:
    """The fields (number, value) of a message: float as double, int and bool as varint, text and bytes by length."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += _varint(number << 3 | 1) + struct.pack("<d", value)
        elif isinstance(value, int):
            out += _varint(number << 3) + _varint(int(value))
        else:
            data = value.encode(errors="backslashreplace") if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def _record(when: float, *fields: tuple[int, Any]) -> bytes:
    event = _message((1, when), *fields)  # the time comes first: see _times
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", masked_crc(length)) + event + struct.pack("<I", masked_crc(event))


def _times(data: bytes) -> Iterator[float]:
    """When each whole record of a file was written, up to the first that is damaged."""
    at = 0
    while len(data) >= at + 12:
        (length,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + length]
        crc = data[at + 12 + length : at + 16 + length]
        if crc != struct.pack("<I", masked_crc(event)) or length < 9:
            return
        yield struct.unpack_from("<d", event, 1)[0]
        at += 16 + length


def _scalars(row: Mapping[str, float | None]) -> bytes:
    """The Summary of a row; a number that is not known is not in it. simple_value is a float."""
    values = [(name, x) for name, x in row.items() if name != "step" and x is not None]
    return b"".join(_message((1, _message((1, name)) + b"\x15" + struct.pack("<f", x))) for name, x in values)


def _options(options: Mapping[str, Any], when: float) -> bytes:
    """The Summary from which the page HPARAMS takes the options of a run; what is no number or flag stands as text."""
    pairs = []
    for name, x in options.items():
        if isinstance(x, bool | str):
            value = _message((3, x) if isinstance(x, str) else (4, x))
        else:
            value = _message((2, float(x)) if isinstance(x, int | float) else (3, str(x)))
        pairs.append((1, _message((1, name), (2, value))))
    start = _message(*pairs, (5, when))
    metadata = _message((1, _message((1, "hparams"), (2, _message((1, 0), (3, start))))))
    return _message((1, _message((1, "_hparams_/session_start_info"), (8, _message((1, 1), (2, b""))), (9, metadata))))


def _image(name: str, png: bytes) -> bytes:
    height, width = (int.from_bytes(png[part], "big") for part in (_HEIGHT, _WIDTH))
    return _message((1, _message((1, name), (4, _message((1, height), (2, width), (3, 4), (4, png))))))


def begin(folder: Path, options: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the file of rows anew with those that a run goes on from, each with the time that it had.

    So no step stands in it twice, and what was lost after a kill comes again as it does in metrics.jsonl.
    """
    path = folder / ROWS
    known, now = list(_times(path.read_bytes())) if path.exists() else [], time.time()
    summaries = [_options(options, known[0] if known else now), *map(_scalars, rows)]
    steps = [0, *(row["step"] for row in rows)]
    whens = [*known[1:], *[now] * len(summaries)][: len(summaries)]
    with files.atomic_write(path) as file:
        file.write(_record(known[0] if known else now, (3, "brain.Event:2")))
        for when, step, summary in zip(whens, steps, summaries, strict=True):
            file.write(_record(when, (2, step), (5, summary)))


def add(folder: Path, row: Mapping[str, Any]) -> None:
    """Adds a row of metrics.jsonl, {"step", name: number or None}."""
    with files.writing(folder / ROWS), (folder / ROWS).open("ab") as file:
        file.write(_record(time.time(), (2, row["step"]), (5, _scalars(row))))


def write_result(
    folder: Path, options: Mapping[str, Any], step: int, values: Mapping[str, float | None], figures: Sequence[Path]
) -> None:
    """Writes what a finished run is scored at, and its figures (.png), at the step that was scored."""
    now = time.time()
    summaries = [_options(options, now), _scalars(values), *(_image(path.stem, path.read_bytes()) for path in figures)]
    with files.atomic_write(folder / RESULT) as file:
        file.write(_record(now, (3, "brain.Event:2")))
        for summary in summaries:
            file.write(_record(now, (2, step), (5, summary)))
