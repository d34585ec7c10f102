"""A run of several phases: what it equals, what each keeps frozen, and that a kill anywhere changes nothing."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import diabetes, methods, smoke
from tl_jax import config as options
from tl_jax.core import messages, trees
from tl_jax.methods.term import Method, make_task_term
from tl_jax.runtime import sharding
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import optim, steps
from tl_jax.training import train as trainer
from tl_jax.training.build import build
from tl_jax.training.loop import Loop
from tl_jax.training.single import Single, current_variables

LAST = {"method.name": "last_k", "method.k": 1, "groups": {"backbone": {"lr_mult": 0.1}}}
FULL = {"method.name": "full", "groups": {"backbone": {"lr_mult": 0.1}}}
TWO, THREE = (2.0, "steps"), (3.0, "steps")
PHASES = (tuple({"total": TWO}.items()), tuple({"total": TWO, "lr": 0.02, **LAST}.items()))


def make_config(**changes):
    return options.override(smoke.get_config(), {
        "model.image_size": 16, "model.head_init": "lecun", "data.train": "train[:5%]", "data.val": "train[97%:]",
        "data.test": "test[:8%]", "data.shots": 0, "batch_size": 8, "eval_batch_size": 64, "resamples": 10,
        "select": "last", "eval_every": (1.0, "epochs"), "log_every": (1.0, "steps"), "lr": 0.05, "optimizer": "sgd",
        "phases": PHASES, **changes,
    })  # fmt: skip


def with_everything(**changes):
    """With all that a state can hold: momentum, a moving average, random masks and mixing."""
    return make_config(**{
        "optimizer_args": {"momentum": 0.9}, "ema": 0.5, "model.dropout": 0.2, "method.mixup": 0.2, **changes,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    device = sharding.make_parallel("jit", jax.devices()[:1])  # less to compile
    monkeypatch.setattr(sharding, "make_parallel", lambda mode, fsdp=0: device)


def train(config, folder, **kwargs):
    return trainer.train(config, folder, verbose=False, **kwargs)


class Watched(Single):
    """A run that keeps its variables as each phase ends."""

    def __init__(self, run):
        super().__init__(run, sharding.make_parallel("jit"))
        self.seen = [jax.device_get(run.material.variables)]

    def enter(self, i, state):
        self.seen.append(jax.device_get(current_variables(state)))
        return super().enter(i, state)


def follow(run, folder):
    """Trains a run, of which nothing but checkpoints is written; its program and how it ended."""
    program = Watched(run)
    with Checkpoints(folder / "checkpoints", program.constant_hashes()) as checkpoints:
        ended = Loop(program, checkpoints, {}, sharding.make_parallel("jit"), False, lambda done: False).run()
    program.seen.append(jax.device_get(current_variables(ended.state)))
    return program, ended


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken") / "w"
    with pytest.MonkeyPatch.context() as patch:
        device = sharding.make_parallel("jit", jax.devices()[:1])
        patch.setattr(sharding, "make_parallel", lambda mode, fsdp=0: device)
        train(with_everything(), folder)
    return folder


def trained_in(phase):
    return {path for path, label in phase.plan.labels.items() if label != "frozen"}


def check_each_phase(run, states):
    """What a phase trains moves in it, whatever it freezes is bit-equal, and nothing else decides."""
    assert len(states) == len(run.phases) + 1
    for phase, before, after in zip(run.phases, states, states[1:], strict=False):
        hashes = trees.leaf_hashes(before)
        moved = {path for path, hash in trees.leaf_hashes(after).items() if hash != hashes[path]}
        updated = {f"batch_stats/{r['path']}" for r in phase.audit["statistics"] if r["policy"] == "update"}
        assert moved == {f"params/{path}" for path in trained_in(phase)} | updated


def test_each_phase_moves_what_it_trains_and_leaves_the_rest_bit_equal(unbroken, tmp_path):
    program, ended = follow(build(with_everything(), sharding.make_parallel("jit")), tmp_path)
    (run,) = program.runs
    check_each_phase(run, program.seen)
    with Checkpoints(unbroken / "checkpoints") as checkpoints:
        assert checkpoints.meta(4)["hashes"] == trees.leaf_hashes(ended.state)
    first, second = map(trained_in, run.phases)
    assert first == {"head/kernel", "head/bias"} < second and (run.total_steps, run.phases[1].start) == (4, 2)
    report = json.loads((unbroken / "audit.json").read_text())
    assert len(report["phases"]) == 2 and report["proof"]["bit_equal"]
    params = trees.flatten(run.material.variables["params"])
    assert report["totals"]["trainable"] == sum(np.size(params[path]) for path in second)
    frozen = set(report["proof"]["hashes"])
    assert "params/backbone/stem/conv/kernel" in frozen and not any("stage3" in path for path in frozen)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_trained_in_one_phase_may_be_frozen_in_the_next_and_train_again(tmp_path):
    """What is frozen keeps the values of training, not their average."""
    only_last = {"method.name": "rules", "method.rules": (("backbone/stage3/.*", "backbone"), (".*", "frozen"))}
    phases = tuple(tuple({"total": TWO, **phase}.items()) for phase in ({}, only_last, LAST))
    program, _ = follow(build(with_everything(phases=phases), sharding.make_parallel("jit")), tmp_path)
    check_each_phase(program.runs[0], program.seen)


def remains(folder):
    """Everything that a run leaves and its seed determines; the state after the last step by its hashes."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        last = checkpoints.meta(checkpoints.steps()[-1])
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    names = ("metrics.jsonl", "result.json", "audit.json", "config.json", "model.safetensors", "trained.safetensors")
    return {"step": last["step"], "state": last["hashes"], "predictions": arrays} | {
        name: (folder / name).read_bytes() for name in names
    }


