"""Wrong options of every kind end in one message with the option's key: a seeded fuzzer up to where training begins."""

import math
import random
import re
import resource
import signal
import traceback

import numpy as np
import pytest

from configs import diabetes, smoke
from tl_jax import config as options
from tl_jax.core.options import OPTIONS
from tl_jax.runtime import sharding
from tl_jax.studies import inprocess
from tl_jax.training import build, replicas, settings

CASES = 1000
TEXTS = ("", "x", "trian[:80%]", "train[", "train[:0%]", "folder:", "folder:/nowhere", "\x00", "\n\x1b[2J", "\ud800",
         "é😀", "a" * 100_000, "(", "(a+)+$", "None", "1e18", "..", "/", "train+" * 500)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 0.5, -0.5, 10**9, 1e18, 10**18, 2**63, 10**400, -(10**400), 1e-320, math.nan, math.inf,
           -math.inf, 1j, np.float32("nan"), np.int64(-1), True, False, 0x10)  # fmt: skip
NESTED_TUPLE, NESTED_TABLE = (), {}
for _ in range(60):
    NESTED_TUPLE, NESTED_TABLE = (NESTED_TUPLE,), {"a": NESTED_TABLE}
OTHERS = (
    None, b"bytes", (), [1, 2], (None,), ("x",), ("x", 1), (1e18, "examples"), (10**400, "steps"), (math.nan, "steps"),
    (1, "parsecs"), (1,), ("steps", 1), (1, ["steps"]), (-1, "epochs"), {}, {"x": 1}, {"x": {"y": 1}}, {1: 2}, {"": {}},
    {"a.b": {}}, {"\ud800": {}}, {None: None}, ((),), (("x", {}),), (("x", "y"),), (("lr", math.nan),),
    (("x", {"y": None}),), (("x", 1, 2),), ((("lr", 1),),), ((("lr", "x"),),), (((1, 2),),), ((("total", 3),),),
    (("model.name", "x"),), (("model.name.x", 1),), ((["a"], {}),), NESTED_TUPLE, NESTED_TABLE, np.zeros(3), set(),
    object(), print, range(3), (1, 1), (math.nan,), (1e400,), (10**400,), ("a", ["b"]), ("a" * 10_000,), ("\ud800",),
)  # fmt: skip
STREAM = {"source": "digits", "split": "test[:10%]"}
OWN = {  # values that are nearly right
    "model.name": ("resnet8_cifr", "vit_small_patch16_224x", "mlp_small"),
    "model.weights": ("builtin:glyfs", "builtin:", "hf://", "hf://a", "hf://a/b", "timm:", "/etc/passwd", ".", "/"),
    "model.reinit": (("stage9",), ("stem", "stem"), ("(",), ("",)),
    "model.partial": (("stage9/.*",), ("stage3",), ("",), (".*",), ("stage3/.*", "stage3/.*")),
    "model.image_size": (1, 10**9, 10**6),
    "model.head": ((("dense", {"width": -1}),), (("dence", {"width": 3}),), (("dense", {"width": 10**12}),)),
    "model.head_init": ("ones",),
    "networks": ({"teacher": {"name": "resnet8_cifr", "weights": ""}}, {"a": {"name": "resnet8_cifar"}},
                 {"a": {"name": "resnet8_cifar", "weights": "x", "image_size": 10**9}}),
    "data.source": ("digit", "digits:", "csv:x", ("digits", "digit"), ("digits", "digits"), "tfds:", "table:diabets",
                    "mat:x", "corrupt:contrast:9:digits", "corrupt:contrast:1:digit", "corrupt:contrast:3:digits"),
    "data.weights": ("x", "/proc/x"),
    "data.train": ("tst", "train[80%:20%]", "train[:1e3]", "train[:999999]", "train[90%:]+train[95%:]"),
    "data.val": ("tst", "train[80%:20%]", "train", "train[:999999]"),
    "data.test": ("tst", "train", "test[:0]", "test[5:5]", "test[:999999]"),
    "data.extra_eval": ((("a", "digit", "test"),), (("a", "digits", "tst"),), (("val", "digits", "test"),)),
    "data.labels": (("x",), ("target",)),
    "data.resample": ("kfold:0:0", "kfold:5:9", "kfold:5", "bootstrap:", "kfold:100000000:0", "bootstrap:" + "9" * 30),
    "data.shots": (10**9, 10**30, 100_000),
    "data.augment": ((("flipp", {}),), (("flip", {"p": 2}),), (("flip", {"q": 2}),), (("flip", 3),), ("flip",),
                     (("random_resized_crop", {"size": 10**9}),), (("random_crop", {"size": 9}),)),
    "data.card": ({"mean": (1, 2)}, {"std": (0, 0, 0)}, {"input_size": 10**9}, {"crop": 0}, {"crop": "x"},
                  {"interpolation": "x"}, {"mean": ("a", "b", "c")}, {"input_size": 16.5}, {"crop": 1e-300},
                  {"mean": math.nan}, {"std": (math.nan,) * 3}),
    "streams": ({"a": STREAM}, {"a": STREAM | {"split": "tst"}}, {"a": STREAM | {"augment": (("flipp", {}),)}},
                {"target": STREAM | {"shots": 10**9}}, {"target": STREAM | {"source": "digit"}}, {"a": None},
                {"target": STREAM | {"batch_size": 7}}, {"a b": STREAM}, {"a": STREAM | {"strong": (("flp", {}),)}},
                {"target": STREAM | {"sampling": []}}),
    "terms": ({"l2": {}}, {"l2_sp": {"alpha": -1}}, {"l2_sp": {"alfa": 1}}, {"l2_sp": {"weight": math.nan}},
              {"dann": {"target": "tarket"}}, {"kd": {}}, {"task": {"weight": 0}}, {"dann": {"width": 10**12}},
              {"l2_sp": {"weight": ("linear", {"stop": "x"})}}, {"l2_sp": {"weight": ("lin", {})}},
              {"delta": {"cuts": ("stage9",)}}, {"delta": {"temperature": math.inf}}, {"dann": {"strength": ("x", 1)}},
              {"l2_sp": {"weight": ([], {})}}),
    "task_args": ({"class_weight": (1, 2)}, {"class_weight": "balance"}, {"class_weight": (1e308,) * 10}),
    "method.name": ("ful", "linear", "kn"),
    "method.k": (1, 99, 10**30),
    "method.blocks": (("stage9",), ("stage1", "stage1"), ("(",)),
    "method.rules": ((("head/.*", "head"),), (("(", "x"),), (("bakbone/.*", "a"), (".*", "head")), ((".*", "frozen"),)),
    "method.norm": ((("bakbone/.*", "frozen"),), ((".*", "frosen"),), (("(", "frozen"),)),
    "method.add": ((("lorra", {}),), (("lora", {"rank": -1}),), (("lora", {"rnk": 1}),), (("lora", {"rank": 10**9}),),
                   (("lora", {"targets": "(x"}),), (("prompt", {}),), (("lora", {}), ("lora", {}))),
    "method.grid": ((0,), (-1,), (1.5,), (10**9,), (0.0, math.inf)),
    "optimizer": ("adamm", "chain", "multi_transform", "__doc__", "__name__", "sgd", "adam.x"),
    "optimizer_args": ({"b3": 1}, {"b1": "x"}, {"learning_rate": 1}, {"b1": None}, {"eps": "nan"}),
    "decay": ("*", "nothing", "(?P<a"),
    "groups": ({"backbon": {"lr_mult": 1}}, {"head": {"lr_malt": 1}}, {"head": {"lr_mult": -1}}, {"frozen": {}},
               {"head": {"optimizer": "x"}}, {"head": {"args": {"x": 1}}}, {"head": {"args": 3}}, {"head": 3}),
    "schedule.name": ("cosin",),
    "schedule.args": ({"final": -1}, {"finall": 1}, {"milestones": (2,)}, {"milestones": 3}),
    "schedule.warmup": ((10**9, "epochs"),),
    "phases": (((("lrr", 1),),), ((("batch_size", 1),),), ((("lr", -1),),), ((("method.name", "ful"),),), ((),),
               ((("total", (1e18, "examples")),),), ((("lr", 1), ("lr", 2)),), ((("terms", {"l2": {}}),),)),
    "baseline": ((("lrr", 1),), (("seed", 1),), (("lr", -1),), (("model.weights", "builtin:x"),), (("lr", 1e-3),)),
    "replicas": (
        ((("batch_size", 1),),), ((("lr", -1),),), ((("lr", 0.1),), (("lr", 0.1),)), ((("seed", -1),),), ((),),
    ),
    "seeds": ((0,), (1, 1), (-1,), (2**32,), (1.0,)),
    "cache_dir": ("/proc/x",),
    "data.data_dir": ("/nowhere",),
}  # fmt: skip


