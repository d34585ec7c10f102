"""Published results on texts."""

import json

from tl_jax.studies.ledger import Claim


def spearman(out):
    """Spearman's correlation in percent, without an interval: the pairs and weights are those of the paper."""
    found = json.loads((out / "similarity.json").read_text())
    return {split: (100 * found[split]["value"],) * 3 for split in ("dev", "test")}


CLAIMS = (
    Claim(
        "minilm_sts", "Sentence-Transformers, table of pretrained models; Reimers & Gurevych 2019 for the protocol",
        "all-MiniLM-L6-v2 on STS-B: Spearman's correlation 82.03 on test; 86.72 on dev by its authors' code.",
        {"dev": 86.72, "test": 82.03}, 0.05, "", ("experiments/text/similarity.py", "{material}", "{out}"),
        ("data/text", "weights/all_minilm_l6_v2"), spearman,
    ),
)  # fmt: skip
