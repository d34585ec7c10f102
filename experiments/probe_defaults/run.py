"""Which rate, length and decay suit a new head on frozen features, and what does scikit-learn reach on the same ones?

python -m experiments.probe_defaults.run --root shared --out W

ROOT holds data/ and weights/ as DATA and WEIGHTS name them. Heads start from zeros and take the steps of a run: AdamW,
cosine, clip 1, batches of 32; all rates of a cell are one program. Writes W/grid.jsonl and prints the tables.
"""

import argparse
import functools
import itertools
import json
import pathlib
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

import tl_jax
from tl_jax.data import sources

RATES, DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.0, 1e-2, 1e-1)
EPOCHS, SHOTS, SEEDS, BATCH = (5, 10, 20, 30, 50, 100, 200), (0, 10), (0, 1, 2), 32
STRENGTHS = tuple(10.0 ** np.arange(-5, 4))  # C of logistic regression
WEIGHTS = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors",
    "mobilenetv2_100": "mobilenet_v2/mobilenet_v2-b0353104.pth",
    "resnet20_cifar": "cifar10_resnet/resnet20-12fca82f.safetensors",
    "resnet8_cifar": "builtin:glyphs",
}
DATA = {
    "hymenoptera": ("folder:{}/hymenoptera_256", ("train", "val")),
    "sketch": ("folder:{}/pacs_40/sketch", ("train",)),
    "art": ("folder:{}/pacs_40/art_painting", ("train",)),
    "cifar10": ("arrays:{}/cifar10_jpeg", ("train[:2500]",)),
    "mnist": ("arrays:{}/digits/mnist_10k.npz", ("train",)),
    "digits": ("digits", ("train", "test")),
}
PAIRS = (
    *(("deit_tiny_patch16_224", data) for data in ("hymenoptera", "sketch", "art", "cifar10")),
    *(("mobilenetv2_100", data) for data in ("hymenoptera", "sketch", "art")),
    ("resnet20_cifar", "digits"), ("resnet20_cifar", "mnist"), ("resnet8_cifar", "digits"),
)  # fmt: skip


def features(root: pathlib.Path, model: str, data: str) -> tuple[np.ndarray, np.ndarray]:
    """What the head of a network reads, float32 [N, D], and the labels [N], of all splits of a data set together."""
    file = WEIGHTS[model]
    network = tl_jax.load(model, file if ":" in file else root / "weights" / file)
    source, splits = DATA[data]
    parts = [sources.load(source.format(root / "data"), split, form=network.card.form) for split in splits]
    found = [tl_jax.features(network, part) for part in parts]
    return np.concatenate(found), np.concatenate([part.labels for part in parts])


