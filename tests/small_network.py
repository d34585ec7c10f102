"""A network of two pointwise layers, in jax and in float64 by hand, on which penalties are checked."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import tasks
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.methods.penalties import PENALTIES
from tl_jax.methods.term import Context, Start

WIDTHS = (5, 4)  # of the two blocks of the small network
CLASSES = 3


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    backbone = {
        "block1": {"kernel": rng.standard_normal((3, WIDTHS[0])) / 200},
        "block2": {"kernel": rng.standard_normal(WIDTHS), "bias": rng.standard_normal(WIDTHS[1]) / 4},
    }
    head = {"kernel": rng.standard_normal((WIDTHS[1], CLASSES)), "bias": rng.standard_normal(CLASSES)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"backbone": backbone, "head": head})


CUTS = ("block1", "block2", "pre_logits")


def apply(params, x, start=None):
    """Every output of two pointwise layers, the mean over positions and, where there is one, a linear head."""
    backbone, out = params["backbone"], {}
    if start is None:
        x = out["block1"] = jnp.tanh(x @ backbone["block1"]["kernel"])
    if start != "block2":
        x = out["block2"] = jax.nn.relu(
            x @ backbone["block2"]["kernel"] + backbone["block2"]["bias"].reshape(1, 1, 1, -1)
        )
    out["pre_logits"] = x.mean(axis=(1, 2))
    if "head" in params:
        out["logits"] = out["pre_logits"] @ params["head"]["kernel"] + params["head"]["bias"][None]
    return out


def numpy_network(params, images, off=(None, None)):
    """The small network in float64 with one channel of one block switched off: (block1, block2, pre_logits)."""
    backbone = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["backbone"])
    first = np.tanh(images.astype(np.float64) @ backbone["block1"]["kernel"])
    if off[0] == "block1":
        first[..., off[1]] = 0
    second = np.maximum(first @ backbone["block2"]["kernel"] + backbone["block2"]["bias"], 0)
    if off[0] == "block2":
        second[..., off[1]] = 0
    return {"block1": first, "block2": second, "pre_logits": second.mean(axis=(1, 2))}


def make_data(size=50, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % CLASSES).astype(np.int32)
    centres = np.array([[40, 90, 200], [150, 60, 100], [220, 180, 30]])
    images = centres[labels][:, None, None] + rng.normal(0, 25, (size, 4, 4, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def make_task(classes=CLASSES):
    return tasks.make(tasks.Spec(class_names=tuple(map(str, range(classes)))))


def make_start(params=None, source_head=None, data=None, classes=CLASSES):
    images, labels = data or make_data()
    params = params or make_params()

    def batches(stream):
        assert stream == "train"
        return iter([(images[i : i + 20], labels[i : i + 20]) for i in range(0, len(labels), 20)])

    def apply_network(network, variables, x, start=None, stop=None):
        own = variables["params"]
        return apply(own if network == "model" else own[network], x, start)

    shapes = {name: x.shape for name, x in apply(params, jnp.zeros((1, 4, 4, 3))).items()}
    return Start(
        {"params": params, "batch_stats": {}}, None, make_task(classes), SimpleNamespace(cuts=CUTS), {}, shapes,
        batches, apply_network, None, lambda: source_head, jax.random.key(0),
    )  # fmt: skip


def initialised(term, start):
    """The parameters of the term's own networks, {network: params}, and its first memory; the data is out of reach."""
    networks, memory = term.init(start._replace(batches=None))
    return {name: network.variables["params"] for name, network in networks.items()}, memory


def begun(term, start):
    """As `initialised`, with the memory as a phase begins."""
    extra, memory = initialised(term, start)
    if term.refresh:
        variables = {**start.variables, "params": {**start.variables["params"], **extra}}
        memory = term.refresh(start._replace(variables=variables, loaded=variables, memory=memory))
    return extra, memory


def forward_of(params, images):
    """`Context.forward` of the small network and of those with its layers."""

    def forward(network, of, *, train=False, stop=None, key=None, params=params):
        assert of == "train"
        return apply(params if network == "model" else params[network], images), {}

    return forward


def make_context(params, images=None, labels=None, memory=None, outputs=None, **fields):
    images = jnp.asarray(make_data()[0][:6] if images is None else images, jnp.float32)
    labels = jnp.asarray(make_data()[1][:6] if labels is None else labels)
    encoded, count = {"train": jax.nn.one_hot(labels, CLASSES)}, {"train": jnp.ones(len(labels))}
    context = Context(
        {"train": {"image": images, "label": labels}}, encoded, count, {"train": jnp.float32(len(labels))},
        outputs or {"train": apply(params, images)}, {}, params, {}, {}, memory, make_task(),
        forward_of(params, images), jnp.int32(0), jnp.float32(0), jax.random.key(7),
    )  # fmt: skip
    return context._replace(**fields)


def with_features(features):
    return Context(*[None] * len(Context._fields))._replace(
        outputs={"train": {"pre_logits": jnp.asarray(features, jnp.float32)}}
    )


def one(name, **parameters):
    return PENALTIES[name](**parameters)


def groups_of(term, start):
    """The group of each parameter of a term's own networks, as the trainer matches them."""
    networks, _ = term.init(start)
    paths = [f"{name}/{path}" for name, n in networks.items() for path in trees.flatten(n.variables["params"])]
    matches = trees.match_rules(paths, rules.auxiliary(paths, {name: n.group for name, n in networks.items()}))
    return {path: match.value for path, match in matches.items()}


def squared(tree, other=None):
    return sum(np.sum((np.float64(a) - (0 if other is None else np.float64(other[p]))) ** 2) for p, a in tree.items())
