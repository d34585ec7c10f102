"""Terms of several domains in runs: they train, resume bit by bit, do not see the devices, and are refused in time."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.methods.term import Context
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import build, single, steps, terms
from tl_jax.training.settings import read
from tl_jax.training.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("digits", "digits:inverted", "digits:faded")
TARGET = {"target": {"source": SOURCES[2], "split": "train[:40%]", "batch_size": 16}}
GENERALISE = ("irm", "vrex", "groupdro", "coral_domains", "mmd_domains", "fishr")
SEVERAL = ("m3sda", "mdan", "darn")
STYLE = ("mixstyle", {"after": ("stem", "stage1"), "p": 0.7, "alpha": 0.5, "partner": "other_domain"})
# All terms of a kind in one program: the loss is their sum. The schedules change inside the run.
CASES = {
    "generalise": {
        "terms": {
            "irm": {"weight": ("step", {"first": 1.0, "value": 5.0, "at": 0.5})}, "vrex": {"weight": 0.5}, "fishr": {},
            "groupdro": {"eta": 0.3}, "coral_domains": {}, "mmd_domains": {"features": "pre_logits"},
        },
    },
    "several": {
        "data.source": SOURCES[:2], "streams": TARGET,
        "terms": {"m3sda": {}, "mdan": {"width": 16}, "darn": {"tau": 0.2}},
    },
    "mixed": {"method.mix_domains": 0.3, "method.add": (STYLE,)},
}  # fmt: skip


def make_config(**changes):
    return options.override(smoke.get_config(), {
        "data.source": SOURCES, "data.shots": 0, "data.train": "train[:10%]", "data.val": "train[95%:]",
        "data.test": "test[:5%]", "select": "last", "resamples": 10, "model.image_size": 16, "method.name": "full",
        "batch_size": 24, "total": (4.0, "steps"), "eval_every": (4.0, "steps"), "lr": 0.01,
        "data.allow_duplicates": True, **changes,
    })  # fmt: skip


def test_the_cases_hold_every_term():
    assert {*GENERALISE, *SEVERAL} == {*CASES["generalise"]["terms"], *CASES["several"]["terms"]} - {"task"}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case", ["generalise", *(pytest.param(c, marks=pytest.mark.slow) for c in ("several", "mixed"))]
)
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(case, tmp_path):
    """Memory is part of it: the weights of GroupDRO and the averages of Fishr and DARN decide the later steps."""
    config = make_config(**CASES[case])
    train(config, tmp_path / "whole", verbose=False)
    with pytest.raises(Preempted):
        train(config, tmp_path / "broken", verbose=False, stop_requested=lambda step: step == 2)
    train(config, tmp_path / "broken", verbose=False)
    for name in ("metrics.jsonl", "result.json", "trained.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = {key: value for line in lines for key, value in line.items()}
    named = [name for name, given in config.terms.items() if given.get("weight") != 0]
    assert all(np.isfinite(logged[next(key for key in logged if key.endswith(name))]) for name in named), logged


def stepped(config, devices, count=3):
    """The state after some steps on the first devices."""
    parallel = sharding.make_parallel("jit", jax.devices()[:devices])
    run = build.build(config, parallel)
    program, phase = single.Single(run, parallel), run.phases[0]
    state, step = program.initial(0), parallel.train(steps.make_train_step(phase.plan, phase.tx))
    for i in range(count):
        batch = {name: batches[i] for name, batches in run.material.streams.items()}
        state = jax.block_until_ready(step(state, parallel.put_batch(batch)))
    return jax.device_get(state)


def check_devices(case, devices):
    # Batch statistics divide by small variances, which makes rounding errors of gradients larger.
    config = make_config(**CASES[case], **{"optimizer": "sgd", "method.norm": ((".*", "frozen"),), "lr": 1e-3})
    one, many = (stepped(config, count) for count in (1, devices))
    assert trees.flatten(one.memory).keys() == trees.flatten(many.memory).keys()
    for tree in ("params", "memory", "sums"):
        for path, leaf in trees.flatten(getattr(one, tree)).items():
            other = trees.flatten(getattr(many, tree))[path]
            np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-5 * max(1e-3, np.abs(leaf).max()), err_msg=path)


@pytest.mark.slow
def test_devices_do_not_change_numbers():
    check_devices("generalise", 4)


def eight_devices():
    """Run in a process of its own, as the number of simulated devices is fixed when jax starts."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    for case in CASES:
        check_devices(case, 8)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_on_eight_devices_the_numbers_are_those_of_one():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = (
        "import sys; sys.path[:0] = ['tests', '.']; import test_domains_in_runs; test_domains_in_runs.eight_devices()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*GENERALISE, *SEVERAL])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "digits"}, "needs several labelled domains: data.source ="),
        ({"data.source": ("digits",)}, "needs several labelled domains: data.source ="),
        ({"accumulate": 2}, "needs the whole batch at once: accumulate = 1 and parallel = 'jit'"),
        ({"parallel": "pmap"}, "needs the whole batch at once: accumulate = 1 and parallel = 'jit'"),
    ],
)
def test_one_domain_and_pieces_of_a_batch_are_refused_before_anything_is_loaded(name, changes, message):
    config = make_config(**{"terms": {name: {}}, "streams": TARGET if name in SEVERAL else {}, **changes})
    with pytest.raises(ValueError, match=f"{name} {message}"):
        terms.make_terms(read(config))


def test_what_cannot_mix_domains_is_listed_at_once():
    changes = {
        "data.source": "digits",
        "accumulate": 2,
        "method.mix_domains": 0.2,
        "method.cutmix": 1.0,
        "batch_size": 16,
    }
    with pytest.raises(ValueError) as error:
        build.build(make_config(**changes), sharding.make_parallel())
    text = str(error.value)
    assert "method.mix_domains = 0.2 needs several domains, data.source = (SOURCE, SOURCE, ...)" in text
    assert "needs the whole batch at once: accumulate = 1, parallel = 'jit'" in text
    assert "takes the place of method.mixup and method.cutmix: expected 0" in text


def test_a_phase_that_mixes_domains_cannot_read_cached_outputs():
    changes = {"method.name": "linear_probe", "cache": "features", "method.mix_domains": 0.2}
    with pytest.raises(ValueError, match=r"phase 0 mixes inputs, {'mix_domains': 0.2}: cached outputs"):
        build.build(make_config(**changes), sharding.make_parallel())


def test_the_tasks_own_term_is_the_plain_mean_over_all_domains():
    """The mean of the risks of the domains, as a batch holds equal parts of all."""
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    run = build.build(make_config(), parallel)
    (_, term), task = run.phases[0].plan.method.terms["task"], run.task
    batch = run.material.streams["train"][0]
    assert sorted(np.bincount(batch["domain"])) == [8, 8, 8]
    logits = np.random.default_rng(0).standard_normal((24, 10)).astype(np.float32)
    encoded = {"train": task.encode(batch["label"])}
    context = Context(*[None] * len(Context._fields))._replace(
        batch={"train": batch}, outputs={"train": {"logits": logits}}, encoded=encoded, total={"train": 24.0}, task=task
    )
    losses = np.asarray(task.loss({"logits": logits}, encoded["train"]))
    risks = [losses[batch["domain"] == d].mean() for d in range(3)]
    np.testing.assert_allclose(term.loss(context).loss, np.mean(risks), rtol=1e-6)