@pytest.mark.parametrize(
    "stops", [(2,), *(pytest.param(s, marks=pytest.mark.slow) for s in [(1,), (3,), (1, 2, 3, 4)])]
)
def test_a_kill_inside_at_or_behind_a_boundary_changes_no_bit(unbroken, tmp_path, capsys, stops):
    for stop in stops:
        with pytest.raises(Preempted, match=f"stopped after step {stop} of 4"):
            train(with_everything(), tmp_path / "w", stop_requested=lambda step, stop=stop: step == stop)
        with Checkpoints(tmp_path / "w" / "checkpoints") as checkpoints:
            assert checkpoints.steps()[-1] == stop
    train(with_everything(), tmp_path / "w")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed after step")]
    assert said == [f"resumed after step {stop}" for stop in stops], "from where it was, not from further back"
    ours, reference = remains(tmp_path / "w"), remains(unbroken)
    assert ours["step"] == 4 and any("ema" in path for path in ours["state"])
    for name in reference:
        assert ours[name] == reference[name], name


class Later(NamedTuple):
    """The batches of a stream that follow the first `offset`."""

    batches: Any
    offset: int

    def iterate(self, start, stop, num_workers=0):
        return self.batches.iterate(start + self.offset, stop + self.offset, num_workers)


def rows_of(folder, offset=0):
    """The lines of training after the first `offset` steps, counted from there."""
    return after(offset, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def after(offset, rows):
    return [{**row, "step": row["step"] - offset} for row in rows if row["step"] > offset]


def predicted(program, ended, name):
    run = program.runs[0]
    return program.predict(len(run.phases) - 1, ended.state, run.material.eval_batches[name], [0])[0].values


@pytest.mark.slow
def test_lp_ft_is_the_two_runs_by_hand(tmp_path):
    """Without momentum nothing but the weights crosses the boundary: the second run goes on from the exported file.

    Each phase has its own schedule from its own start; cosine and warm-up would show a shift.
    """
    parallel, schedule = sharding.make_parallel("jit"), {"schedule.warmup": (1.0, "steps")}
    phases = (tuple({"total": TWO}.items()), tuple({"total": THREE, "lr": 0.02, **schedule, **FULL}.items()))
    together, whole = follow(build(make_config(phases=phases), parallel), tmp_path / "lp_ft")
    train(make_config(phases=(), total=TWO), tmp_path / "probe")
    first = tmp_path / "probe" / "model.safetensors"
    second = {"total": THREE, "lr": 0.02, **schedule, **FULL, "model.weights": str(first), "model.keep_head": True}
    run = build(make_config(phases=(), **second), parallel)
    streams = {name: Later(batches, 2) for name, batches in run.material.streams.items()}
    run = run._replace(material=run.material._replace(streams=streams))
    by_hand, half = follow(run, tmp_path / "full")
    ours, expected = (trees.leaf_hashes(current_variables(ended.state)) for ended in (whole, half))
    assert ours == expected != trees.leaf_hashes(run.material.variables)
    np.testing.assert_array_equal(predicted(together, whole, "test"), predicted(by_hand, half, "test"))
    (rows,), (later,) = whole.rows, half.rows
    assert [row for row in rows if row["step"] <= 2] == rows_of(tmp_path / "probe")
    assert after(2, rows) == later and len(later) > 3


@pytest.mark.parametrize(
    ("optimizer", "args"), [("adamw", {}), pytest.param("sgd", {"momentum": 0.9}, marks=pytest.mark.slow)]
)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_boundary_at_which_nothing_changes_changes_nothing(tmp_path, optimizer, args):
    """Optimizer values and their bias corrections, moving averages and random keys go on."""
    common = {"schedule.name": "constant", "lr": 0.01, "optimizer": optimizer, "optimizer_args": args}
    train(with_everything(phases=(), total=THREE, **common), tmp_path / "one")
    train(with_everything(phases=((("total", TWO),), (("total", (1.0, "steps")),)), **common), tmp_path / "two")
    one, two = (remains(tmp_path / name) for name in ("one", "two"))
    for name in ("predictions", "model.safetensors", "trained.safetensors"):
        assert one[name] == two[name], name
    assert rows_of(tmp_path / "one", 2) == rows_of(tmp_path / "two", 2)
    states = ({path: h for path, h in r["state"].items() if path.startswith(("params", "ema"))} for r in (one, two))
    assert messages.difference(*states) == []


def test_averages_go_on_where_a_leaf_goes_on_moving_and_begin_at_its_value_where_it_begins():
    first, second = {"a": "x", "b": "x", "c": "frozen"}, {"a": "x", "b": "frozen", "c": "x"}
    method = Method({"task": (lambda progress: 1.0, make_task_term())})
    plans = [
        steps.Plan({}, method, None, labels, [norm], ema=0.5)
        for labels, norm in ((first, "right"), (second, "elsewhere"))
    ]
    txs = [optim.make_optimizer(labels, {"x": optim.Group("sgd")}, lambda k: 0.1) for labels in (first, second)]
    variables = {
        "params": {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)},
        "batch_stats": {"left": {"mean": jnp.zeros(2)}, "right": {"mean": jnp.zeros(2)}},
    }
    state = steps.init_state(plans[0], txs[0], variables, {}, 0)
    assert set(state.ema) == {"params/a", "params/b", "batch_stats/left/mean"}
    trained = jax.tree.map(lambda leaf: leaf + 1, variables)
    ema = {path: leaf + 10 for path, leaf in state.ema.items()}
    state = state._replace(ema=ema, params=trained["params"], batch_stats=trained["batch_stats"])
    after = steps.enter_phase(plans[1], txs[1], state, 1)
    values = {path: float(leaf[0]) for path, leaf in after.ema.items()}
    assert values == {"params/a": 11, "params/c": 2, "batch_stats/left/mean": 10, "batch_stats/right/mean": 1}
    evaluated = trees.flatten(steps.eval_variables(after))
    assert float(evaluated["params/b"][0]) == 2, "what is frozen has the value that training gave it"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_best_step_may_lie_in_an_earlier_phase(tmp_path):
    """The second phase ruins the network."""
    alone = train(with_everything(phases=(), total=TWO), tmp_path / "alone")
    ruin = tuple({"total": TWO, "lr": 1e4, "clip": 0.0, **LAST}.items())
    result = train(with_everything(select="best_val", phases=(PHASES[0], ruin)), tmp_path / "w")
    assert result["step"] == 2 and result["metrics"] == alone["metrics"]
    left, right = (np.load(tmp_path / name / "predictions.npz")["logits"] for name in ("alone", "w"))
    np.testing.assert_array_equal(left, right)


