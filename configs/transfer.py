"""The base of every experiment: all options and their defaults, each in this one place.

python launch.py --config configs/transfer.py:model=NAME,weights=PATH,data=SOURCE,method=NAME[,key=value...] --workdir W

The argument sets the options that most runs choose (model, weights, data, method); any other option is a flag,
such as --config.lr=0.01 or --config.schedule.name=linear.
"""

import ast
import difflib
import functools

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # decides the new head, the order of the data, augmentation, dropout and the choice of shots

    config.model = ConfigDict()
    config.model.name = "resnet18"
    config.model.weights = ""  # file, builtin:NAME or hf://owner/name[/file]@revision; "" starts from random weights
    config.model.image_size = 0  # 0: the size on the weight card
    config.model.keep_head = False  # go on with the weight file's classifier, for the same classes; else a new head
    config.model.reinit = ()  # parts that start from random numbers all the same, such as stage3, block11
    config.model.head_init = "zeros"  # zeros | lecun
    config.model.dtype = "float32"  # of activations: float32 | bfloat16; parameters and loss stay float32
    config.model.prefix_dtype = ""  # the same, of what is frozen in front of all that trains; "": as dtype
    config.model.dropout = 0.0  # before the head
    config.model.drop_path = 0.0  # stochastic depth, rising linearly to this rate in the last block
    # Recompute in the backward pass, for memory: "" | block (all of a block) | dots (all but matmuls and convolutions).
    config.model.remat = ""
    config.model.attention = "xla"  # xla | cudnn: its fused kernel, on a GPU in bfloat16; elsewhere as xla

    config.data = ConfigDict()
    config.data.source = "digits"  # digits | glyphs | folder:PATH | arrays:FILE.npz | packed:FOLDER | tfds:NAME
    config.data.train = "train[:80%]"
    config.data.val = "train[80%:]"
    config.data.test = ""  # read once, at the end; "" scores val instead, and says so
    config.data.also = ()  # further sets to score at the end: triples (name, source, split)
    config.data.resample = ""  # cut train and test from the split train: kfold:K:FOLD | bootstrap:DRAW | loo
    config.data.shots = 0  # training examples per class; 0: all
    config.data.split_seed = 0  # of the permutation that slices cut; separate from seed, so that seeds share their val
    config.data.augment = ()  # pairs (name, {parameter: value}), see docs/data.md
    config.data.on_error = "fail"  # unreadable images: fail | skip (and count them)
    config.data.data_dir = ""  # of tfds
    config.data.workers = 0  # processes that decode and augment; changes the speed only
    config.data.card = ConfigDict()  # overrides of the weight card, e.g. mean; an error unless override_card says so
    config.data.override_card = False

    config.method = ConfigDict()
    # What of the network trains: linear_probe | full | last_k | first_k | blocks | bitfit | norm_only | rules.
    # Without gradient, on features: knn | logistic | ridge. Which of them when: docs/methods.md
    config.method.name = "linear_probe"
    config.method.k = 0  # blocks of last_k and first_k
    config.method.blocks = ()  # for "blocks": names such as stem, stage1/block0, block3, norm
    config.method.rules = ()  # for "rules": ordered pairs (path regex, group); group "frozen" is never trained
    config.method.norm = ()  # ordered pairs (path regex, frozen | update); (): as the block it stands in
    config.method.add = ()  # parameters beside the network's: pairs (lora | adapter | prompt | ssf, {parameter: value})
    # Pairs (l2_sp | delta | bss | co_tuning | stoch_norm | r_drop | l1, {parameter: value}).
    config.method.regularize = ()
    config.method.auto_rgn = False  # learning rates of the blocks by their relative gradient norms
    config.method.grid = ()  # of knn (neighbours), logistic (C), ridge (alpha): val chooses; (): a default grid
    config.method.label_smoothing = 0.0
    config.method.mixup = 0.0  # Beta parameter, 0: off; train accuracy is that of the unmixed labels
    config.method.cutmix = 0.0

    config.batch_size = 32  # over all devices
    config.eval_batch_size = 128
    config.total = (10.0, "epochs")  # durations: (amount, epochs | steps | examples)
    config.accumulate = 1  # parts that a batch is cut into, to save memory; BatchNorm then sees the parts
    config.cache = ""  # "features": what is frozen in front runs once per image, its outputs are kept on disk
    config.views = 1  # epochs of augmentation that are kept so; epoch e sees those of e % views
    config.cache_dir = ""  # where they are kept; "": ~/.cache/tl_jax/features
    config.ema = 0.0  # decay of the moving average of parameters and statistics, not debiased; 0: off

    config.lr = 1e-3
    config.optimizer = "adamw"  # any optax optimizer by its name
    config.optimizer_args = ConfigDict()  # its further arguments, e.g. momentum
    config.weight_decay = 0.0
    config.decay = ".*/kernel"  # the paths that weight decay acts on
    config.clip = 1.0  # of the global gradient norm; 0: off
    config.groups = ConfigDict()  # per group: lr_mult, weight_decay, decay, optimizer, args
    config.layer_decay = 1.0  # the factor on the learning rate from each block to the one before it
    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # constant | cosine | linear | step | inverse_sqrt
    config.schedule.warmup = (0.0, "epochs")
    config.schedule.args = ConfigDict()  # e.g. final, milestones, factor, timescale

    # Phases, one after the other, each pairs (dotted option, value) that change the config for its time: total, lr,
    # clip, layer_decay, options of method, schedule, optimizer and groups. The run is as long as all together.
    config.phases = ()

    # Runs that are trained together, each pairs (dotted option, value) of lr, weight_decay, groups, seed, data.shots;
    # what is frozen is computed once for all of them, and each leaves the folder of a run by itself.
    config.replicas = ()

    config.parallel = "jit"  # jit | pmap
    # Parameters, moments and averages of at least this many elements are divided over the devices; 0: whole on each.
    config.fsdp = 0
    config.log_every = (10.0, "steps")
    config.eval_every = (1.0, "epochs")  # exact evaluation on val, then a checkpoint
    config.select = "last"  # which checkpoint is scored at the end: last | best_val
    config.resamples = 1000  # of the bootstrap behind every interval

    config.seeds = ()  # further seeds to run the same experiment with
    config.baseline = ()  # a second arm to compare with: pairs (dotted option, value)
    return parse(config, arg)