def base(name):
    """A small config of each kind of run."""
    if name == "table":
        return options.override(diabetes.get_config(), {"total": (4.0, "steps"), "eval_every": (2.0, "steps")})
    config = smoke.get_config()
    if name == "probe":
        return options.override(config, {"method.name": "knn", "select": "last", "data.shots": 0})
    if name == "study":
        return options.override(config, {"seeds": (1, 2), "baseline": (("model.weights", ""),)})
    if name == "all":
        phase = (("total", (2.0, "steps")), ("terms", {"rkd": {"weight": 0.5}, "dann": {"width": 8}}))
        return options.override(config, {
            "streams": {"target": {"source": "digits:faded", "split": "train[:100]"}},
            "networks": {"teacher": {"name": "resnet8_cifar", "weights": "builtin:glyphs"}},
            "phases": (phase, (("method.name", "full"), ("total", (2.0, "steps")))), "select": "last",
        })  # fmt: skip
    return config


BASES = ("gradient", "probe", "table", "study", "all")


def draw_value(draw, key):
    """A value for an option, nearly always a wrong one."""
    own = OWN.get(key, OTHERS)
    return draw.choice(draw.choice((own, own, TEXTS, NUMBERS, OTHERS, OTHERS)))


def cases(seed, count):
    """(base, {key: value}, whether from the command line): every option alone, and pairs of them."""
    draw, keys = random.Random(seed), list(OPTIONS)
    for i in range(count):
        chosen = [keys[i % len(keys)], *([draw.choice(keys)] if i % 3 == 2 else [])]
        yield draw.choice(BASES), {key: draw_value(draw, key) for key in chosen}, draw.random() < 0.25


