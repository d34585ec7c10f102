"""Every reader of files is given damaged ones:

python tests/faults/readers.py [NAME ...] [--count N] [--seed S] [--guided]

A mutator, seeded, changes a sound file: bits, bytes, numbers, pieces; of an archive the members too, packed again, so
that checksums of the container do not hide what is inside. A reader may refuse a file (ValueError or OSError, one
message that names it) or read it. It must not crash, take more than a second of CPU time, or more memory than LIMIT
beyond twice the file. Prints, as JSON, {reader: {outcome: count}}; what is wrong goes to stderr, with exit code 1.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2])]
SECONDS = 1.0  # of CPU time that a small file may take
LIMIT = 64 * 2**20
EXAMPLES = 5  # of what is wrong, shown
NUMBERS = (b"0", b"-1", b"1", b"2", b"255", b"65536", b"2147483648", b"-9223372036854775808", b"1e400", b"nan", b"null")
BYTES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\n",
    b"\r",
    b'"',
    b"'",
    b",",
    b"[",
    b"{",
    b"\xff\xff\xff\xff",
    b"\x00" * 8,
)


class Reader(NamedTuple):
    """sound: {file: bytes}, of which one is damaged each time. read: gets the folder. room: memory of its own."""

    sound: dict[str, bytes]
    read: Callable[[pathlib.Path], Any]
    room: int = 0
    named: bool = True  # its messages name the file or the folder
    apart: bool = False  # it reads in a process of its own, which takes a second: it gets a hundredth of the files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to eight changes of a file."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, size = rng.randrange(len(found) + 1), rng.choice((1, 1, 2, 4, 16, 128))
        match rng.randrange(8):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                found[at : at + 1] = rng.choice(BYTES)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size] * rng.choice((1, 2, 16))
            case 4:
                other = rng.randrange(len(found) + 1)
                found[at : at + size] = found[other : other + size]
            case 5 if places := list(re.finditer(rb"-?\d+", bytes(found[at : at + 4096]))):
                place = rng.choice(places)
                found[at + place.start() : at + place.end()] = rng.choice(NUMBERS)
            case 6:
                found[at : at + 1] = rng.randbytes(rng.choice((1, 2, 4, 8)))
            case 7 if rng.randrange(4) == 0:
                del found[at:]
    return bytes(found)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A damaged file; of an archive half the time a member."""
    if not data.startswith(b"PK\x03\x04") or rng.randrange(2):
        return mutate(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            new.writestr(name, mutate(old.read(name), rng) if name == chosen else old.read(name))
    return made.getvalue()


def try_reader(name: str, reader: Reader, count: int, seed: int, folder: pathlib.Path) -> tuple[Counter, list[str]]:
    """What became of damaged files, and what is wrong. Runs in a process of its own, which a reader may take down."""
    count = -(-count // 100) if reader.apart else count
    where, rng, outcomes, wrong = folder / "given", random.Random(f"{name} {seed}"), Counter(), []
    where.mkdir()
    warnings.simplefilter("ignore")  # of Pillow
    for file, data in reader.sound.items():
        (where / file).write_bytes(data)
    reader.read(where)  # sound files are read; what is loaded once is there
    files = sorted(file for file, data in reader.sound.items() if data)
    for i in range(count):
        file = rng.choice(files)
        data = damaged(reader.sound[file], rng)
        (where / file).write_bytes(data)
        (folder / "number").write_text(str(i))
        outcome, what = attempt(reader, where, sum(map(len, reader.sound.values())) + len(data))
        outcomes[outcome] += 1
        if outcome == outcome.upper():
            (folder / f"wrong-{i}-{file}").write_bytes(data)
            wrong.append(f"{name}, file {i} of seed {seed}, {file}: {outcome}: {what[:600]}")
        (where / file).write_bytes(reader.sound[file])
    return outcomes, wrong


def try_guided(name: str, make: Callable[[], Reader], count: int, seed: int, folder: pathlib.Path) -> None:
    """As `try_reader`, with files that atheris makes, which keeps those that reach further code. Ends its process."""
    import atheris

    where, outcomes, wrong = folder / "given", Counter(), []
    where.mkdir(), (folder / "corpus").mkdir()
    warnings.simplefilter("ignore")
    reader = make()
    count = -(-count // 100) if reader.apart else count
    files = sorted(file for file, data in reader.sound.items() if data)
    for i, file in enumerate(files):  # the first byte of an input says which file it is
        (where / file).write_bytes(reader.sound[file])
        (folder / "corpus" / file).write_bytes(bytes([i]) + reader.sound[file])
    reader.read(where)

    def one(data: bytes) -> None:
        file = files[data[0] % len(files)] if data else files[0]
        (where / file).write_bytes(data[1:])
        (folder / "number").write_text(str(outcomes.total()))
        outcome, what = attempt(reader, where, sum(map(len, reader.sound.values())) + len(data))
        (where / file).write_bytes(reader.sound[file])
        outcomes[outcome] += 1
        if outcome == outcome.upper():
            wrong.append(f"{name}, {file}: {outcome}: {what[:600]}: {data[1:][:300]!r}")
        if outcomes.total() == count:
            (folder / "outcomes").write_text(json.dumps([outcomes, wrong]))
            os._exit(0)

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.randrange(2):
            return atheris.Mutate(data, most)
        with contextlib.suppress(Exception):  # an archive that is none any more
            return (data[:1] + damaged(data[1:], rng))[:most]
        return (data[:1] + mutate(data[1:], rng))[:most]

    longest = 4 * max(map(len, reader.sound.values()))
    words = [
        f"-seed={seed + 1}",
        f"-max_len={longest}",
        "-rss_limit_mb=0",
        "-timeout=0",
        "-verbosity=0",
        f"{folder}/corpus",
    ]
    atheris.Setup([sys.argv[0], *words], one, custom_mutator=change)
    atheris.Fuzz()


def attempt(reader: Reader, where: pathlib.Path, size: int) -> tuple[str, str]:
    """(outcome, details) of one file; outcomes in capitals are wrong."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + LIMIT + 2 * size + reader.room
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    began = time.process_time()
    signal.alarm(30)
    try:
        reader.read(where)
        outcome, what = "read", ""
    except (ValueError, OSError) as error:
        outcome, what = "refused", str(error)
        if reader.named and where.name not in what:
            outcome = "NOT NAMED"
    except MemoryError:
        outcome, what = "TOO MUCH MEMORY", ""
    except BaseException as error:
        outcome, what = "CRASH", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    took = time.process_time() - began
    return ("TOO SLOW", f"{took:.1f} s") if took > SECONDS else (outcome, what)


def archive(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return made.getvalue()


def saved(save: Callable[[Any], None]) -> bytes:
    """What a function writes into the file that it is given."""
    made = io.BytesIO()
    save(made)
    return made.getvalue()


def readers() -> Iterator[tuple[str, Callable[[], Reader]]]:
    """Every reader by name, made when it is needed."""
    import numpy as np

    from tl_jax import config, tasks
    from tl_jax.core import files
    from tl_jax.data import sources
    from tl_jax.data.image import decode
    from tl_jax.data.readers import pack, packed
    from tl_jax.data.text import tokenizer
    from tl_jax.runtime import leaves
    from tl_jax.studies import store
    from tl_jax.weights import formats, word_vectors

    rng = np.random.default_rng(0)
    tensors = {"a/kernel": rng.random((4, 3), np.float32), "a/b": np.arange(5), "c/d": np.full((), 2, np.float16)}

    def weights(name: str, data: bytes) -> Reader:
        return Reader({name: data}, lambda folder: formats.read(folder / name))

    def written(function: Callable[[pathlib.Path], None]) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            function(pathlib.Path(folder))
            paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
            return {path.name: path.read_bytes() for path in paths}

    def safetensors() -> Reader:
        import safetensors.numpy

        return weights("a.safetensors", safetensors.numpy.save(tensors, {"k": "v"}))

    def torch_zip(**named: bool) -> Reader:
        import torch

        state = {"conv.weight": torch.ones(2, 3), "n": torch.tensor(3), "half": torch.ones(4).bfloat16()}
        return weights("a.pth", saved(lambda file: torch.save({"state_dict": state, "epoch": 3}, file, **named)))

    def hdf5() -> Reader:
        return weights("a.h5", saved(lambda file: formats.keras_files.write(file, tensors, {})))

    def images(kind: str, **named: Any) -> Reader:
        from PIL import Image

        image = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
        image = image.convert("P") if kind == "GIF" else image
        data = saved(lambda file: image.save(file, kind, **named))
        return Reader({"a": data}, lambda folder: decode.decode((folder / "a").read_bytes()), 2**30, named=False)

    def table(name: str, rows: str, source: str, **named: Any) -> Reader:
        return Reader({name: rows.encode()}, lambda folder: sources.load(f"{source}:{folder / name}", "train", **named))

    def arrays() -> Reader:
        given = {"train_image": rng.integers(0, 256, (4, 5, 6, 3), np.uint8), "train_label": np.arange(4) % 2}
        data = saved(lambda file: np.savez(file, **given, classes=np.array(["x", "y"])))
        return Reader({"a.npz": data}, lambda folder: sources.load(f"arrays:{folder / 'a.npz'}", "train"))

    def texts() -> Reader:
        given = {"train_text": np.frombuffer(b"onetwo", np.uint8), "train_offsets": np.array([0, 3, 6])}
        data = saved(lambda file: np.savez(file, **given, train_label=np.arange(2), classes=np.array(["x", "y"])))
        return Reader({"a.npz": data}, lambda folder: sources.load(f"arrays:{folder / 'a.npz'}", "train"))

    def mat() -> Reader:
        import scipy.io

        data = saved(
            lambda file: scipy.io.savemat(file, {"fts": rng.random((6, 4)), "labels": np.arange(6)[:, None] % 2 + 1})
        )
        return Reader({"a.mat": data}, lambda folder: sources.load(f"mat:{folder / 'a.mat'}", "train"), apart=True)

    def a_pack() -> Reader:
        from PIL import Image

        def write(folder: pathlib.Path) -> None:
            for i in range(4):
                (folder / f"photos/train/{'xy'[i % 2]}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).save(
                    folder / f"photos/train/{'xy'[i % 2]}/{i}.png"
                )
            pack.pack(
                f"folder:{folder / 'photos'}",
                str(folder / "packed"),
                ("train",),
                size=8,
                num_workers=0,
                report=lambda _: None,
            )

        def read(folder: pathlib.Path) -> None:
            store = packed.open_split(folder)
            packed._opened.cache_clear()
            return store

        sound = {name: data for name, data in written(write).items() if not name.endswith(".png")}
        return Reader(sound, read)

    def a_tokenizer() -> Reader:
        text = tokenizer.train("words", ["the quick brown fox", "a lazy dog"]).text.encode()
        return Reader({"tokenizer.json": text}, lambda folder: tokenizer.read(folder))

    def some_leaves() -> Reader:
        sound = written(lambda folder: leaves.write(folder, tensors, '{"a": 1}'))
        return Reader(sound, lambda folder: leaves.read(folder, leaves.read_index(folder)), 2**30, named=False)

    def vectors() -> Reader:
        return Reader(
            {"a.txt": b"3 2\nthe 0.1 0.2\nfox 1 -2e-3\ndog 0 0\n"}, lambda folder: word_vectors.read(folder / "a.txt")
        )

    def a_config() -> Reader:
        text = json.dumps(config.flatten(config.make()), indent=1).encode()

        def read(folder: pathlib.Path) -> None:
            config.check(config.read(folder / "config.json"))

        return Reader({"config.json": text}, read, named=False)  # which option is wrong is told by its name

    def a_plan() -> Reader:
        from configs import smoke
        from tl_jax.studies.study import Study

        study = Study(smoke.get_config(), {"rate": {"a": {"lr": 0.1}, "b": {"lr": 0.2}}}, seeds=(0,))
        sound = written(lambda folder: store.plan(folder, "name", "Which?", study))
        plan = json.loads(sound["study.json"])
        plan.pop("seal", None)
        return Reader({"study.json": json.dumps(plan).encode()}, store.read_plan)

    def predictions() -> Reader:
        spec = tasks.Spec(class_names=("a", "b"))
        made = tasks.make_predictions({"logits": rng.random((3, 2), np.float32)}, np.zeros(3, int), list("abc"), spec)
        sound = written(lambda folder: tasks.save_predictions(folder / "a.npz", made))
        return Reader(sound, lambda folder: tasks.load_predictions(folder / "a.npz"))

    def rows() -> Reader:
        sound = written(lambda folder: files.write_json(folder / "a.json", {"x": [1, 2.5], "y": None, "z": "text"}))
        return Reader(sound, lambda folder: files.read_json(folder / "a.json"))

    csv = "x0,x1,label\n" + "".join(f"{i},{i * 0.5},{'ab'[i % 2]}\n" for i in range(12))
    lines = "".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2]}) + "\n" for i in range(12))
    yield from {
        "safetensors": safetensors,
        "npz weights": lambda: weights("a.npz", saved(lambda file: np.savez(file, **tensors))),
        "torch zip": torch_zip,
        "torch legacy": lambda: torch_zip(_use_new_zipfile_serialization=False),
        "keras hdf5": hdf5,
        "word vectors": vectors,
        "PNG": lambda: images("PNG"),
        "JPEG": lambda: images("JPEG"),
        "GIF": lambda: images("GIF"),
        "BMP": lambda: images("BMP"),
        "WEBP": lambda: images("WEBP"),
        "TIFF": lambda: images("TIFF", compression="tiff_lzw"),
        "arrays": arrays,
        "arrays of texts": texts,
        "mat": mat,
        "a table": lambda: table("a.csv", csv, "table", labels=("label",)),
        "texts in csv": lambda: table("a.csv", csv.replace("x0", "text"), "text", labels=("label",), text=("text",)),
        "texts in json lines": lambda: table("a.jsonl", lines, "text", labels=("label",)),
        "a pack": a_pack,
        "a tokenizer": a_tokenizer,
        "leaves of a checkpoint": some_leaves,
        "a config": a_config,
        "a plan": a_plan,
        "predictions": predictions,
        "sealed JSON": rows,
    }.items()  # fmt: skip


def in_a_child(name: str, make: Callable[[], Reader], count: int, seed: int, guided: bool) -> tuple[Counter, list[str]]:
    """Forks, so that a reader that takes its process down is told like any other fault."""
    with tempfile.TemporaryDirectory(prefix="readers-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as given:
        folder = pathlib.Path(given)
        if not (child := os.fork()):
            code, errors = 1, os.open(folder / "errors", os.O_WRONLY | os.O_CREAT)
            os.dup2(errors, 1), os.dup2(errors, 2)
            try:
                if guided:
                    try_guided(name, make, count, seed, folder)
                outcomes, wrong = try_reader(name, make(), count, seed, folder)
                (folder / "outcomes").write_text(json.dumps([outcomes, wrong]))
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if (folder / "outcomes").exists():
            outcomes, wrong = json.loads((folder / "outcomes").read_text())
            return Counter(outcomes), wrong
        at = (folder / "number").read_text() if (folder / "number").exists() else "none"
        told = (folder / "errors").read_text(errors="replace")[-1000:]
        return Counter({"ENDED": 1}), [f"{name}: the process ended with {status} at file {at} of seed {seed}\n{told}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    args = parser.parse_args()
    table, problems = {}, []
    instrument = contextlib.nullcontext()
    if args.guided:
        import atheris

        instrument = atheris.instrument_imports(include=["tl_jax", "zipfile", "numpy.lib"])
    with instrument:
        known = [*readers()]
    if unknown := {*args.names} - {name for name, _ in known}:
        parser.error(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(name for name, _ in known)}")
    for name, make in known:
        if not args.names or name in args.names:
            outcomes, wrong = in_a_child(name, make, args.count, args.seed, args.guided)
            table[name] = outcomes
            problems += wrong
    print(json.dumps(table))
    print("\n".join(problems[: EXAMPLES * len(table)]), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
