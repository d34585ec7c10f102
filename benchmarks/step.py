"""What a training step costs, by what of the network trains: time, FLOPs, memory, and which part of the device it uses.

python benchmarks/step.py
python benchmarks/step.py --models vit_base_patch16_224 --batch_size 64 --compile_only
python benchmarks/step.py --device gpu --attention xla,cudnn

The ways: the forward pass alone, the head, the last block, LoRA (ViTs), everything with frozen BatchNorm (ResNets), and
everything, each as the trainer runs it: the frozen prefix keeps nothing for a backward pass, clipping and the logged
gradient norm are on. The images are made on the device. Times are medians over rounds in which the ways take turns, so
that a noisy machine troubles them alike, with the lowest and the highest. MFU is against the matmul measured on this
machine.
"""

import itertools
import json
import statistics
import sys
import time

import common
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from tl_jax import models
from tl_jax.core import messages, trees
from tl_jax.methods import rules as finetune
from tl_jax.models import peft
from tl_jax.models.attention import unfused
from tl_jax.models.head import reads
from tl_jax.runtime import roofline, sharding
from tl_jax.training import audit, optim, steps

MODELS = flags.DEFINE_list("models", ["resnet50", "vit_base_patch16_224"], "Names from tl_jax.models.MODELS.")
WAYS = flags.DEFINE_list("ways", [], "Some of: forward, head, last block, lora, frozen norms, full; all if empty.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Examples per step, over all devices; 0: 8 on a CPU, else 256.")
STEPS = flags.DEFINE_integer("steps", 0, "Steps of a round, the last of which is waited for; 0: 1 on a CPU, else 20.")
DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of activations; empty: bfloat16 but on a CPU.")
REMAT = flags.DEFINE_enum("remat", "", ["", "dots", "block"], "config.model.remat.")
ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "config.accumulate.")
ATTENTION = flags.DEFINE_list("attention", ["xla"], "config.model.attention; of several each is a way of a ViT.")
FSDP = flags.DEFINE_integer("fsdp", 0, "config.fsdp.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Time nothing, and allocate nothing.")

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


def on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def dtype() -> str:
    return DTYPE.value or ("float32" if on_cpu() else "bfloat16")


def batch_size() -> int:
    return BATCH_SIZE.value or (8 if on_cpu() else 256)


def no_cudnn() -> str:
    """Why cuDNN cannot compute the attention here; "" where it can."""
    return unfused(jnp.dtype(dtype()), 64)


def ways_of(name: str) -> list[tuple[str, str]]:
    """The ways that a model has, of those that were asked for, each with who computes the attention."""
    resnet, known = "resne" in name, ["forward", *METHODS]
    has = {"lora": not resnet, "frozen norms": resnet}
    ways = [way for way in known if has.get(way, True) and way in (WAYS.value or known)]
    attentions = ["xla"] if resnet or no_cudnn() else ATTENTION.value
    return [(way, attention) for way in ways for attention in attentions]


def make_way(name: str, way: str, attention: str, parallel: sharding.Parallel):
    """The step of a way, and the shapes of what it is given: a state (or variables) and a batch."""
    card, key = models.get(name).card, jax.random.key(0)
    network = models.get(name).module(
        num_classes=card.num_classes, dtype=jnp.dtype(dtype()), remat=REMAT.value, attention=attention
    )
    model = peft.Adapted(network, (("lora", {"rank": 8}),) if way == "lora" else ())
    images = jax.ShapeDtypeStruct((batch_size(), card.input_size, card.input_size, 3), jnp.uint8)
    batch = {"train": {"image": images, "label": jax.ShapeDtypeStruct((batch_size(),), jnp.int32)}}
    variables = jax.eval_shape(network.init, key, jnp.zeros((1, *images.shape[1:])))
    added = jax.eval_shape(lambda variables: peft.init(network, variables, model.additions, key), variables)
    variables = {**variables, "params": {**variables["params"], **added}}
    if way == "forward":
        plan = common.make_plan(model, card, {}, {})
        evaluate = steps.make_eval_step(plan.readers["model"], plan.task)
        return (lambda variables, batch: evaluate(variables, batch["train"]["image"])), variables, batch
    paths = list(trees.flatten(variables["params"]))
    rules = finetune.auxiliary(paths, {}) + finetune.make_rules(
        METHODS[way], paths, model.cuts, int(way == "last block")
    )
    labels = {path: match.value for path, match in trees.match_rules(paths, rules).items()}
    norms = [(".*", "frozen")] if way == "frozen norms" else ()
    policies = audit.norm_policies(variables.get("batch_stats", {}), labels, norms)
    groups = optim.make_groups(labels, optim.Group("adamw"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(1e-3), clip=1.0)
    trained = [path for path, value in {**labels, **policies}.items() if value != trees.FROZEN]
    length = min(finetune.frozen_cuts(trained, model.cuts), model.cuts.index(reads(network)) + 1)
    plan = common.make_plan(model, card, labels, policies)._replace(accumulate=ACCUMULATE.value, whole=parallel.whole)
    if length:
        module = plan.readers["model"].module
        plan = plan._replace(prefix=steps.Prefix(module.clone(remat=""), model.cuts[length - 1]))
    state = jax.eval_shape(lambda v: steps.init_state(plan, tx, v, {}, 0), variables)
    return steps.make_train_step(plan, tx), state, batch


def compile_way(name: str, way: str, attention: str, parallel: sharding.Parallel):
    """The compiled step, what it costs, and the shapes of its arguments with where they lie."""
    step, given, batch = make_way(name, way, attention, parallel)
    cut = jax.tree.map(lambda _: jax.NamedSharding(parallel.mesh, jax.P(sharding.AXIS)), batch)
    given, batch = (
        jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places)
        for tree, places in ((given, parallel.shardings(given)), (batch, cut))
    )
    traced = (parallel.evaluate(step) if way == "forward" else parallel.train(step)).trace(given, batch)
    compiled = traced.lower().compile(compiler_options=sharding.OPTIONS.get(jax.devices()[0].platform))
    return compiled, parallel.cost(compiled, traced.jaxpr), given, batch


