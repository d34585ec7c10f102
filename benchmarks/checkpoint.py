"""What a checkpoint costs: how long it holds up training, how long until it is on disk, and what the steps notice.

python benchmarks/checkpoint.py --model vit_base_patch16_224 --steps 40

The state is that of full fine-tuning with adamw: about 1 GB for ViT-B/16. In turns: the same bytes written and fsynced
by plain Python, without a hash; `Checkpoints.save` until it returns, and until it is committed;
`Checkpoints.restore`; and orbax's own StandardSave, of which the leaf hashes are taken before as one must to verify.
All of them delete what they wrote. Then training steps without and with a save in flight, in turns too.

With --train head the rest is frozen, and what it costs to save all of it is compared with leaving it out.
"""

import os
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

MODEL = flags.DEFINE_string("model", "vit_base_patch16_224", "A name from tl_jax.models.MODELS.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Examples per step.")
TRAIN = flags.DEFINE_enum("train", "all", ["all", "head"], "What trains; the rest is left out of checkpoints.")
CLASSES = flags.DEFINE_integer("classes", 0, "Of the head; 0: the model's own.")
STEPS = flags.DEFINE_integer("steps", 40, "Steps timed without a save, and with one in flight; 0: none.")
DISK = flags.DEFINE_string("disk", "", "A folder on the disk to write to; empty: that of --out.")


def make_training():
    """A compiled full fine-tuning step, its state and a batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from tl_jax import models
    from tl_jax.core import trees
    from tl_jax.models import peft
    from tl_jax.runtime import sharding
    from tl_jax.runtime.compile_cache import keep_compiled_programs
    from tl_jax.training import audit, optim, steps

    keep_compiled_programs()
    card = models.get(MODEL.value).card
    card = card.replace(num_classes=CLASSES.value or card.num_classes)
    model = models.get(MODEL.value).module(num_classes=card.num_classes)
    size = (BATCH_SIZE.value, card.input_size, card.input_size, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(size))
    labels = {
        path: "all" if TRAIN.value == "all" or path.startswith("head/") else trees.FROZEN
        for path in trees.flatten(variables["params"])
    }
    policies = audit.norm_policies(variables.get("batch_stats", {}), labels, ())
    plan = common.make_plan(peft.Adapted(model), card, labels, policies)
    groups = optim.make_groups(labels, optim.Group("adamw"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(1e-5), clip=1.0)
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    state = parallel.place(jax.jit(lambda v: steps.init_state(plan, tx, v, {}, 0))(variables))
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    batch = parallel.put_batch({"train": {"image": images, "label": np.zeros(size[0], np.int32)}})
    step, _ = parallel.compile(steps.make_train_step(plan, tx), state, batch)
    state = step(state, batch)  # a new optimizer is zeros, which are no fair load for a disk
    frozen = {f"params/{path}": leaf for path, leaf in trees.split(variables["params"], labels)[1].items()}
    return step, jax.block_until_ready(state), batch, trees.leaf_hashes(frozen)


def plain(folder: pathlib.Path, arrays: list[np.ndarray]) -> None:
    """Writes and fsyncs the bytes."""
    with open(folder / "plain", "wb", buffering=0) as file:
        for array in arrays:
            file.write(array)
        os.fsync(file.fileno())


def time_saves(folder: pathlib.Path, state) -> list[dict]:
    """Rows of seconds per GB: plain writing, our saves, orbax's own, reading back."""
    import jax
    import orbax.checkpoint as ocp

    from tl_jax.core import trees
    from tl_jax.runtime.checkpoint import Checkpoints

    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.tree.map(jax.numpy.copy, state))]
    gigabytes = sum(array.nbytes for array in arrays) / 1e9
    names = ("plain write and fsync", "save: until it returns", "save: until committed", "restore and verify",
             "orbax StandardSave: until it returns", "orbax StandardSave: until committed")  # fmt: skip
    seconds = {name: [] for name in names}
    for round_ in range(common.ROUNDS.value + 1):  # the first warms up
        times = [time.perf_counter()]
        plain(folder, arrays)
        times.append(time.perf_counter())
        took = [times[1] - times[0]]
        (folder / "plain").unlink()
        with Checkpoints(folder / "ours") as checkpoints:
            checkpoints.prepare(state)
            checkpoints.save(1, state, {})  # opens and creates what the first save of a run does
            checkpoints.wait()
            began = time.perf_counter()
            checkpoints.save(2, state, {})
            took.append(time.perf_counter() - began)
            checkpoints.wait()
            took.append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(2, state))
            took.append(time.perf_counter() - began)
        shutil.rmtree(folder / "ours")
        with ocp.CheckpointManager((folder / "orbax").absolute()) as manager:
            began = time.perf_counter()
            trees.leaf_hashes(state)
            manager.save(1, args=ocp.args.StandardSave(state))
            took.append(time.perf_counter() - began)
            manager.wait_until_finished()
            os.sync()  # orbax itself leaves its files to the system
            took.append(time.perf_counter() - began)
        shutil.rmtree(folder / "orbax")
        for name, value in zip(names, took, strict=True):
            if round_:
                seconds[name].append(value / gigabytes)
    print(f"{gigabytes:.3f} GB of state")
    rows = []
    for name, values in seconds.items():
        of_plain = common.ratios(values, seconds[names[0]])
        rows.append({"what": name, **common.summary(values), "x plain": of_plain["median"]})
    return rows


