"""All options of a run: name, value, check and meaning, each in this one place. tl_jax/config.py makes configs of them.

A name with dots is in a section: `model.name` is `config.model.name`, and the flag `--config.model.name=resnet50`.
"""

import re
from typing import Any, NamedTuple

from tl_jax.core import checks
from tl_jax.core.card import CROP_MODES, PIXEL_TYPES, POOLINGS
from tl_jax.core.checks import (
    FLAG,
    NAMED,
    REGEXES,
    RULES,
    TABLE,
    TEXT,
    TEXTS,
    either,
    integer,
    number,
    one_of,
    sequence,
)


class Option(NamedTuple):
    """One option; that the identity of a run leaves out initial values keeps the meaning of old configs."""

    name: str
    default: Any  # in a new config; another than the initial one by `_option(...)._replace(default=...)`
    initial: Any  # the default when it was introduced, never edited: its value in a config.json that does not have it
    check: checks.Check
    doc: str
    phase: bool = False  # a phase may change it
    replica: bool = False  # replicas may differ in it
    numbers: bool = True  # False where it only changes the speed, or checks something


def _option(name: str, initial: Any, check: checks.Check, doc: str, **marks: bool) -> Option:
    return Option(name, initial, initial, check, doc, **marks)


SOURCE = either(TEXT, sequence(TEXT, "a sequence of strings, one for each domain"))
SAMPLING = one_of("shuffled", "class_balanced", "sequential", "by_length")
_TRIPLES = sequence(sequence(TEXT, "three strings", 3), "triples of strings (name, source, split), each name once")
SETS = _TRIPLES._replace(fits=lambda x: _TRIPLES.fits(x) and len({name for name, *_ in x}) == len(x))
SEVERAL = sequence(checks.CHANGES, "a sequence, each pairs (dotted option, value)")
TABLES = checks.Check(lambda x: TABLE.fits(x) and all(map(TABLE.fits, x.values())), "{name: {parameter: value}}")
_SCHEDULE = checks.Check(lambda value: NAMED.fits([value]), "a pair (schedule, {parameter: value})")
SEED = integer(0, 2**32 - 1)
_PAIR = sequence(integer(1, 4096), "a pair (height, width) of integers from 1 to 4096", 2)
PIXELS = either(integer(0, 4096), _PAIR)
RATE = number(0, 1, below=True)
GRID = sequence(number(0), "numbers, (value, ...)")
WEIGHT = either(number(), _SCHEDULE)
_TURN = checks.Check(
    lambda x: isinstance(x, list | tuple) and len(x) == 2 and TEXTS.fits(x[0]) and bool(x[0]) and _FACTORS.fits(x[1]),
    "",
)
_FACTORS = checks.Check(lambda x: TABLE.fits(x) and bool(x) and all(map(number().fits, x.values())), "")
POSITIVE = sequence(number(0, above=True), "a sequence of numbers above 0")

# The fields of options that are tables.
TASK_ARGS = {
    "class_weight": either(one_of("balanced"), POSITIVE),
    "pos_weight": either(number(0, above=True), POSITIVE),
}
LANGUAGE = ("masked_lm", "next_token")  # tasks whose labels are the tokens of texts
# Each with its task_args.
TASKS = {
    "classification": ("class_weight",),
    **dict.fromkeys(("binary", "multilabel"), ("pos_weight",)),
    **dict.fromkeys(("regression", *LANGUAGE), ()),
}
STREAM = {
    "source": SOURCE,
    "split": TEXT,
    "batch_size": integer(1),  # that of the run unless given
    "augment": NAMED,
    "strong": NAMED,  # augmentations of a second view of each example, the field "image:strong"
    "labelled": FLAG,  # False unless given: its batches have no field "label"
    "sampling": SAMPLING,
    "shots": integer(0),
}
HASH = checks.Check(
    lambda x: bool(TEXT.fits(x) and re.fullmatch("([0-9a-f]{64})?", x)), "64 lower-case hex digits, or ''"
)
PART = {"name": TEXT, "weights": TEXT, "image_size": PIXELS, "sha256": HASH}
FUSION = {
    "kind": one_of("late", "early"),
    "width": integer(1, 2**14),
    "merge": one_of("concat", "sum"),
    "depth": integer(1, 64),
    "heads": integer(1, 64),
    "order": TEXTS,
    "drop": checks.Check(
        lambda x: TABLE.fits(x) and all(map(RATE.fits, x.values())), "{kind of input: probability below 1}"
    ),
}
NETWORK = PART | {"cache": one_of("", "features"), "group": TEXT}  # group "": frozen
CARD = {
    "input_size": either(integer(1, 4096), _PAIR),
    "mean": sequence(number(), "a sequence of numbers"),
    "std": POSITIVE,
    "interpolation": TEXT,
    "crop": number(0.1, 10),
    "crop_mode": one_of(*CROP_MODES),
    "pixels": one_of(*PIXEL_TYPES),
    "scale": number(0, above=True),
    "licence": TEXT,
}

