"""What a training step costs, by what of the network trains: time, FLOPs, memory, and which part of the device it uses.

python benchmarks/step.py --models resnet50,vit_base_patch16_224 --batch_size 8
python benchmarks/step.py --device gpu --dtype bfloat16 --batch_size 256 --steps 20

The ways: the forward pass alone, the head, the last block, LoRA (ViTs), everything with frozen BatchNorm (ResNets), and
everything. Clipping and the logged gradient norm are on, as in training; the images are made on the device. Times are
medians over rounds in which the ways take turns, so that a noisy machine troubles them alike, with the lowest and the
highest; --rounds 0 compiles only, and allocates nothing. MFU is against the matmul measured on this machine.
"""

import itertools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tl_jax import audit, models, optim, roofline, sharding, steps, trees
from tl_jax.methods import finetune
from tl_jax.models import adapt

MODELS = flags.DEFINE_list("models", ["resnet50", "vit_base_patch16_224"], "Names from tl_jax.models.MODELS.")
WAYS = flags.DEFINE_list("ways", [], "Some of: forward, head, last block, lora, frozen norms, full; all if empty.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Examples per step, over all devices.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds; 0: compile only.")
STEPS = flags.DEFINE_integer("steps", 1, "Steps in a round, of which only the last is waited for; 20 suits a GPU.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
REMAT = flags.DEFINE_enum("remat", "", ["", "dots", "block"], "config.model.remat.")
ATTENTION = flags.DEFINE_enum("attention", "xla", ["xla", "cudnn"], "config.model.attention.")
FSDP = flags.DEFINE_integer("fsdp", 0, "config.fsdp.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu", "tpu"], "Where to run.")
OUT = flags.DEFINE_string("out", "workdirs/benchmarks/step", "The folder of the table's rows and its picture.")

METHODS = {
    "head": "linear_probe",
    "last block": "last_k",
    "lora": "linear_probe",
    "frozen norms": "full",
    "full": "full",
}
# images/s on one H100 in bfloat16: the figures to reach.
BARS = {
    ("resnet50", "full"): 5000, ("resnet50", "frozen norms"): 9700, ("resnet50", "forward"): 27700,
    ("vit_base_patch16_224", "full"): 4690, ("vit_base_patch16_224", "last block"): 11000,
    ("vit_base_patch16_224", "forward"): 13100,
}  # fmt: skip


def ways_of(name: str) -> list[str]:
    """The ways that a model has, of those that were asked for."""
    resnet, known = "resne" in name, ["forward", *METHODS]
    has = {"lora": not resnet, "frozen norms": resnet}
    return [way for way in known if has.get(way, True) and way in (WAYS.value or known)]


def make_way(name: str, way: str, parallel: sharding.Parallel):
    """The step of a way, and the shapes of what it is given: a state (or variables) and a batch."""
    card, key = models.get(name).card, jax.random.key(0)
    network = models.get(name).module(
        num_classes=card.num_classes, dtype=jnp.dtype(DTYPE.value), remat=REMAT.value, attention=ATTENTION.value
    )
    model = adapt.Adapted(network, (("lora", {"rank": 8}),) if way == "lora" else ())
    images = jax.ShapeDtypeStruct((BATCH_SIZE.value, card.input_size, card.input_size, 3), jnp.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((BATCH_SIZE.value,), jnp.int32)}
    variables = jax.eval_shape(network.init, key, jnp.zeros((1, *images.shape[1:])))
    added = jax.eval_shape(lambda variables: adapt.init(network, variables, model.additions, key), variables)
    variables = {**variables, "params": {**variables["params"], **added}}
    if way == "forward":
        evaluate = steps.make_eval_step(model, mean=card.mean, std=card.std)
        return (lambda variables, batch: evaluate(variables, batch["image"])), variables, batch
    paths = list(trees.flatten(variables["params"]))
    rules = finetune.beside(paths) + finetune.make_rules(METHODS[way], paths, int(way == "last block"))
    labels = {path: match.value for path, match in trees.match_rules(paths, rules).items()}
    norms = [(".*", "frozen")] if way == "frozen norms" else ()
    policies = audit.norm_policies(variables.get("batch_stats", {}), labels, norms)
    model = model.clone(frozen_norms=tuple(path for path, policy in policies.items() if policy == trees.FROZEN))
    groups = optim.make_groups(labels, optim.Group("adamw"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(1e-3), clip=1.0)
    method = finetune.make_method(rules, num_classes=card.num_classes)
    step = steps.make_train_step(model, method, tx, labels, mean=card.mean, std=card.std, whole=parallel.whole)
    return step, jax.eval_shape(lambda v: steps.init_state(v, tx, labels, 0, ema=False), variables), batch


def compile_way(name: str, way: str, parallel: sharding.Parallel):
    """The compiled step, what it costs, and the shapes of its arguments with where they lie."""
    step, given, batch = make_way(name, way, parallel)
    cut = jax.tree.map(lambda _: jax.NamedSharding(parallel.mesh, jax.P(sharding.AXIS)), batch)
    given, batch = (
        jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places)
        for tree, places in ((given, parallel.shardings(given)), (batch, cut))
    )
    function = parallel.evaluate(step) if way == "forward" else parallel.train(step)
    options = sharding.OPTIONS.get(jax.devices()[0].platform)
    compiled = function.lower(given, batch).compile(compiler_options=options)
    return compiled, parallel.cost(compiled), given, batch