TERMS = ({}, {"l2_sp": {"alpha": 0.01, "beta": 0.01}}, {"task": {"weight": 0.5}, "l1": {"weight": 1e-3}}, {})


@pytest.mark.slow
def test_each_phase_logs_its_own_terms_and_a_stop_between_or_inside_changes_none(tmp_path):
    lengths = ((1.0, "steps"), TWO, (1.0, "steps"), (1.0, "steps"))
    phases = tuple((("total", total), ("terms", terms)) for total, terms in zip(lengths, TERMS, strict=True))
    config = options.override(diabetes.get_config(), {
        "phases": phases, "terms": {"l2_sp": {"alpha": 9.0}}, "log_every": TWO, "eval_every": (9.0, "steps"),
        "select": "last", "patience": 0, "resamples": 10, "optimizer": "sgd", "optimizer_args": {"momentum": 0.9},
    })  # fmt: skip
    train(config, tmp_path / "whole")
    for stop in (2, 3):  # while sums of a line are under way, and at a boundary
        with pytest.raises(Preempted):
            train(config, tmp_path / "w", stop_requested=lambda done, stop=stop: done == stop)
    train(config, tmp_path / "w")
    assert remains(tmp_path / "w") == remains(tmp_path / "whole")
    rows = [row for row in rows_of(tmp_path / "whole") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    usual = {"step", "train/loss", "train/mae", "train/lr", "train/grad_norm"}
    own = [set(), {"train/task", "train/l2_sp"}, {"train/task", "train/l2_sp"}, {"train/task", "train/l1"}, set()]
    assert [row.keys() - usual for row in rows] == own and all(usual <= row.keys() for row in rows)
    for row, (task, name, weight) in zip(rows[1:4], [(1, "l2_sp", 1)] * 2 + [(0.5, "l1", 1e-3)], strict=True):
        parts = task * row["train/task"] + weight * row[f"train/{name}"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-5) and row[f"train/{name}"] > 0


def test_phases_that_set_what_cannot_change_are_refused_before_training(tmp_path):
    phases = ((("total", TWO), ("batch_size", 16), ("model.dropout", 0.5)), (("lr", 0.1), ("method.add", ())))
    with pytest.raises(ValueError) as error:
        train(make_config(phases=phases), tmp_path / "w")
    for i, key in ((0, "batch_size"), (0, "model.dropout"), (1, "method.add")):
        assert (
            f"phases[{i}] sets {key}, which cannot change during a run; what can: terms, turns, method.name, "
            in str(error.value)
        )
    with pytest.raises(ValueError, match=r"'method\.nam' does not exist .did you mean 'method\.name'"):
        train(make_config(phases=((("method.nam", "full"),),)), tmp_path / "w")
    with pytest.raises(ValueError, match=r"layer_decay = 2\.0: expected a number"):
        train(make_config(phases=((("layer_decay", 2.0),),)), tmp_path / "w")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_gradual_unfreezing_goes_from_the_head_down():
    config = options.override(make_config(), methods.methods(8.0, "steps")["gradual"])
    built = build(config, sharding.make_parallel("jit"))
    order = ["head", "backbone/stage3/block0", "backbone/stage2/block0", "backbone/stage1/block0", "backbone/stem"]
    trained = []
    for phase in built.phases:
        paths = trained_in(phase)
        parts = {part for part in order for path in paths if path.startswith(f"{part}/")}
        assert paths == {path for path in phase.plan.labels for part in parts if path.startswith(f"{part}/")}, (
            "parts whole"
        )
        trained.append([part for part in order if part in parts])
    assert trained == [order[:1], order[:2], order[:3], order]
    assert [(phase.start, phase.stop) for phase in built.phases] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_a_resume_with_other_phases_is_refused_with_the_difference(tmp_path):
    with pytest.raises(Preempted):
        train(with_everything(), tmp_path / "w", stop_requested=lambda step: step == 1)
    second = dict(PHASES[1])
    for changes in ({**second, "lr": 0.5}, {**second, "total": THREE}, {**second, "method.k": 2}):
        other = with_everything(phases=(PHASES[0], tuple(changes.items())))
        with pytest.raises(ValueError, match=r"other options[\s\S]*phases: "):
            train(other, tmp_path / "w")
    shutil.copytree(tmp_path / "w", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the checkpoints are of another run[\s\S]*phases: ") as error:
        train(other, tmp_path / "bare")
    assert "labels (saved -> now)" in str(error.value) and "1: backbone/stage2/block0" in str(error.value)
