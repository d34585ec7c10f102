"""The same work of a network of text in tl_jax and in transformers/PyTorch: taking turns, each in a process of its own.

python benchmarks/text.py [--models minilm_l6] [--ways forward,head,full] [--batch_size 32] [--length 64]
python benchmarks/text.py --models gpt2 --attention eager

Both have the same weights, tokens, AdamW (fused), clip and frozen parts, in float32 on a CPU and bfloat16 on a GPU, and
drop nothing out. Ours is the step of the trainer, of a network with a new head on the pooled tokens. Texts have 1 to
--length tokens, padded to that; every place is counted, padding too. Before anything is timed, the losses of the first
step must be equal. Flags and memory are those of vs_torch.py.
"""

import functools
import json
import pathlib
from collections.abc import Callable

import common
import vs_torch
from absl import app, flags

LENGTH = flags.DEFINE_integer("length", 64, "Places of each text, the padding included.")
ATTENTION = flags.DEFINE_enum("attention", "sdpa", ["sdpa", "eager"], "How PyTorch's attention is computed.")
CLASSES = 2


def make_ours(name: str, way: str, folder: pathlib.Path) -> tuple[Callable[[], object], dict]:
    """A call that runs --steps steps, and the facts PyTorch's side needs or is held against; writes the weights."""
    import jax
    import numpy as np
    import optax

    from tl_jax.core import trees
    from tl_jax.methods import rules
    from tl_jax.runtime import sharding
    from tl_jax.training import optim, steps
    from tl_jax.weights import load

    loaded, parallel = load.load(name, "", CLASSES, head_init="lecun"), sharding.make_parallel()
    load.export(loaded.variables, name, folder / vs_torch.WEIGHTS_FILE, card=loaded.card)
    batch_size, rng = vs_torch.BATCH_SIZE.value, np.random.default_rng(0)
    text = np.zeros((batch_size, LENGTH.value, 2), np.int32)
    text[..., 0] = rng.integers(0, loaded.card.vocab, text.shape[:2])
    text[..., 0][np.arange(LENGTH.value) >= rng.integers(1, LENGTH.value + 1, (batch_size, 1))] = -1
    fields = {"text": text, "label": np.arange(batch_size, dtype=np.int32) % CLASSES}
    np.savez(folder / vs_torch.BATCH_FILE, **fields)
    model = loaded.model.clone(dtype="bfloat16" if common.DEVICE.value == "gpu" else "float32")
    paths, batch = list(trees.flatten(loaded.variables["params"])), parallel.put_batch({"train": fields})
    method = "full" if way == "full" else "linear_probe"
    found = trees.match_rules(paths, rules.make_rules(method, paths, model.cuts))
    labels = {path: match.value for path, match in found.items()}
    plan = common.make_plan(model, loaded.card, labels, {})
    facts = {"pooling": loaded.card.pooling}
    if way == "forward":
        variables, tokens = parallel.place(loaded.variables), batch["train"]["text"]
        traced = parallel.evaluate(steps.make_eval_step(plan.readers["model"], plan.task)).trace(variables, tokens)
        step = functools.partial(compiled(traced), variables, tokens)
        logits = np.asarray(step()["logits"], np.float64)
        loss = -(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(batch_size), fields["label"]].mean()
        flops = parallel.cost(step.func, traced.jaxpr)["flops_per_step"]

        def forward():
            return jax.block_until_ready([step() for _ in range(vs_torch.STEPS.value)][-1])

        return forward, {**facts, "loss": loss, "trained": 0, "flops": flops}
    if way == "head":
        plan = plan._replace(prefix=steps.Prefix(model, model.cuts[-1]))
    groups = optim.make_groups(labels, optim.Group("adamw"), {})
    tx = optim.make_optimizer(labels, groups, optax.constant_schedule(vs_torch.LR), clip=vs_torch.CLIP)
    state = parallel.place(steps.init_state(plan, tx, loaded.variables, {}, 0))
    traced = parallel.train(steps.make_train_step(plan, tx)).trace(state, batch)
    step, kept = compiled(traced), [state]
    kept[0] = step(kept[0], batch)
    loss = float(kept[0].sums["loss"]) / batch_size

    def call():
        for _ in range(vs_torch.STEPS.value):
            kept[0] = step(kept[0], batch)
        return jax.block_until_ready(kept[0])

    leaves = trees.flatten(loaded.variables["params"])
    trained = sum(leaf.size for path, leaf in leaves.items() if labels[path] != trees.FROZEN)
    flops = parallel.cost(step, traced.jaxpr)["flops_per_step"]
    return call, {**facts, "loss": loss, "trained": trained, "flops": flops}


