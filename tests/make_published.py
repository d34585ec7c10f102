"""Writes tl_jax/weights/published.csv from the installed timm: `PYTHONPATH=. python tests/make_published.py`."""

import csv
import io
import sys

import numpy as np
from torch_reference import torch  # before timm, which needs torchvision

from tl_jax import models
from tl_jax.models import conversion
from tl_jax.weights import load, published


def rows():
    """What timm says about the files which it publishes of our networks, in the order of our table of models."""
    import timm
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives

    found = {}
    for model in (name for name in models.MODELS if "." not in name and timm.is_model(name)):
        for name, its in timm.models.get_arch_pretrained_cfgs(model).items():
            if its.hf_hub_id:
                file = its.hf_hub_filename or next(iter(_get_safe_alternatives(HF_WEIGHTS_NAME)))
                assert its.input_size[1] == its.input_size[2] and its.custom_load != "hf", name
                found[name] = published.File(
                    name, its.hf_hub_id, file, model, its.num_classes, its.input_size[1], its.mean, its.std,
                    its.interpolation, its.crop_pct, its.crop_mode, its.license or "",
                )  # fmt: skip
    # CLIP's files that were trained with the other GELU are listed under both networks there, here under theirs.
    wrong = {name.replace("_quickgelu_", "_") for name in found if "_quickgelu_" in name}
    return [row for name, row in found.items() if name not in wrong]


def misfits(rows):
    """The names of the files whose keys and shapes in timm are not those which our network of that name reads."""
    return [row.name for row in rows if not _fits(row)]


def _fits(row):
    import timm

    with torch.device("meta"):
        state = timm.create_model(row.name).state_dict()
    tensors = {key: np.broadcast_to(np.float32(0), tuple(value.shape)) for key, value in state.items()}
    variant = models.get(row.model)
    shapes = load._network_shapes(variant.module, row.card(variant.card).to_json())
    _, _, problems = conversion.fill(variant.layouts["timm"], shapes, tensors)
    return not problems


def text(rows):
    """The table as it is committed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(published.File._fields)
    for row in rows:
        writer.writerow(" ".join(map(str, value)) if isinstance(value, tuple) else value for value in row)
    return file.getvalue()


if __name__ == "__main__":
    if wrong := misfits(rows()):
        sys.exit(f"our networks do not read these files of timm: {', '.join(wrong)}")
    published.TABLE.write_text(text(rows()))
    print(f"{len(rows())} files, {published.TABLE.stat().st_size:,} bytes")
