"""Every method between domains is bit-equal after SIGKILL."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import nth_call
import pytest
from domain_cases import CASES, check_ledger, config_of, make_tables, of_which_ci_runs, one_device

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.methods import domain
from tl_jax.studies import leak
from tl_jax.training.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
# After so many steps, before the evaluation that may follow; or behind a call of that number of a function.
CHOICES = ("tl_jax.training.candidates:choose", 1)
MOMENTS = dict.fromkeys(CASES, (1, 5, 8, CHOICES))
MOMENTS["several"] = (1, ("tl_jax.training.candidates:write", 3), 7, CHOICES)
MOMENTS["adda"] = MOMENTS["adabn"] = (1, 4, ("tl_jax.training.single:Single.enter", 1), 7, CHOICES)
MOMENTS["shot"] = (1, 5, ("tl_jax.training.single:Single.refresh", 1), 7, CHOICES)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("domains"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    one_device(monkeypatch)


def test_the_cases_hold_every_term_between_domains():
    named = {name for case in CASES.values() for name in case.get("terms", {})}
    named |= {
        name for case in CASES.values() for phase in case.get("phases", ()) for name in dict(phase).get("terms", {})
    }
    assert named - {"task"} == set(domain.TERMS)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def start(config, folder, moment):
    """One start of a run, which is killed at its moment, if it has one."""
    if isinstance(moment, list | tuple):
        nth_call.behind(*moment, die)
    train(config, folder, verbose=False, stop_requested=lambda done: done == moment and die())


def starts(plan):
    """Runs each start in a child process, forked before jax has started; prints the signals that ended them."""
    table, ended = json.loads(pathlib.Path(plan).read_text()), []
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", table["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for folder, moment in table["starts"]:
        if not (child := os.fork()):
            start(options.from_flat(table["config"]), pathlib.Path(folder), moment)
            os._exit(0)
        ended.append(os.waitpid(child, 0)[1])
    print(json.dumps(ended))


def run_starts(config, listing, folder):
    """The status of each start."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {"config": options.flatten(config), "starts": listing, "cache": str(folder / "cache")}
    (folder / "plan.json").write_text(json.dumps(table))
    program = "import sys; sys.path[:0] = ['tests', '.']; from test_domain_kills import starts; starts(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "plan.json")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def remains(folder):
    """All that a run decided and scored."""
    table = leak.decided(folder)
    names = ("result.json", *(path.name for path in folder.glob("predictions*.npz")))
    return table | {name: files.sha256(folder / name) for name in names}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", of_which_ci_runs(CASES, ("adda", "shot")))
def test_a_run_that_was_killed_again_and_again_ends_bit_equal_to_an_undisturbed_one(case, tables, tmp_path):
    config, moments = config_of(tables, case), MOMENTS[case]
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    status = run_starts(config, [[whole, None], *([killed, m] for m in moments), [killed, None]], tmp_path / "k")
    assert status == [0, *[signal.SIGKILL] * len(moments), 0]
    one, other = remains(tmp_path / "whole"), remains(tmp_path / "killed")
    assert {"metrics.jsonl", "choices.json", "trained.safetensors", "candidates/step_000006.npz"} <= set(one)
    assert {name for name in {*one, *other} if one.get(name) != other.get(name)} == set()
    check_ledger(tmp_path / "whole", 1)
    check_ledger(tmp_path / "killed", len(moments) + 1)
