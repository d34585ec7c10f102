"""Durations, schedules and groups, against PyTorch, closed forms and hand-computed steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax import optim
from tl_jax.optim import Group

IN_STEPS = {"batch_size": 32, "train_size": 100}


def test_durations_round_up_to_whole_steps():
    convert = lambda *duration: optim.to_steps(duration, **IN_STEPS)  # noqa: E731
    assert convert(7, "steps") == 7
    assert convert(96, "examples") == 3 and convert(97, "examples") == 4
    assert convert(8, "epochs") == 25 and convert(0.5, "epochs") == 2 and convert(0, "epochs") == 0


def test_a_duration_with_an_unknown_unit_names_the_known_ones():
    with pytest.raises(ValueError, match="steps, examples, epochs"):
        optim.to_steps((3, "hours"), **IN_STEPS)


def test_schedules_equal_their_formulas():
    steps = np.arange(100)
    k = np.maximum(steps - 10, 0)
    expected = {
        "constant": np.full(100, 0.4),
        "cosine": 0.4 * 0.5 * (1 + np.cos(np.pi * k / 90)),
        "linear": 0.4 * (1 - k / 90),
        "step": 0.4 * 0.1 ** ((k >= 30).astype(int) + (k >= 60)),
        "inverse_sqrt": 0.4 / np.sqrt(k + 1),
    }
    for name, after in expected.items():
        schedule = optim.make_schedule(name, 0.4, total_steps=100, warmup_steps=10)
        want = np.where(steps < 10, 0.4 * (steps + 1) / 11, after)
        np.testing.assert_allclose([schedule(s) for s in steps], want, rtol=2e-6, atol=1e-8, err_msg=name)


def test_cosine_without_warmup_equals_pytorch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    schedule = optim.make_schedule("cosine", 0.3, total_steps=50, args={"final": 0.1})
    for step in range(50):
        assert float(schedule(step)) == pytest.approx(reference.get_last_lr()[0], rel=1e-5)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "cosine", "args": {"finl": 1}}, "'finl' .did you mean 'final'"),
        ({"name": "constant", "warmup_steps": 10}, "does not fit into 10 steps"),
    ],
)
def test_schedule_errors_teach(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.make_schedule(**{"peak": 1.0, "total_steps": 10, **kwargs})


PARAMS = {"a/kernel": jnp.asarray([1.0, -2.0]), "a/bias": jnp.asarray([0.5]), "b/kernel": jnp.asarray([3.0])}
GRADS = {"a/kernel": jnp.asarray([0.3, 0.1]), "a/bias": jnp.asarray([-0.2]), "b/kernel": jnp.asarray([0.7])}
LABELS = {"a/kernel": "slow", "a/bias": "slow", "b/kernel": "fast", "c/kernel": "frozen"}


def run(default, overrides, steps=5, clip=0.0):
    tx = optim.make_optimizer(LABELS, optim.make_groups(LABELS, default, overrides), lambda k: 0.1 + 0.0 * k, clip)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "args", "torch_args", "wd"),
    [
        ("sgd", (("momentum", 0.9),), {"momentum": 0.9}, 0.05),
        ("sgd", (("momentum", 0.9), ("nesterov", True)), {"momentum": 0.9, "nesterov": True}, 0.0),
        ("adamw", (), {}, 0.05),
        ("adam", (), {}, 0.05),
    ],
)
def test_groups_train_as_pytorch_parameter_groups(name, args, torch_args, wd):
    torch = pytest.importorskip("torch")
    leaves = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in PARAMS.items()}

    def group(path, lr):
        return {"params": [leaves[path]], "lr": lr, "weight_decay": wd if path.endswith("kernel") else 0.0}

    reference = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
        [group("a/kernel", 0.1), group("a/bias", 0.1), group("b/kernel", 1.0)], lr=0.1, **torch_args
    )
    for _ in range(5):
        for path, leaf in leaves.items():
            leaf.grad = torch.tensor(np.asarray(GRADS[path]))
        reference.step()
    params, _ = run(Group(name, args, weight_decay=wd), {"fast": {"lr_mult": 10.0}})
    for path, leaf in leaves.items():
        # optax computes Adam's bias correction 1 - 0.999^t in float32, PyTorch in float64: 2e-5 apart.
        np.testing.assert_allclose(params[path], leaf.detach().numpy(), rtol=3e-5, err_msg=path)


def test_a_group_may_have_an_optimizer_of_its_own():
    params, _ = run(Group("adamw"), {"fast": {"optimizer": "sgd", "args": {"momentum": 0.5}}}, steps=3)
    np.testing.assert_allclose(params["b/kernel"], 3.0 - 0.1 * 0.7 * (1 + 1.5 + 1.75), rtol=1e-6)
    np.testing.assert_array_equal(params["a/kernel"], run(Group("adamw"), {}, steps=3)[0]["a/kernel"])


def test_one_global_clip_stands_before_all_groups():
    params, _ = run(Group("sgd"), {}, steps=1, clip=0.1)
    norm = math.sqrt(0.3**2 + 0.1**2 + 0.2**2 + 0.7**2)
    np.testing.assert_allclose(params["b/kernel"], 3.0 - 0.1 * 0.7 * 0.1 / norm, rtol=1e-6)


def test_lamb_and_lion_take_decay_for_kernels_only():
    for name in ("lamb", "lion"):
        with_decay, without = (run(Group(name, weight_decay=wd), {})[0] for wd in (0.5, 0.0))
        np.testing.assert_array_equal(with_decay["a/bias"], without["a/bias"])
        assert not np.allclose(with_decay["a/kernel"], without["a/kernel"])


def test_no_optimizer_array_exists_for_frozen_leaves():
    _, state = run(Group("adamw"), {})
    paths = {
        key.key for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0] for key in keys if hasattr(key, "key")
    }
    assert {"a/kernel", "a/bias", "b/kernel"} <= paths and "c/kernel" not in paths


def test_group_errors_come_together():
    with pytest.raises(ValueError) as error:
        optim.make_groups(LABELS, Group(), {"fsat": {"lr_mult": 2}, "slow": {"wd": 1}, "frozen": {}, "fast": 3})
    for part in ("'fsat'", "did you mean 'fast'", "no field 'wd'", "'frozen' takes no settings", "are 3; expected"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group("adamm"), "no optimizer 'adamm'.*did you mean 'adamw?'"),
        (Group("sgd", (("momentun", 0.9),)), r"no argument 'momentun' \(did you mean 'momentum'\?\)"),
        (Group("sgd", (("momentum", "x"),)), "optax cannot run 'sgd'"),
        (Group("adafactor", (("weight_decay_rate", 0.1),)), "no argument 'weight_decay_rate'"),
        (Group("lbfgs"), "optax cannot run 'lbfgs'"),
        (Group(weight_decay=-0.1), "weight_decay=-0.1 is no number >= 0"),
        (Group(lr_mult="x"), "lr_mult='x' is no number >= 0"),
        (Group(decay="("), "not a regular expression"),
        (Group(weight_decay=0.1, decay="kernel"), "matches none of the paths in full, such as 'a/kernel'"),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        optim.make_groups(LABELS, group, {})


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        optim.make_groups({"a": "frozen"}, Group(), {})
