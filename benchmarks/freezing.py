"""What freezing saves: compiled FLOPs, temporary memory and time of a training step, against full fine-tuning.

python benchmarks/freezing.py --model vit_base_patch16_224 --batch_size 8

Gradient clipping and the logged gradient norm are on, as in training. Times are medians over rounds in which the ways
take turns, so that a noisy machine troubles them alike; --rounds 0 compiles only, and allocates nothing.
"""

import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tl_jax import audit, models, optim, steps, trees
from tl_jax.methods import finetune

MODEL = flags.DEFINE_string("model", "vit_base_patch16_224", "A name from tl_jax.models.MODELS.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Examples per step.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each way; 0: compile only.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
WAYS = {"full": ("full", 0), "last 4 blocks": ("last_k", 4), "last block": ("last_k", 1), "head": ("linear_probe", 0)}


def compile_step(method: str, last_k: int):
    """The compiled step and its abstract arguments."""
    card = models.get(MODEL.value).card
    model = models.get(MODEL.value).module(num_classes=card.num_classes, dtype=jnp.dtype(DTYPE.value))
    images = jax.ShapeDtypeStruct((BATCH_SIZE.value, card.input_size, card.input_size, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    rules = finetune.make_rules(method, list(trees.flatten(variables["params"])), last_k)
    labels = {path: match.value for path, match in trees.match_rules(trees.flatten(variables["params"]), rules).items()}
    policies = audit.norm_policies(variables.get("batch_stats", {}), labels, ())
    model = model.clone(frozen_norms=tuple(path for path, policy in policies.items() if policy == trees.FROZEN))
    groups = optim.make_groups(labels, optim.Group("adamw"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(1e-3), clip=1.0)
    state = jax.eval_shape(lambda v: steps.init_state(v, tx, labels, 0, ema=False), variables)
    loss = finetune.make_method(rules, num_classes=card.num_classes)
    step = steps.make_train_step(model, loss, tx, labels, mean=card.mean, std=card.std)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((BATCH_SIZE.value,), jnp.int32)}
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state, batch


def random_like(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """Small random values; times depend on them only where they are not finite."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.asarray(np.abs(rng.standard_normal(shape.shape)) * 0.02, shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    compiled = {way: compile_step(*options) for way, options in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in compiled}
    for round_ in range(ROUNDS.value + 1 if ROUNDS.value else 0):  # the first round warms up
        for way, (step, state, batch) in compiled.items():
            rng = np.random.default_rng(0)
            state, batch = jax.tree.map(lambda shape, rng=rng: random_like(shape, rng), (state, batch))
            jax.block_until_ready((state, batch))
            began = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            if round_:
                seconds[way].append(time.perf_counter() - began)
    device = jax.devices()[0].device_kind
    print(f"{MODEL.value}, batch {BATCH_SIZE.value}, {DTYPE.value}, {device}, jax {jax.__version__}")
    print(f"{'trained':<15}{'GFLOP':>9}{'of full':>9}{'temp MB':>9}{'of full':>9}{'images/s':>10}{'x full':>8}")
    cost = {way: step.cost_analysis()["flops"] for way, (step, *_) in compiled.items()}
    temp = {way: step.memory_analysis().temp_size_in_bytes for way, (step, *_) in compiled.items()}
    for way in compiled:
        line = f"{way:<15}{cost[way] / 1e9:>9.1f}{cost[way] / cost['full']:>9.3f}"
        line += f"{temp[way] / 1e6:>9.0f}{temp[way] / temp['full']:>9.3f}"
        if seconds[way]:
            median = {name: statistics.median(times) for name, times in seconds.items()}
            line += f"{BATCH_SIZE.value / median[way]:>10.1f}{median['full'] / median[way]:>8.2f}"
        print(line)


if __name__ == "__main__":
    app.run(main)