def make_values(shapes):
    """Small values on the devices; times depend on them only where they are not finite."""
    scale = {True: 0.02, False: 1}

    def value(shape):
        return jnp.full(shape.shape, scale[bool(jnp.issubdtype(shape.dtype, jnp.floating))], shape.dtype)

    places = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(lambda: jax.tree.map(value, shapes), out_shardings=places)()


def time_ways(compiled) -> dict[str, list[float]]:
    """Seconds of a step of each way; the arrays of only one way exist at a time."""
    seconds: dict[str, list[float]] = {way: [] for way in compiled}
    for round_ in range(ROUNDS.value + 1 if ROUNDS.value else 0):  # the first round warms up
        for way, (step, _, given, batch) in compiled.items():
            given, batch = jax.block_until_ready((make_values(given), make_values(batch)))
            began = time.perf_counter()
            for _ in range(STEPS.value):
                result = step(given, batch)
                given = given if way == "forward" else result
            jax.block_until_ready(result)
            if round_:
                seconds[way].append((time.perf_counter() - began) / STEPS.value)
            del given, batch, result
    return seconds


def measure(name: str, parallel: sharding.Parallel, peak: roofline.Peak | None) -> list[dict]:
    """The rows of one model."""
    compiled = {way: compile_way(name, way, parallel) for way in ways_of(name)}
    seconds, rows = time_ways(compiled), []
    for way, (step, cost, *_) in compiled.items():
        row = {"model": name, "way": way, **cost, "temp_bytes": step.memory_analysis().temp_size_in_bytes}
        if seconds[way]:
            median = statistics.median(seconds[way])
            times = max(seconds[way]), median, min(seconds[way])
            row |= {"images_per_second": [BATCH_SIZE.value / x for x in times]}
            row |= roofline.rates(1 / median, cost, peak, DTYPE.value, parallel.mesh.size)
            if "H100" in jax.devices()[0].device_kind and (name, way) in BARS:
                row |= {"bar": BARS[name, way], "of_bar": BATCH_SIZE.value / median / BARS[name, way]}
        rows.append(row)
    full = next((row for row in rows if row["way"] == "full"), None)
    for row in rows if full else ():
        row["flops_of_full"] = row["flops_per_step"] / full["flops_per_step"]
        row["temp_of_full"] = row["temp_bytes"] / full["temp_bytes"]
    return rows


def to_table(rows: list[dict]) -> str:
    lines = [
        f"{'trained':<13}{'GFLOP':>9}{'of full':>9}{'temp MB':>9}{'of full':>9}{'all MB':>8}{'images/s':>10}"
        f"{'lowest-highest':>18}{'MFU':>6}{'roofline':>10}{'bar':>8}{'of bar':>8}"
    ]
    for name, group in itertools.groupby(rows, lambda row: row["model"]):
        lines.append(name)
        for row in group:
            line = f"{row['way']:<13}{row['flops_per_step'] / 1e9:>9.1f}{row.get('flops_of_full', 0):>9.3f}"
            line += (
                f"{row['temp_bytes'] / 1e6:>9.0f}{row.get('temp_of_full', 0):>9.3f}{row['memory_bytes'] / 1e6:>8.0f}"
            )
            if "images_per_second" in row:
                low, median, high = row["images_per_second"]
                line += f"{median:>10.1f}{f'{low:.1f}-{high:.1f}':>18}{row['mfu']:>6.2f}{row['roofline']:>10.2f}"
            lines.append(line + (f"{row['bar']:>8}{row['of_bar']:>8.2f}" if "bar" in row else ""))
    return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """FLOPs, temporary memory and time of each way against full, model by model."""
    rows = [row for row in rows if "flops_of_full" in row]
    names = list(dict.fromkeys(row["model"] for row in rows)) or [""]
    figure, panels = plt.subplots(1, len(names), figsize=(1 + 4 * len(names), 3.5), squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names, strict=True):
        own = [row for row in rows if row["model"] == name]
        columns = {"FLOPs": [row["flops_of_full"] for row in own], "memory": [row["temp_of_full"] for row in own]}
        if own and "images_per_second" in own[-1]:
            columns["time"] = [own[-1]["images_per_second"][1] / row["images_per_second"][1] for row in own]
        for i, (label, values) in enumerate(columns.items()):
            panel.barh([j + 0.27 * (i - 1) for j in range(len(own))], values, 0.25, label=label)
        panel.set(title=name, xlabel="of full fine-tuning", yticks=range(len(own)))
        panel.set_yticklabels([row["way"] for row in own])
        panel.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(DEVICE.value, DEVICE.value))
    parallel = sharding.make_parallel(fsdp=FSDP.value)
    peak = roofline.measure(DTYPE.value, size=2048 if DEVICE.value == "cpu" else 16384) if ROUNDS.value else None
    rows = [row for name in MODELS.value for row in measure(name, parallel, peak)]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"batch {BATCH_SIZE.value}, {DTYPE.value}, remat {REMAT.value!r}, {device}, jax {jax.__version__}")
    if peak:
        print(f"measured: {peak.float32 / 1e9:,.0f} GFLOP/s in a {DTYPE.value} matmul, {peak.memory / 1e9:,.0f} GB/s")
    print(to_table(rows))
    folder = pathlib.Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"device": device, "batch_size": BATCH_SIZE.value, "dtype": DTYPE.value, "peak": peak and peak._asdict()}
    (folder / "step.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
    draw(rows, folder / "step.png")


if __name__ == "__main__":
    app.run(main)
