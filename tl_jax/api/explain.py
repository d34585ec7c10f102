"""`python -m tl_jax explain`: images with the map of what a run's network looked at."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.api import inputs
from tl_jax.api.model import Model, read_input
from tl_jax.api.run import Run, load_run
from tl_jax.data.image import decode
from tl_jax.data.image.augment import make_preprocess
from tl_jax.models import explain as maps
from tl_jax.training.inputs import load_sources
from tl_jax.training.settings import read
from tl_jax.training.steps import normalise

BATCH, COLUMNS, MOST = 8, 4, 100  # images at a time, as attention takes memory; in a row of the sheet; in all of it


def explain(
    run: str | os.PathLike | Run, images: Sequence[str | os.PathLike] = (), out: str | os.PathLike = "", *,
    count: int = 8, weights: str | None = None, seed: int = 0,
) -> pathlib.Path:  # fmt: skip
    """Draws images with the map of what the network of a finished run looked at; returns the path of the figure.

    images: files and folders; without them `count` of the split that the run was scored on: half of them its surest
    mistakes (of a regression its largest errors), the others drawn from the rest by `seed`. out: a .png or .svg file,
    RUN/explain.png unless given. The map is Grad-CAM for the answer that stands above the image, and attention rollout
    of a ViT, which is of no answer. Raises ValueError for other inputs, and images that cannot be read.
    """
    found = run if isinstance(run, Run) else load_run(run, weights)
    card = found.model.card
    if card.input != "image":
        raise ValueError(f"{found.folder} reads an input {card.input!r}; maps are of images")
    names, items, predictions = _given(found, images) if images else _scored(found, count, seed)
    x = _read(names, items, found.model)
    from tl_jax.tasks import mistakes  # here, as matplotlib takes its time

    if predictions is None:
        predictions = tasks.make_predictions(_outputs(found.model, x), None, np.arange(len(x)), found.model.spec)
    said = mistakes.said(predictions)
    words = [mistakes.in_words(predictions, said, i) for i in range(len(x))]
    kind, heat = look(found.model, x, said.column, said.sign)
    path = pathlib.Path(out or found.folder / "explain.png")
    what = f"{found.result['model']}, {kind}"
    _draw(path, what, [decode.picture(row) for row in x], heat, list(zip(names, words, strict=True)))
    return path


def _given(run: Run, images: Sequence[Any]) -> tuple[list[str], list[Any], None]:
    names, items = inputs.list_inputs(images, run.model.card)
    if len(names) > MOST:
        raise ValueError(
            f"found {len(names):,} images, expected at most {MOST}, which a sheet holds; give some of them"
        )
    return list(names), list(items), None


def _scored(run: Run, count: int, seed: int) -> tuple[list[str], list[Any], tasks.Predictions]:
    """Images of the split that was scored, and what the run predicted for them."""
    from tl_jax.tasks import mistakes

    predictions, split = tasks.load_predictions(run.folder / "predictions.npz"), run.result["split"]
    source = load_sources(read(options.read(run.folder / "config.json")), run.model.card.form)[split]
    worst = mistakes.worst(mistakes.said(predictions), count // 2)
    rest = np.setdiff1d(np.arange(len(predictions.ids)), mistakes.worst(mistakes.said(predictions), len(source)))
    rest = rest if len(rest) else np.setdiff1d(np.arange(len(predictions.ids)), worst)
    chosen = [*worst, *np.random.default_rng(seed).permutation(rest)[: count - len(worst)].tolist()]
    place = {name: k for k, name in enumerate(source.ids)}
    names = predictions.ids[chosen].tolist()
    some = {name: values[chosen] for name, values in predictions.outputs.items()}
    own = predictions._replace(outputs=some, labels=predictions.labels[chosen], ids=predictions.ids[chosen])
    return names, [source.inputs[place[name]] for name in names], own._replace(features=None, groups=None)


def _read(names: Sequence[str], items: Sequence[Any], model: Model) -> np.ndarray:
    """The images as the network takes them, [N, *card.shape]; one ValueError for all that cannot be read."""
    preprocess, rows, bad = make_preprocess(model.card), [], []
    for name, item in zip(names, items, strict=True):
        try:
            rows.append(read_input(item, model.card, preprocess))
        except (ValueError, OSError) as error:
            bad.append(f"{name}: {error}")
    if bad:
        raise ValueError("\n  ".join([f"{len(bad)} of {len(names)} images cannot be read:", *bad]))
    return np.stack(rows)


def _outputs(model: Model, x: np.ndarray) -> dict[str, np.ndarray]:
    apply = jax.jit(model.answer)
    found = [apply(model.variables, x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0] if name in ("logits", "values")}


def look(model: Model, x: np.ndarray, column: np.ndarray, sign: np.ndarray) -> tuple[str, np.ndarray]:
    """What the map is called, and the map of each image [N, h, w], from 0 to 1: by its largest value.

    x: as the card says, [N, *card.shape]. column, sign: of the outputs, what is explained; see `mistakes.Said`.
    """
    rolled = maps.is_vit(model.module)

    def apply(x, column, sign):
        def score(out: Mapping[str, jax.Array]) -> jax.Array:
            return sign * out["logits"].reshape(len(x), -1)[jnp.arange(len(x)), column]

        x = normalise(x, model.card)
        if rolled:
            return maps.rollout(model.module, model.variables, x)
        return maps.grad_cam(model.module, model.variables, x, score)

    apply = jax.jit(apply)
    parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
    heat = np.concatenate([np.asarray(apply(x[part], column[part], sign[part])) for part in parts])
    least = heat.min(axis=(1, 2), keepdims=True) if rolled else 0.0  # the residual branch gives every patch a part
    heat = heat - least
    return (
        "attention rollout" if rolled else "Grad-CAM",
        heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-30),
    )


def _draw(path: pathlib.Path, what: str, pictures: Sequence[Image.Image], heat: np.ndarray, told: Sequence) -> None:
    """Each picture, and beside it the same in grey under its map."""
    from tl_jax.core.plotting import GREY, end_of, figure_at  # here, as matplotlib takes its time

    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    with figure_at(path, (2.7 * columns + 0.5, 1.62 * rows + 0.35), rows, 2 * columns) as (figure, axes):
        for axis in axes:
            axis.axis("off")
            axis.set_anchor("NW")
        for plain, under, picture, values, (name, words) in zip(
            axes[::2], axes[1::2], pictures, heat, told, strict=False
        ):
            width, height = picture.size
            small = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
            plain.imshow(picture)
            under.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255)
            shown = under.imshow(np.asarray(small), cmap="inferno", vmin=0, vmax=1, alpha=0.6)
            plain.set_title("\n".join([end_of(name, 24), *words[:1]]), fontsize=6, loc="left")
            if values.max() > values.min():
                under.contour(np.asarray(small), levels=[0.5], colors="white", linewidths=0.8)
            under.set_title("\n".join(["", *words[1:]]), fontsize=6, loc="left")
        bar = figure.colorbar(shown, ax=axes.tolist(), shrink=0.6, ticks=[0, 1], pad=0.01)
        bar.ax.set_yticklabels(["least", "most"], fontsize=7)
        bar.ax.set_ylabel("line: half of the most", fontsize=7)
        bar.outline.set_visible(False)
        figure.suptitle(what, x=0.01, ha="left", fontsize=8, color=GREY)