def make_values(shapes):
    """Small values on the devices; times depend on them only where they are not finite."""
    scale = {True: 0.02, False: 1}

    def value(shape):
        return jnp.full(shape.shape, scale[bool(jnp.issubdtype(shape.dtype, jnp.floating))], shape.dtype)

    places = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(lambda: jax.tree.map(value, shapes), out_shardings=places)()


def seconds_of(step, given, batch, count: int, forward: bool) -> float:
    """Seconds of a step, of `count` in a row; its arrays exist only here."""
    given, batch = jax.block_until_ready((make_values(given), make_values(batch)))
    began = time.perf_counter()
    for _ in range(count):
        result = step(given, batch)
        given = given if forward else result
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / count


def device_peak() -> int:
    """The most bytes that arrays have taken on the first device so far; 0 where it does not say, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def time_ways(compiled: dict) -> tuple[dict, dict]:
    """Seconds of a step of each way, round by round, and the peak of the device's memory where a way set a new one."""
    count, peaks = STEPS.value or (1 if on_cpu() else 20), {}
    for key in sorted(compiled, key=lambda key: compiled[key][1]["memory_bytes"] or 0):  # this round warms up
        step, _, given, batch = compiled[key]
        before = device_peak()
        seconds_of(step, given, batch, count, key[0] == "forward")
        peaks[key] = device_peak() if device_peak() > before else None
    seconds: dict = {key: [] for key in compiled}
    for _ in range(common.ROUNDS.value):
        for key, (step, _, given, batch) in compiled.items():
            seconds[key].append(seconds_of(step, given, batch, count, key[0] == "forward"))
    return seconds, peaks


def measure(name: str, parallel: sharding.Parallel) -> list[dict]:
    """The rows of one model."""
    compiled = {key: compile_way(name, *key, parallel) for key in ways_of(name)}
    seconds, peaks = ({}, {}) if COMPILE_ONLY.value else time_ways(compiled)
    rows = []
    for (way, attention), (step, cost, *_) in compiled.items():
        row = {"model": name, "way": way, "attention": attention, "batch_size": batch_size(), **cost}
        memory = step.memory_analysis()
        row |= {"temp_bytes": memory.temp_size_in_bytes, "state_bytes": memory.argument_size_in_bytes}
        if times := seconds.get((way, attention)):
            slow, median, fast = max(times), statistics.median(times), min(times)
            row |= {"seconds": median, "images_per_second": [batch_size() / x for x in (slow, median, fast)]}
            row["device_peak_bytes"] = peaks[way, attention]
            if "H100" in jax.devices()[0].device_kind and (name, way) in BARS:
                row |= {"bar": BARS[name, way], "of_bar": batch_size() / median / BARS[name, way]}
        rows.append(row)
    full = next((row for row in rows if row["way"] == "full"), None)
    for row in rows if full else ():
        row["flops_of_full"] = row["flops_per_step"] / full["flops_per_step"]
        row["temp_of_full"] = row["temp_bytes"] / full["temp_bytes"]
    return rows


COLUMNS = {  # heading: (key, divisor, decimals)
    "GFLOP": ("flops_per_step", 1e9, 1), "of full": ("flops_of_full", 1, 3), "temp MB": ("temp_bytes", 1e6, 0),
    "of full ": ("temp_of_full", 1, 3), "all MB": ("memory_bytes", 1e6, 0), "peak MB": ("device_peak_bytes", 1e6, 0),
    "images/s": ("images_per_second", 1, 1), "lowest-highest": ("images_per_second", 1, 1), "MFU": ("mfu", 1, 2),
    "roofline": ("roofline", 1, 2), "bar": ("bar", 1, 0), "of bar": ("of_bar", 1, 2),
}  # fmt: skip