def time_parts(folder: pathlib.Path, state, frozen) -> list[dict]:
    """Rows of seconds of a checkpoint that holds all of a state, and of one that leaves out what is frozen."""
    from tl_jax.runtime.checkpoint import Checkpoints

    ways, parts = {"all of it": {}, "what trains": frozen}, ("save returns", "committed", "restored")
    seconds = {f"{way}: {part}": [] for way in ways for part in parts}
    sizes = {}
    for _ in range(common.ROUNDS.value):
        for way, left_out in ways.items():
            with Checkpoints(folder / "ours", left_out) as checkpoints:
                checkpoints.prepare(state)
                checkpoints.save(1, state, {})
                checkpoints.wait()
                times = [time.perf_counter()]
                checkpoints.save(2, state, {})
                times.append(time.perf_counter())
                checkpoints.wait()
                times.append(time.perf_counter())
                checkpoints.restore(2, state)
                took = [times[1] - times[0], times[2] - times[0], time.perf_counter() - times[2]]
            for part, value in zip(parts, took, strict=True):
                seconds[f"{way}: {part}"].append(value)
            files = [path for path in (folder / "ours" / "2").rglob("*") if path.is_file()]
            sizes[way] = sum(path.stat().st_size for path in files) / 1e6
            shutil.rmtree(folder / "ours")
    megabytes = {name: sizes[name.partition(":")[0]] for name in seconds}
    return [{"what": name, **common.summary(seconds[name]), "MB": megabytes[name]} for name in seconds]


def time_steps(folder: pathlib.Path, step, state, batch, frozen) -> list[dict]:
    """Rows of seconds per step, without a save and with one in flight."""
    import jax

    from tl_jax.runtime.checkpoint import Checkpoints

    seconds: dict[str, list[float]] = {"step": [], "step, save in flight": []}
    behind, number = [], 0
    with Checkpoints(folder / "ours", frozen) as checkpoints:
        checkpoints.prepare(state)
        while min(map(len, seconds.values())) < STEPS.value:
            for name, times in seconds.items():
                if name != "step":
                    number += 1
                    checkpoints.save(number, state, {})
                first = True
                # As many steps as the save lasts; without one, as many as the last one lasted.
                count = len(seconds["step, save in flight"]) - len(seconds["step"]) or 5
                while checkpoints._manager.is_saving_in_progress() if name != "step" else count > 0:
                    began = time.perf_counter()
                    state = jax.block_until_ready(step(state, batch))
                    took = time.perf_counter() - began
                    times.append(took)
                    count -= 1
                    if first and name != "step":
                        behind.append(took)
                    first = False
    p99 = {name: float(np.percentile(times, 99)) for name, times in seconds.items()}
    rows = [
        {"what": name, **common.summary(times), "p99": p99[name], "p99 x": p99[name] / p99["step"], "steps": len(times)}
        for name, times in seconds.items()
    ]
    return [*rows, {"what": "  of these, the first behind a save", **common.summary(behind), "steps": len(behind)}]


def main(argv: list[str]) -> None:
    del argv
    out = common.start("checkpoint")
    step, state, batch, frozen = make_training()
    with tempfile.TemporaryDirectory(dir=DISK.value or out) as name:
        folder = pathlib.Path(name)
        if frozen:
            title = f"{MODEL.value}, the head trains by adamw: seconds per checkpoint"
            common.report(out, time_parts(folder, state, frozen), title, ("what", "median", "seconds"))
        else:
            title = f"{MODEL.value}, adamw: seconds per GB"
            common.report(out, time_saves(folder, state), title, ("what", "median", "seconds per GB"))
        if STEPS.value:
            rows = time_steps(folder, step, state, batch, frozen)
            common.report(out / "steps", rows, f"{MODEL.value}, batch {BATCH_SIZE.value}: seconds per step")


if __name__ == "__main__":
    app.run(main)
