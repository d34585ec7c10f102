"""Makes the embedded weights of text: word vectors of what numpy, scipy and scikit-learn say of themselves.

python experiments/docstring_vectors/make.py --out W
    then W holds model.safetensors and tokenizer.json as they lie in tl_jax/assets/docstrings; one minute

Counts of neighbouring words, positive pointwise mutual information, truncated SVD (Levy et al. 2015, TACL 3, sections
2.2 and 3). Each vector is multiplied by a / (a + share of the word), so that the mean over a text gives frequent words
little weight (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings", algorithm 1), and
shifted and scaled so that the means over the texts have mean 0 and deviation 1. No docstring of the source
`docstrings` is read.
"""

import pathlib
import sys

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tl_jax import models  # noqa: E402
from tl_jax.data.readers.docstrings import further_texts  # noqa: E402
from tl_jax.data.text import tokenizer  # noqa: E402
from tl_jax.weights import formats, load, text_inputs  # noqa: E402

OUT = flags.DEFINE_string("out", None, "The folder to write to.", required=True)
NAME, WORDS, WIDTH = "word_average_64d", 5000, 64
WINDOW = 8  # words; one that is d words away counts 1 / d
SMOOTHING = 0.75  # exponent of the counts of the neighbours
RARE = 1e-3  # a of the weights


def vectors(numbers: np.ndarray, starts: np.ndarray, words: int) -> np.ndarray:
    """[words, WIDTH], of texts `numbers[starts[i]:starts[i + 1]]`; zeros for word 0, which stands for all unknown."""
    text = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    counts = scipy.sparse.csr_matrix((words, words))
    for distance in range(1, WINDOW):
        left, right = numbers[:-distance], numbers[distance:]
        near = (text[:-distance] == text[distance:]) & (left > 0) & (right > 0)
        weight = np.full(near.sum(), 1 / distance)
        counts = counts + scipy.sparse.coo_matrix((weight, (left[near], right[near])), (words, words)).tocsr()
    counts = (counts + counts.T).tocoo()
    own = np.asarray(counts.sum(axis=1)).ravel()
    context = own**SMOOTHING / (own**SMOOTHING).sum()
    information = np.log(counts.data / (own[counts.row] * context[counts.col]))
    keep = information > 0
    matrix = scipy.sparse.csr_matrix((information[keep], (counts.row[keep], counts.col[keep])), counts.shape)
    left, values, _ = scipy.sparse.linalg.svds(matrix, WIDTH, rng=np.random.default_rng(0))
    found = left * np.sqrt(values)
    found *= np.sign(found.sum(axis=0))  # of a pair of singular vectors the sign is free
    share = np.bincount(numbers, minlength=words) / len(numbers)
    found *= (RARE / (RARE + share))[:, None]
    means = np.add.reduceat(found[numbers], starts[:-1]) / np.diff(starts)[:, None]
    found = (found - means.mean(axis=0)) / means.std(axis=0)
    found[0] = 0
    return found


def main(_):
    texts = further_texts()
    words = tokenizer.of_words(tokenizer.frequent("words", texts, lowercase=True)[: WORDS - 1])
    tokens = words.encode([(text,) for text in texts], 2**20)
    own = tokens.counts > 0
    starts = np.concatenate([[0], tokens.counts[own].cumsum()])
    table = vectors(tokens.flat[:, 0], starts, words.size)
    folder = pathlib.Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    card = models.get(NAME).card.replace(
        num_classes=0, vocab=words.size, tokenizer=words.sha256, source="docstrings of numpy, scipy, scikit-learn",
        licence="BSD-3-Clause",
    )  # fmt: skip
    leaves = {text_inputs.TABLE.removeprefix("params/"): table}
    formats.write(folder / "model.safetensors", {f"params/{path}": x.astype(np.float16) for path, x in leaves.items()},
                  {load.CARD_KEY: card.to_json()})  # fmt: skip
    words.save(folder)
    print(f"{len(texts):,} texts, {len(tokens.flat):,} words, {words.size:,} of them known: {folder}")


if __name__ == "__main__":
    app.run(main)