class Begins(Exception):
    """Training would begin now."""


class Hangs(BaseException):
    """A case took too long; no code catches it."""


def _begin(config, folder, **_):
    one = settings.read(config)
    parallel = sharding.make_parallel(one.loop.parallel, fsdp=one.loop.fsdp)
    build.assemble(one, build.prepare(one, parallel), parallel)
    raise Begins


def _begin_together(configs, folders, home, **_):
    replicas.make([settings.read(config) for config in configs], sharding.make_parallel("jit"))
    raise Begins


def _hang(*_):
    raise Hangs


@pytest.fixture
def beginning(monkeypatch, tmp_path):
    """begin(base, changes, by text): all that comes before training; an alarm ends a case that hangs."""
    monkeypatch.setattr(inprocess, "train", _begin)
    monkeypatch.setattr(inprocess, "train_together", _begin_together)
    monkeypatch.setattr(inprocess, "log", lambda _: None)
    monkeypatch.chdir(tmp_path)  # names such as "x" are looked up here
    bases = {name: base(name) for name in BASES}

    def begin(name, changes, by_text):
        if by_text:
            config = options.parse(bases[name], [f"{key}={value}" for key, value in changes.items()])
        else:
            config = options.override(bases[name], changes)
        inprocess.run(config, tmp_path / "run")

    before = signal.signal(signal.SIGALRM, _hang)
    yield begin
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def fault(begin, name, changes, by_text):
    """What is wrong with how a case ends, "" where nothing is, and whether it was accepted."""
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        begin(name, changes, by_text)
    except Begins:
        return "", True
    except (ValueError, OSError) as error:
        text = str(error)
        named = any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text) for key in changes)
        return "" if named and not isinstance(error, UnicodeError) else f"no key in {text[:300]!r}", False
    except (Exception, Hangs) as error:
        return "".join(traceback.format_exception(error)[-4:])[-1000:], False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "it came back", False


