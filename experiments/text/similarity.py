"""How well the similarity of two sentences by published weights agrees with people, without training.

python experiments/text/similarity.py MATERIAL OUT

MATERIAL has data/text and weights/all_minilm_l6_v2. OUT gets similarity.json: Spearman's correlation on the splits dev
and test of STS-B with 95 % intervals by the bootstrap over pairs.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import tl_jax
from experiments.text import prepare
from tl_jax.api.model import score


def main(material: pathlib.Path, out: pathlib.Path) -> None:
    prepare.main(material / "data/text", out / "texts")
    weights, found = material / "weights/all_minilm_l6_v2/model.safetensors", {}
    model = tl_jax.load("minilm_l6", weights, similarity=True)
    for name, split in {"dev": "val", "test": "test"}.items():
        predictions = score(model, f"text:{out / 'texts/stsb'}", split, labels=("score",))
        found[name] = tl_jax.summarize(predictions)["spearman"]
        print(name, found[name])
    (out / "similarity.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/text/similarity.py MATERIAL OUT")
    main(*map(pathlib.Path, sys.argv[1:]))