def labels_of(rows: list[dict]) -> list[str]:
    """The way of each row, with its attention where there are several."""
    several = len({row["attention"] for row in rows}) > 1
    return [f"{row['way']} {row['attention']}" if several else row["way"] for row in rows]


def to_table(rows: list[dict]) -> str:
    """The columns that some row has."""

    def cell(row, heading):
        key, divisor, decimals = COLUMNS[heading]
        value = row.get(key)
        if value is None:
            return "-"
        if key == "images_per_second":
            low, value, high = value
            if heading != "images/s":
                return f"{low:.{decimals}f}-{high:.{decimals}f}"
        return f"{value / divisor:.{decimals}f}"

    heads = [heading for heading, (key, *_) in COLUMNS.items() if any(row.get(key) is not None for row in rows)]
    body = [[label, *(cell(row, h) for h in heads)] for label, row in zip(labels_of(rows), rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(["trained", *heads], *body, strict=True)]

    def line(cells):
        return f"{cells[0]:<{widths[0]}}" + "".join(f"  {x:>{w}}" for x, w in zip(cells[1:], widths[1:], strict=True))

    lines = [line(["trained", *(heading.strip() for heading in heads)])]
    for name, group in itertools.groupby(zip(rows, body, strict=True), lambda pair: pair[0]["model"]):
        lines += [name, *(line(cells) for _, cells in group)]
    return "\n".join(lines)


def draw(rows: list[dict], path) -> None:
    """FLOPs, temporary memory and time of each way against full, model by model."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "flops_of_full" in row]
    names = list(dict.fromkeys(row["model"] for row in rows))
    if not names:
        return
    figure = Figure(figsize=(1 + 4.5 * len(names), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        own = [row for row in rows if row["model"] == name]
        full = next(row for row in own if row["way"] == "full")
        columns = {"FLOPs": [row["flops_of_full"] for row in own], "memory": [row["temp_of_full"] for row in own]}
        if "seconds" in full:
            columns["time"] = [row["seconds"] / full["seconds"] for row in own]
        for i, (label, values) in enumerate(columns.items()):
            bars = panel.barh([j + 0.27 * (i - 1) for j in range(len(own))], values, 0.25, label=label)
            panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        panel.set_yticks(range(len(own)), labels_of(own))
        panel.invert_yaxis()
        panel.set(title=name, xlabel="of full fine-tuning", xlim=(0, 1.15 * max(map(max, columns.values()))))
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def check() -> None:
    """Ends with one message where a flag is invalid; says where cuDNN's attention is not used."""
    known = {"models": models.MODELS, "ways": ["forward", *METHODS], "attention": ["xla", "cudnn"]}
    given = {"models": MODELS.value, "ways": WAYS.value, "attention": ATTENTION.value}
    wrong = [(flag, value) for flag, values in given.items() for value in values if value not in known[flag]]
    if wrong:
        sys.exit(
            f"error: unknown {', '.join(f'--{flag} {x!r}{messages.nearest(x, known[flag])}' for flag, x in wrong)}"
        )
    try:
        sharding.check_batch_size(batch_size(), ACCUMULATE.value, jax.device_count())
    except ValueError as error:
        sys.exit(f"error: {error}")
    if "cudnn" in ATTENTION.value and no_cudnn():
        print(f"attention cudnn is left out: XLA would compute it in its place, as {no_cudnn()}", flush=True)


def main(argv: list[str]) -> None:
    del argv
    folder = common.start("step")
    check()
    parallel = sharding.make_parallel(fsdp=FSDP.value)
    rows = [row for name in MODELS.value for row in measure(name, parallel)]
    peak = None if COMPILE_ONLY.value else common.measure_peak(dtype(), 2048 if on_cpu() else 16384)
    for row in rows if peak else ():
        row |= roofline.rates(1 / row["seconds"], row, peak, dtype(), jax.device_count())
        row["roofline"] = None if on_cpu() else row["roofline"]  # the bytes are of its caches more than of its memory
    facts = {"machine": common.machine(), "command": " ".join(["python", *sys.argv]), "dtype": dtype()}
    facts |= {"batch_size": batch_size(), "remat": REMAT.value, "accumulate": ACCUMULATE.value, "fsdp": FSDP.value}
    facts |= {"peak": peak and peak._asdict()}
    lines = [
        facts["machine"],
        ", ".join(f"{key} {facts[key]!r}" for key in ("dtype", "batch_size", "remat", "accumulate")),
    ]
    if peak:
        lines.append(f"a matmul reaches {peak.float32 / 1e9:,.0f} GFLOP/s here, a copy {peak.memory / 1e9:,.0f} GB/s")
    text = "\n".join([*lines, "", to_table(rows), ""])
    print(text, flush=True)
    (folder / "table.txt").write_text(f"{text}\n{facts['command']}\n")
    (folder / "rows.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    draw(rows, folder / "step.png")


if __name__ == "__main__":
    app.run(main)
