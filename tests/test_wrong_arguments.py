"""Wrong arguments of every command of `python -m tl_jax`: one message, exit code 2, no traceback."""

import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from tl_jax import __main__ as front
from tl_jax.studies import command, inprocess

GLYPHS = "builtin:glyphs"
ABSENT = "/proc/nowhere"  # where nothing can be made, even by root
SMALL = ("0", "-1", "x", "", "1e9", "nan", "1000000000000", "9" * 400)
WRONG = ("", "nowhere", f"{ABSENT}/at/all", "a" * 300, "/proc/self/mem", "hf://", "builtin:x", "folder:", "digit",
         "csv:", "a/b/c", "é\udcff", "-", "~nobody/x")  # fmt: skip
OPTIONS = {
    **dict.fromkeys(("--resamples", "--batch-size", "--alphas", "--size", "--top", "--folds", "--count"), SMALL),
    "--tokens": SMALL,
    "--image-size": ("-1", "x", "1000000000"),
    **dict.fromkeys(("--coverage", "--keep"), ("0", "1", "nan", "x", "0.99999")),
    **dict.fromkeys(("--sets", "--ood"), ("x", "energy,knn")),
    "--precision": ("x", ""),
    **dict.fromkeys(("--examples", "--body", "--queue"), ("-1", "x", "9" * 400)),
    "--port": ("-1", "x", "70000"),
    "--host": ("203.0.113.1", "a" * 300),
    "--seconds": ("0", "-1", "x", "nan"),
    "--log": (),
    "--abstain": ("x", "ood,x"),
    "--level": ("0", "1", "2", "nan", "-1", "x", ""),
    "--temperature": ("-1", "x", "nan"),
    "--top-p": ("0", "2", "nan", "x"),
    "--seed": ("-1", "x", "9" * 400),
    "--workers": ("-1", "x", "1000000000"),
    "--interpolation": ("x", ""),
    "--pixels": ("x", "uint16"),
    "--channels": ("0", "-1", "x"),
    "--split": ("", "tst", "train[", "train[5:5]", "train,train"),
    "--splits": ("tst", ",", "train[:10%]"),
    "--label": ("x",),
    "--text": ("x", ",", "x,x,x"),
    "--labels": ("x", "", ",", "x,x"),
    "--num-classes": ("3", "x"),
    "--layout": ("x", ""),
    "--on_error": ("x",),
    "--data_dir": (ABSENT,),
    "--out": ("", f"{ABSENT}/x.csv", f"{ABSENT}/x.npz", "/proc/x.csv", "x.txt"),
    "--weights": WRONG,
    **dict.fromkeys(("--source", "--target"), WRONG),
    **dict.fromkeys(("--source-split", "--target-split"), ("tst", "train[", "train[5:5]")),
    "--method": ("x", "pca,x", ","),
    "--classifier": ("x",),
    "--scale": ("x", "zscore,x"),
    "--arg": ("x", "k=", "pca.k=-1", "nope=1"),
    "--shots": ("-1", "x", "9" * 400),
    "--data": WRONG,
    "--task": ("x", ""),
    "--scores": ("x", ",", "leep,x"),
    "--verify": ("0", "-1", "x"),
    "--cache_dir": ("/proc/x",),
    "--run": ("nowhere", ABSENT),
    "--on": ("x",),
    "--last": ("-1", "x", "0.5"),
    "--model": ("x", "resnet18"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, an image, a class folder and a packed folder."""
    folder = tmp_path_factory.mktemp("place")
    inprocess.run(smoke.get_config(), folder / "run")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "images" / name / "1.png")
    features, label = np.random.default_rng(0).standard_normal((12, 3)), np.arange(12) % 2
    for i, name in enumerate(("source", "target")):
        np.savez(folder / f"{name}.npz", features=features + i, label=label)
    (folder / "file").write_text("x")
    (folder / "damaged.npz").write_bytes((folder / "run" / "predictions.npz").read_bytes()[:-100])
    return folder


def valid(place):
    """Arguments that a command takes, all but its options."""
    run, images = str(place / "run"), str(place / "images")
    return {
        "predict": [run, f"{images}/a/1.png"],
        "evaluate": [run, "digits"],
        "calibrate": [run],
        "metrics": [f"{run}/predictions.npz"],
        "classic": [f"--source=arrays:{place}/source.npz", f"--target=arrays:{place}/target.npz", "--method=coral"],
        "rank": ["--data=digits", f"--weights={GLYPHS}", "--split=train[:40]", f"--cache_dir={place}/cache"],
        "labels": [run],
        "explain": [run],
        "drift": [f"{run}/predictions.npz", f"{run}/predictions.npz"],
        "export": [f"--weights={GLYPHS}", str(place / "exported")],
        "serve": [run],
        "generate": [str(place / "writer"), "the"],
        "inspect": [GLYPHS],
        "convert": ["resnet8_cifar", GLYPHS, str(place / "out.safetensors")],
        "pack": [f"folder:{images}", str(place / "packed")],
        "verify": [str(place / "packed")],
        "report": [str(place / "study")],
        "wise_ft": ["start", run, "--out", str(place / "wise")],
        "soup": [run, run, "--out", str(place / "soup")],
    }


def harmless(argv):
    """What equals the default, is not needed (weights of a run that has its own), or is a fine name of a folder."""
    name, (flag, value) = argv[0], argv[-1].split("=", 1)
    taken = {
        ("predict", "--weights", value),
        ("calibrate", "--weights", value),
        ("explain", "--weights", value),
        ("export", "--weights", "nowhere"),  # what another case exported
        ("rank", "--weights", "-"),  # what another case converted
        ("soup", "--out", "x.txt"),
        ("wise_ft", "--out", "x.txt"),
        ("labels", "--out", "x.txt"),
        ("classic", "--out", "x.txt"),
        ("classic", "--labels", ","),
    }
    return value in ("", "train,train") or (name, flag, value) in taken


def cases(place):
    """(argv, the flag that is wrong or ""): one wrong value for each argument and each option of each command."""
    wrong = (*WRONG, str(place), str(place / "file"), str(place / "damaged.npz"))
    given = valid(place)
    for function, (_, arguments) in front.COMMANDS.items():
        name = function.__name__
        own = given.get(name, [])
        yield [name], ""
        yield [name, *own, "--nonsense", "1"], ""
        for i, value in ((i, value) for i in range(len(own)) if not own[i].startswith("--") for value in wrong):
            yield [name, *own[:i], value, *own[i + 1 :]], ""
        flags = [names[0] for names, options in arguments if names[0].startswith("--") and "action" not in options]
        for flag in flags:
            yield from (([name, *own, f"{flag}={value}"], flag) for value in OPTIONS[flag])


class Hangs(BaseException):
    pass


def hang(*_):
    raise Hangs


def fault(argv, flag, capfd):
    """What is wrong with how a command ends, "" where nothing is."""
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        code = front.main(argv)
    except SystemExit as error:  # of argparse
        code = error.code
    except (Exception, Hangs) as error:
        return repr(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    text = capfd.readouterr().err
    unread = re.match(r"(\d+) files cannot be read", text)  # a line for each: nothing else says which they are
    lines = int(unread[1]) + 1 if unread else 30
    if code not in (0, 1, 2) or "Traceback" in text or len(text.splitlines()) > lines:
        return f"{code} {text[-300:]}"
    named = flag in text or (flag == "--out" and argv[-1].partition("=")[2] in text)
    if code == 2 and not ("error: " in text and named):
        return f"no flag in {text[-300:]!r}"
    return "it was accepted" if code == 0 and flag and not harmless(argv) else ""


@pytest.mark.parametrize("each", [72, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_wrong_arguments_are_one_message(place, monkeypatch, capfd, each):
    """each: of how many cases one is tried."""
    monkeypatch.chdir(place)
    before, memory = signal.signal(signal.SIGALRM, hang), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = [case for case in cases(place) if case[0][0] != "train"][::each]
    faults = [(*map(str, argv), wrong) for argv, flag in tried if (wrong := fault(argv, flag, capfd))]
    signal.signal(signal.SIGALRM, before)
    assert not faults, f"{len(faults)} of {len(tried)}:\n" + "\n".join(map(str, faults))[:5000]
    assert len(tried) * each > 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2 * 2**20  # kB


FILE = ["--config", "configs/smoke.py"]
WRONG_OPTIONS = (
    "lrr=1", "lr", "lr=", "lr=1e999", "total=(1,", "seeds=" + "(" * 500, "terms={[]: 1}", "seed=" + "9" * 5000,
    "data=3",
    "data.augment=[1,2]", "data.augment=0x10", "baseline=-1", "total=(1e18,'examples')", "data.test=tst", "=3",
)  # fmt: skip
WRONG_FLAGS = [
    [], ["--nonsense"], ["x"], ["--config"], ["--config="], ["--config", "nowhere.py"], ["--config", "."],
    ["--study", "."], ["--study", "nowhere"], ["--launcher", "x"], ["--config", "configs/smoke.py:("],
    ["--config", "configs/smoke.py:lr=x"], ["--config", "configs/smoke.py:=1"],
    *([*FILE, *more] for more in (
        ["--jobs", "-1"], ["--jobs", "x"], ["--config=x"], ["--workdir", f"{ABSENT}/x"], ["--coordinator", "x"],
        ["--num-processes", "-1"],
    )),
    *([*FILE, f"--config.{option}"] for option in WRONG_OPTIONS),
]  # fmt: skip


@pytest.mark.parametrize("flags", WRONG_FLAGS, ids=lambda flags: " ".join(flags)[:40])
def test_wrong_flags_of_train_are_one_message(tmp_path, capfd, flags, monkeypatch):
    monkeypatch.setattr(command.preemption, "watch", lambda: lambda step=0: False)
    code = command.main([*flags, *([] if "--workdir" in flags else ["--workdir", str(tmp_path / "w")])])
    text = capfd.readouterr().err
    assert code == 2 and text.startswith("error: ") and len(text) < 2000, text
    option = next((flag.partition("=")[0][9:] for flag in flags if flag.startswith("--config.")), "")
    assert option in text


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--config.data.test=tst"], ["--config.data.augment=0x10"], ["--config.lr=x"]])
def test_the_front_door_says_so_too(tmp_path, flags):
    call = [sys.executable, "-m", "tl_jax", "train", "configs/smoke.py", *flags, "--workdir", str(tmp_path)]
    done = subprocess.run(call, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and flags[0][9:].partition("=")[0] in done.stderr