def compiled(traced):
    """The program as the trainer compiles it."""
    import jax

    from tl_jax.runtime import sharding

    return traced.lower().compile(compiler_options=sharding.OPTIONS.get(jax.devices()[0].platform))


def make_torch(name: str, way: str, folder: pathlib.Path) -> tuple[Callable[[], object], dict]:
    """The same of PyTorch's, from what `make_ours` left in `folder`."""
    import numpy as np

    torch, _ = common.import_timm()
    from safetensors.torch import load_file

    gpu, batch = common.DEVICE.value == "gpu", np.load(folder / vs_torch.BATCH_FILE)
    place = torch.device("cuda" if gpu else "cpu")
    tensors = load_file(folder / vs_torch.WEIGHTS_FILE)
    backbone, head = encoder(name), torch.nn.Linear(tensors["params/head/kernel"].shape[0], CLASSES)
    own = {key.partition(".")[2]: value for key, value in tensors.items() if not key.startswith("params/")}
    backbone.load_state_dict(own, strict=True)
    head.load_state_dict({"weight": tensors["params/head/kernel"].T, "bias": tensors["params/head/bias"]})
    model = torch.nn.ModuleList([backbone, head]).to(place).eval().requires_grad_(False)
    trained = {"forward": [], "head": [head], "full": [model]}[way]
    for module in trained:
        module.train().requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, vs_torch.LR, weight_decay=0.0, fused=True) if parameters else None
    tokens = torch.from_numpy(batch["text"][..., 0]).long().to(place)
    mask, labels = (tokens >= 0), torch.from_numpy(batch["label"]).long().to(place)
    given = {"input_ids": tokens.clamp(min=0), "attention_mask": mask.long()}
    if name.startswith(("roberta", "distilroberta")):  # which would take its token 1 for padding
        given["position_ids"] = mask.cumsum(1) * mask + 1
    pooling, last = json.loads((folder / vs_torch.FACTS_FILE).read_text())["pooling"], mask.sum(1) - 1

    def loss_of():
        with torch.set_grad_enabled(way == "full"):
            hidden = backbone(**given).last_hidden_state.float()
        if pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden[:, 0] if pooling == "cls" else hidden[torch.arange(len(last)), last]
        return torch.nn.functional.cross_entropy(head(pooled).float(), labels)

    def step():
        with torch.set_grad_enabled(bool(parameters)), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = loss_of()
        if parameters:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, vs_torch.CLIP)
            optimizer.step()
        return loss.detach()

    def call():
        for _ in range(vs_torch.STEPS.value):
            step()
        if gpu:
            torch.cuda.synchronize()

    return call, {"loss": float(step()), "trained": sum(parameter.numel() for parameter in parameters)}


def encoder(name: str):
    """transformers' network with the sizes of ours, of random weights and without dropout."""
    import transformers

    from tl_jax import models

    module = models.get(name).module(num_classes=0)
    sizes = {"vocab_size": module.vocab_size, "attn_implementation": ATTENTION.value}
    if module.causal:
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_layer=module.depth, n_embd=module.width, n_head=module.heads, **off, **sizes)
        return transformers.GPT2Model(config)
    if name.startswith("distilbert"):
        own = {"n_layers": module.depth, "dim": module.width, "n_heads": module.heads, "hidden_dim": 4 * module.width}
        config = transformers.DistilBertConfig(**own, dropout=0.0, attention_dropout=0.0, **sizes)
        return transformers.DistilBertModel(config)
    kind = "Roberta" if module.first_position else "Bert"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=module.width, num_hidden_layers=module.depth, num_attention_heads=module.heads,
        intermediate_size=4 * module.width, layer_norm_eps=module.norm_eps, type_vocab_size=module.segments,
        max_position_embeddings=module.positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False)


def main(argv: list[str]) -> None:
    del argv
    if vs_torch.SIDE.value:
        return vs_torch.serve(pathlib.Path(vs_torch.MADE.value), make_ours, make_torch)
    folder = common.start("text")
    rows = [
        vs_torch.measure(name, way, "tokens", LENGTH.value)
        for name in vs_torch.MODELS.value
        for way in vs_torch.WAYS.value
    ]
    title = f"batch {vs_torch.BATCH_SIZE.value} of {LENGTH.value} tokens, {ATTENTION.value}: tokens/s"
    columns = ("case", "tokens/s", "PyTorch", "median", "low", "high", "loss", "its loss", "GFLOP")
    common.report(folder, rows, f"{title}, and how many times as fast as PyTorch", columns=columns)


if __name__ == "__main__":
    flags.FLAGS.set_default("models", ["minilm_l6"])
    flags.FLAGS.set_default("ways", ["forward", "head", "full"])
    flags.FLAGS.set_default("batch_size", 32)
    app.run(main)