def halves(labels: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to test on: half of each class, of the first `shots` of each class where there are shots."""
    rows = np.arange(len(labels))
    train, test = next(StratifiedShuffleSplit(1, test_size=0.5, random_state=seed).split(rows, labels))
    if shots:
        train = np.concatenate([train[labels[train] == c][:shots] for c in np.unique(labels)])
    return train, test


@functools.partial(jax.jit, static_argnames=("classes",))
def train_heads(x, y, batches, rates, decays, classes):
    """Heads {"kernel" [R, D, K], "bias" [R, K]} for R pairs of rate and decay, after batches [steps, size] of rows."""

    def one(rate, decay):
        schedule = optax.cosine_decay_schedule(rate, len(batches))
        kinds = {"kernel": True, "bias": False}
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=decay, mask=kinds))
        head = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}

        def loss(head, rows):
            logits = x[rows] @ head["kernel"] + head["bias"][None]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        def step(carry, rows):
            head, state = carry
            updates, state = optimizer.update(jax.grad(loss)(head, rows), state, head)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(step, (head, optimizer.init(head)), batches)[0][0]

    return jax.vmap(one)(rates, decays)


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and negative log likelihood."""
    logs = np.asarray(jax.nn.log_softmax(logits))
    return float((logits.argmax(1) == labels).mean()), float(-logs[np.arange(len(labels)), labels].mean())


def cells(x: np.ndarray, y: np.ndarray, shots: int, seed: int):
    """Rows of the grid on one split: `epochs` 0 is logistic regression, of which the best C on test is the ceiling."""
    train, test = halves(y, shots, seed)
    classes, size = int(y.max()) + 1, min(BATCH, len(train))
    for standardised in (False, True):
        mean, scale = (x[train].mean(0), x[train].std(0) + 1e-6) if standardised else (0.0, 1.0)
        a, b = (x[train] - mean) / scale, (x[test] - mean) / scale
        row = {"standardised": standardised, "shots": shots, "seed": seed, "n": len(train)}
        for strength in STRENGTHS:
            fitted = LogisticRegression(C=strength, max_iter=3000).fit(a, y[train])
            logits = fitted.decision_function(b)  # [N] of two classes
            accuracy, nll = score(np.stack([0 * logits, logits], 1) if logits.ndim == 1 else logits, y[test])
            yield {**row, "epochs": 0, "C": strength, "accuracy": accuracy, "nll": nll}
        pairs = list(itertools.product(RATES, (0.0,) if standardised else DECAYS))
        for epochs in EPOCHS:
            steps, rng = max(1, round(epochs * len(train) / BATCH)), np.random.default_rng(seed)
            order = np.concatenate([rng.permutation(len(train)) for _ in range(epochs + 1)])
            batches = jnp.asarray(np.resize(order, (steps, size)))
            heads = train_heads(
                jnp.asarray(a), jnp.asarray(y[train]), batches, *map(jnp.array, zip(*pairs, strict=True)), classes
            )
            for i, (rate, decay) in enumerate(pairs):
                accuracy, nll = score(b @ np.asarray(heads["kernel"][i]) + np.asarray(heads["bias"][i]), y[test])
                yield {**row, "epochs": epochs, "lr": rate, "decay": decay, "accuracy": accuracy, "nll": nll}


def tables(rows: list[dict[str, Any]]) -> str:
    """Points of accuracy below the best logistic regression, and nll above it, in the mean over data and seeds."""
    best = defaultdict(lambda: [0.0, np.inf])
    for row in rows:
        if row["epochs"] == 0 and not row["standardised"]:
            own = best[row["set"], row["shots"], row["seed"]]
            own[:] = max(own[0], row["accuracy"]), min(own[1], row["nll"])
    gaps = defaultdict(list)
    for row in rows:
        if row["epochs"]:
            top, low = best[row["set"], row["shots"], row["seed"]]
            kind = row["shots"], row["standardised"], row["decay"]
            gaps[kind, row["epochs"], row["lr"]].append((100 * (row["accuracy"] - top), row["nll"] - low))
    lines = []
    for kind in dict.fromkeys(key[0] for key in gaps):
        lines += [
            "",
            "shots {}, standardised {}, decay {}".format(*kind),
            "| epochs | " + " | ".join(map(str, RATES)) + " |",
        ]
        for epochs in EPOCHS:
            means = (np.mean(gaps[kind, epochs, rate], axis=0) for rate in RATES)
            lines.append(f"| {epochs} | " + " | ".join(f"{points:.1f} / {nll:.2f}" for points, nll in means) + " |")
    return "\n".join(lines)


def main(root: pathlib.Path, out: pathlib.Path) -> None:
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "grid.jsonl").open("w") as file:
        for model, data in PAIRS:
            x, y = features(root, model, data)
            for shots, seed in itertools.product(SHOTS, SEEDS):
                rows += [{"set": f"{model} {data}", **row} for row in cells(x, y, shots, seed)]
            file.writelines(json.dumps(row) + "\n" for row in rows if row["set"] == f"{model} {data}")
            print(model, data, flush=True)
    print(tables(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("shared"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("workdirs/probe_defaults"))
    main(**vars(parser.parse_args()))