SHORT = {"model": "model.name", "weights": "model.weights", "data": "data.source", "method": "method.name"}


def parse(config: ConfigDict, arg: str) -> ConfigDict:
    """Sets "key=value,key=value" and locks the config; a key is one of SHORT or a dotted option.

    Raises ValueError that lists every key that does not exist, with its nearest neighbour.
    """
    known, problems = {**_options(config), **dict.fromkeys(SHORT)}, []
    for item in _items(arg):
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(
                f"{item!r} is no key=value with a known key" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
            continue
        *folders, name = SHORT.get(key, key).split(".")
        owner = functools.reduce(lambda node, folder: node[folder], folders, config)
        try:
            owner[name] = value if isinstance(owner[name], str) else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            default = owner[name].to_dict() if isinstance(owner[name], ConfigDict) else owner[name]
            problems.append(f"{item!r} does not have the type of the default, {default!r}")
    if problems:
        raise ValueError(f"config argument {arg!r}: {'; '.join(problems)}; short keys: {', '.join(SHORT)}")
    return config.lock()


def _items(arg: str) -> list[str]:
    """Cuts at the commas that stand outside brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in arg:
        quote = "" if character == quote else quote or (character if character in "'\"" else "")
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]


def _options(config: ConfigDict, prefix: str = "") -> dict:
    """`{dotted option: value}`; an empty section counts as an option."""
    flat = {}
    for key, value in config.items():
        nested = _options(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) and value else None
        flat |= nested or {prefix + key: value}
    return flat