# Scores of methods/selectors.py that choose a checkpoint by itself; that of ensv depends on all candidates.
SELECTORS = (
    "source_risk", "iwcv", "dev", "entropy", "infomax", "bnm", "snd", "corr_c", "class_ami", "mixval", "rankme",
)  # fmt: skip
CANDIDATES = sequence(TEXT, "a triple of strings (name, source, split), or ()")

# fmt: off
_ROWS = (
    _option("seed", 0, SEED, "of the new head, the order of the data, augmentation, dropout and shots", replica=True),

    # What is predicted, and the loss
    _option("task", "classification", one_of(*TASKS), "what the outputs mean"),
    _option("task_args", {}, TABLE, "class_weight: 'balanced' or per class; pos_weight: of positives, or per label"),
    _option("terms", {}, TABLES, "summands of the loss: {name: {\"weight\": number or (schedule, {parameter: value}), "
            "and the term's own parameters}}; \"task\" is there without being named", phase=True, replica=True),
    _option("turns", (), sequence(_TURN, "pairs ((group, ...), {term: factor})"), "updates of each step, one after the "
            "other on one batch: pairs ((group, ...), {term: factor}); (): one of all groups on all terms", phase=True),

    # The network
    _option("model.name", "resnet18", TEXT, "the architecture, see docs/weights.md; \"\": that of weights timm:NAME"),
    _option("model.weights", "", TEXT, "file, builtin:NAME, timm:NAME, hf://owner/name[/file]@revision; \"\": random"),
    _option("model.weights_sha256", "", HASH, "what the bytes of that file must have; \"\": any, and config.json "
            "keeps what they had", numbers=False),
    _option("model.partial", (), REGEXES, "what that file may lack, and begins from random numbers: regexes of whole "
            "paths of the backbone, stage4/.*"),
    _option("model.image_size", 0, PIXELS, "pixels, of a side or (height, width); 0: the size on the weight card"),
    _option("model.parts", {}, TABLES, "of a fusion: {image | text | table: {name, weights, image_size, sha256}}"),
    _option("model.fusion", {}, TABLE, "of a fusion: kind late | early, width, merge concat | sum, depth, heads, drop, "
            "order of the parts"),
    _option("model.tokenizer", "", TEXT,
            "a tokenizer.json, or made of the training texts: words | chars | wordpiece | bpe, bpe:5000"),
    _option("model.vectors", "", TEXT, "a file of word vectors, as of GloVe, for a network without weights"),
    _option("model.max_length", 0, integer(0, 2**16), "tokens of a text; 0: as many as the weight card says"),
    _option("model.pooling", "", one_of("", *POOLINGS), "of the tokens of a text; '': as the weight card says"),
    _option("model.channels", 0, integer(0, 1024), "of the images; 0: as many as the weight card has means"),
    _option("model.keep_head", False, FLAG, "go on with the file's classifier, for the same classes; else a new head"),
    _option("model.reinit", (), TEXTS, "blocks that start from random numbers all the same: stage3, block11, ..."),
    _option("model.head", (), NAMED, "layers between the features and the last dense layer: pairs (name, arguments)"),
    _option("model.head_init", "zeros", TEXT, "of the last dense layer: zeros | lecun | xavier; a head of the "
            "names of classes, by the text tower in the same file: names:a photo of a {}. | prompts:16"),
    _option("model.dtype", "float32", one_of("float32", "bfloat16"), "of activations; parameters and loss are float32"),
    _option("model.prefix_dtype", "", one_of("", "float32", "bfloat16"), "of the frozen prefix; \"\": model.dtype"),
    _option("model.dropout", 0.0, RATE, "before the last dense layer"),
    _option("model.hidden_dropout", 0.0, RATE, "inside transformers: of the embeddings, of the probabilities of "
            "attention, and behind attention and MLP of each block"),
    _option("model.drop_path", 0.0, RATE, "stochastic depth, rising linearly to this rate in the last block"),
    _option("model.remat", "", one_of("", "block", "dots"), "recompute in the backward pass: all of a block, or all "
            "but matrix products and convolutions"),
    _option("model.attention", "xla", one_of("xla", "cudnn"), "cudnn: its fused kernel, on a GPU in bfloat16"),
    _option("networks", {}, TABLES, "{name: {name, weights, image_size, sha256, cache, group}}; cache 'features': on "
            "disk; group: what trains it, '' for frozen"),

    # The data
    _option("data.source", "digits", SOURCE, "digits | glyphs | docstrings | folder:PATH | csv:FILE | table:FILE | "
            "text:PATH | arrays:FILE.npz | packed:FOLDER | tfds:NAME; several: one for each domain"),
    _option("data.train", "train[:80%]", TEXT, "the split to train on"),
    _option("data.val", "train[80%:]", TEXT, "the split to choose on"),
    _option("data.test", "", TEXT, "read once, at the end; \"\": val is scored instead, and the result says so"),
    _option("data.extra_eval", (), SETS, "extra sets to score at the end: triples (name, source, split)"),
    _option("data.candidates", (), CANDIDATES._replace(fits=lambda x: CANDIDATES.fits(x) and len(x) in (0, 3)),
            "the target's held-out split on which selectors judge without labels: (name, source, split)"),
    _option("data.labels", (), TEXTS, "the columns that hold the labels, of sources that have columns"),
    _option("data.resample", "", TEXT, "cut train and test from the split train: kfold:K:FOLD | bootstrap:DRAW | loo"),
    _option("data.text", (), TEXTS, "the one or two columns that hold texts, of text:, tfds: and several: sources"),
    _option("data.image", "", TEXT, "the column that names image files, of several: sources"),
    _option("data.columns", (), TEXTS, "the columns of numbers, of several: sources"),
    _option("data.group", "", TEXT, "what no slice or fold cuts: a column or array by name, or a pattern in the ids"),
    _option("data.allow_duplicates", False, FLAG, "allow duplicates of training examples among what is scored"),
    _option("data.labelled", True, FLAG, "False: the stream train has no labels, for adaptation without source data"),
    _option("data.shots", 0, integer(0), "training examples per class; 0: all", replica=True),
    _option("data.sampling", "shuffled", SAMPLING, "class_balanced: every class equally often; sequential: "
            "in the order of the source"),
    _option("data.weights", "", TEXT, "an .npz file with the ids and weights of the examples of train"),
    _option("data.split_seed", 0, SEED, "of the permutation that slices cut; runs of all seeds share their val"),
    _option("data.augment", (), NAMED, "pairs (name, {parameter: value}), see docs/data.md"),
    _option("data.on_error", "fail", one_of("fail", "skip"), "unreadable images; skip counts them"),
    _option("data.data_dir", "", TEXT, "where tfds keeps its data"),
    _option("data.workers", 0, integer(0, 1024), "processes that decode and augment", numbers=False),
    _option("data.card", {}, TABLE, "fields of the weight card to replace, such as mean; needs data.override_card"),
    _option("data.override_card", False, FLAG, "allow data.card to change what the weights expect of their input"),
    _option("data.transductive", False, FLAG, "allow an unlabelled training stream to hold examples that are scored"),
    _option("data.poison", "", one_of("", "permuted", "none"), "what stands in place of sealed labels, of "
            "--prove-no-leak: scores of such a run mean nothing"),
    _option("streams", {}, TABLES, "{name: {source, split, batch_size, augment, strong, labelled, sampling, shots}}"),
    _option("norm_batches", "joint", one_of("joint", "per_stream"), "what BatchNorm normalises over, with streams"),

    # What trains
    _option("method.name", "linear_probe", TEXT, "linear_probe | full | last_k | first_k | blocks | bitfit | "
            "norm_only | rules; without gradient: knn | logistic | ridge | tip_adapter | none; see docs/methods.md",
            phase=True),
    _option("method.k", 0, integer(0), "blocks of last_k and first_k", phase=True),
    _option("method.blocks", (), TEXTS, "of blocks: stem, stage1/block0, block3, norm, ...", phase=True),
    _option("method.rules", (), RULES, "of rules: ordered pairs (path regex, group | frozen)", phase=True),
    _option("method.norm", (), RULES, "ordered pairs (path regex, frozen | update); (): as their block", phase=True),
    _option("method.add", (), NAMED, "added parameters: pairs (lora | adapter | prompt | ssf | mixstyle, {...})"),
    _option("method.stoch_norm", 0.0, number(0, 1), "rate of BatchNorm channels with running statistics", phase=True),
    _option("method.auto_rgn", False, FLAG, "learning rates of blocks by their relative gradient norms", phase=True),
    _option("method.grid", (), GRID, "of knn (neighbours), logistic (C), ridge (alpha): val chooses; "
            "(): a default; of tip_adapter (alpha, beta), or (): val chooses"),
    _option("method.label_smoothing", 0.0, RATE, "mass that goes from the class to all classes", phase=True),
    _option("method.mixup", 0.0, number(0), "parameter of the Beta distribution; 0: off", phase=True),
    _option("method.cutmix", 0.0, number(0), "parameter of the Beta distribution; 0: off", phase=True),
    _option("method.mix_domains", 0.0, number(0), "the same, of a mixup of each domain with another", phase=True),

    # Optimization; durations are (amount, epochs | steps | examples)
    _option("batch_size", 32, integer(1), "over all devices"),
    _option("total", (10.0, "epochs"), checks.duration(), "the length of the run, or of a phase", phase=True),
    _option("accumulate", 1, integer(1), "pieces that a batch is cut into, to save memory; BatchNorm sees the pieces"),
    _option("lr", 1e-3, number(0, above=True), "the peak of the learning rate", phase=True, replica=True),
    _option("optimizer", "adamw", TEXT, "the name of any optimizer of optax", phase=True),
    _option("optimizer_args", {}, TABLE, "its further arguments, such as momentum", phase=True),
    _option("weight_decay", 0.0, number(0), "decoupled where the optimizer has its own", phase=True, replica=True),
    _option("decay", ".*/kernel", checks.REGEX, "the parameters that weight decay acts on", phase=True),
    _option("clip", 1.0, number(0), "the largest global norm of the gradient; 0: off", phase=True),
    _option("groups", {}, TABLES, "{group: {lr_mult, weight_decay, decay, optimizer, args}}", phase=True, replica=True),
    _option("restart", False, FLAG, "optimizer values start anew where the phase begins", phase=True),
    _option("layer_decay", 1.0, number(0, 1, above=True), "factor on lr, per block from the head down", phase=True),
    _option("schedule.name", "cosine", TEXT, "constant | cosine | linear | step | inverse_sqrt", phase=True),
    _option("schedule.warmup", (0.0, "epochs"), checks.duration(zero=True), "of the learning rate, linear", phase=True),
    _option("schedule.args", {}, TABLE, "such as final, milestones, factor, timescale", phase=True),
    _option("ema", 0.0, RATE, "decay of the moving average of parameters and statistics; 0: off"),
    _option("phases", (), SEVERAL, "phases one after the other, each pairs (dotted option, value) with its own total"),

    # Evaluation
    _option("eval_batch_size", 128, integer(1), "over all devices"),
    _option("log_every", (10.0, "steps"), checks.duration(), "lines of metrics.jsonl"),
    _option("eval_every", (1.0, "epochs"), checks.duration(), "exact evaluation on val, then a checkpoint"),
    _option("select", "last", one_of("last", "best_val", *SELECTORS), "the checkpoint that is scored at the end; a "
            "selector needs data.candidates"),
    _option("patience", 0, integer(0), "evaluations without improvement until the run stops; 0: off"),
    _option("min_delta", 0.0, number(0), "how much an improvement must be, for patience"),
    _option("resamples", 1000, integer(1, 10**6), "of the bootstrap behind every interval"),
    _option("log", (), sequence(one_of("tensorboard"), "some of tensorboard"), "event files beside metrics.jsonl, for "
            "TensorBoard", numbers=False),
    _option("feature_map", "pca", one_of("pca", "tsne"), "how the figure of the features is made", numbers=False),

    # Several runs, memory and speed
    _option("seeds", (), sequence(SEED, "integers, (seed, ...)"), "further seeds of the same run"),
    _option("baseline", (), checks.CHANGES, "a second arm to compare with: pairs (dotted option, value)"),
    _option("replicas", (), SEVERAL, "runs that are trained as one program, each pairs (dotted option, value)"),
    _option("cache", "", one_of("", "features"), "features: keep the outputs of the frozen prefix on disk"),
    _option("views", 1, integer(1, 10**6), "epochs of augmentation that are kept so; epoch e sees those of e % views"),
    _option("cache_dir", "", TEXT, "where they are kept; \"\": ~/.cache/tl_jax/features", numbers=False),
    _option("parallel", "jit", one_of("jit", "pmap"), "how a step is divided over the devices"),
    _option("fsdp", 0, integer(0), "divide arrays of at least this size over the devices; 0: none", numbers=False),
)
# fmt: on
OPTIONS: dict[str, Option] = {option.name: option for option in _ROWS}