@pytest.mark.parametrize(("seed", "count"), [(13, CASES // 8), pytest.param(12, CASES, marks=pytest.mark.slow)])
def test_a_wrong_option_is_one_message_with_its_key(beginning, seed, count):
    """One of several wrong ones is enough; nothing hangs, and no wrong value takes 2 GB."""
    before, faults, accepted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0
    for name, changes, by_text in cases(seed, count):
        wrong, begins = fault(beginning, name, changes, by_text)
        accepted += begins
        if wrong:
            faults.append(f"{name}, {'text' if by_text else 'values'} {changes!r:.200}: {wrong}")
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:20])
    assert 0.005 * count < accepted < 0.1 * count  # most values are wrong, and not everything is refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # kB


NAMED = [
    ("data.test", "tst", "data.test = 'tst'"),
    ("data.val", "train[80%:20%]", "data.val = 'train[80%:20%]'"),
    ("data.train", "trian", "data.train = 'trian'"),
    ("data.source", "digit", "data.source = 'digit'"),
    (
        "data.extra_eval",
        (("far", "digits", "tst"),),
        "data.extra_eval = [['far', 'digits', 'tst']]: digits has no split 'tst'",
    ),
    ("data.shots", 10**6, "data.shots = 1000000"),
    ("data.augment", [1, 2], "data.augment"),
    ("data.augment", 0x10, "data.augment"),
    ("data.augment", (("flip", {"q": 1}),), "data.augment = [['flip', {'q': 1}]]"),
    ("baseline", -1, "baseline"),
    ("total", (1e18, "examples"), "total = (1e+18, 'examples'): duration (1e+18, 'examples') is 6.25e+16 steps of 16"),
    ("total", (10**400, "steps"), "total = "),
    ("seeds", (10**400,), "seeds = "),
    ("model.image_size", 10**9, "model.image_size = 1000000000: expected an integer of at least 0 and at most 4096"),
    ("model.reinit", ("stage9",), "model.reinit = ['stage9']"),
    ("model.partial", ("stage9/.*",), "model.partial = ['stage9/.*']"),
    ("model.weights", "nowhere.pth", "model.weights = 'nowhere.pth'"),
    ("model.name", "resnet8_cifr", "model.name = 'resnet8_cifr'"),
    ("method.name", "ful", "method.name = 'ful'"),
    ("method.k", 2, "method.k = 2"),
    ("schedule.name", "cosin", "schedule.name = 'cosin'"),
    ("optimizer", "adamm", "optimizer = 'adamm'"),
    ("phases", ((("method.name", "ful"),),), "phases[0]: method.name = 'ful'"),
    ("phases", ((("lr", -1.0),),), "phases[0]: invalid options:\n  lr = -1.0"),
    ("terms", {"l2": {}}, "there is no term 'l2'"),
    ("resamples", 10**18, "resamples = 1000000000000000000: expected an integer of at least 1 and at most 1000000"),
    ("data.workers", 10**6, "data.workers = 1000000: expected"),
]


@pytest.mark.parametrize(("key", "value", "part"), NAMED)
def test_the_message_says_what_was_set_and_what_is_expected(beginning, key, value, part):
    with pytest.raises((ValueError, OSError)) as error:
        beginning("gradient", {key: value}, False)
    assert part in str(error.value)


def test_a_baseline_that_cannot_be_loaded_is_named(beginning, monkeypatch):
    changes = {"seeds": (), "baseline": (("model.weights", "builtin:x"), ("data.test", "tst"))}

    def train(config, folder, **_):
        if config.model.weights == "builtin:x":
            _begin(config, folder)
        return {"metrics": {"accuracy": {"value": 1.0}}}

    monkeypatch.setattr(inprocess, "train", train)
    with pytest.raises(ValueError, match=r"^baseline: data.test = 'tst': digits has no split 'tst'"):
        beginning("gradient", changes, False)
