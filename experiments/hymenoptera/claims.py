"""The numbers of PyTorch's tutorial on transfer learning."""

from tl_jax.core import files
from tl_jax.studies.ledger import Claim

RUN = ("launch.py", "--config", "configs/hymenoptera.py:weights={material}/weights/deit_tiny_patch16_224/"
       "deit_tiny_patch16_224.safetensors,data=folder:{material}/data/hymenoptera_256")  # fmt: skip
COMMANDS = (
    (*RUN, "--workdir", "{out}/fixed"),
    (*RUN[:-1], f"{RUN[-1]},method=full", "--workdir", "{out}/tuned"),
)
OURS = "DeiT-tiny for 5 epochs, the tutorial ResNet-18 for 25; 153 photos and one run each, so intervals of six points"


def measure(out):
    arms = {"fixed features": "fixed", "fine-tuned": "tuned"}
    rows = {arm: files.read_json(out / folder / "result.json")["metrics"]["accuracy"] for arm, folder in arms.items()}
    return {arm: tuple(100 * row[end] for end in ("value", "low", "high")) for arm, row in rows.items()}


CLAIMS = (
    Claim("tutorial", "PyTorch, Transfer Learning for Computer Vision Tutorial",
          "On ants and bees fixed features reach 96.1 %, fine-tuning 94.7 %.",
          {"fixed features": 96.1, "fine-tuned": 94.7}, 0.0, OURS, COMMANDS,
          ("weights/deit_tiny_patch16_224", "data/hymenoptera_256"), measure, (("fixed features", "fine-tuned"),)),
)  # fmt: skip
