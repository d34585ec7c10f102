"""Published results on texts."""

import json

from tl_jax.studies.ledger import Claim


def spearman(out):
    """Spearman's correlation in percent, without an interval: the pairs and weights are those of the paper."""
    return {"test": (100 * json.loads((out / "similarity.json").read_text())["test"]["value"],) * 3}


CLAIMS = (
    Claim(
        "minilm_sts", "Sentence-Transformers, table of pretrained models; Reimers & Gurevych 2019 for the protocol",
        "all-MiniLM-L6-v2 on STS-B's test pairs: Spearman's correlation 82.03.",
        {"test": 82.03}, 0.05, "", (("experiments/text/similarity.py", "{material}", "{out}"),),
        ("data/text", "weights/all_minilm_l6_v2"), spearman,
    ),
)  # fmt: skip
