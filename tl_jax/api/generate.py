"""Texts that a network of the next token goes on with: greedy, or by nucleus sampling."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from tl_jax.core import checks
from tl_jax.data.text import language
from tl_jax.data.text import tokenizer as tokenizers
from tl_jax.data.text.tokens import LENGTHS, PADDING
from tl_jax.runtime.log import log


def generate(
    model: Any, prompt: str, *, tokens: int = 50, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> str:
    """What a network such as GPT-2 writes behind a prompt, at most `tokens` tokens of it; the same seed, the same text.

    model: as `load` gives it, or a Run. temperature: of the logits; 0 takes the most probable token. top_p: see
    `nucleus`. It ends with the end token of the tokenizer, and, with a line of the log, where the network has no
    further positions. Raises ValueError for a network that does not predict the next token, and values out of range.
    """
    own = getattr(model, "model", model)
    _check(own, tokens, temperature, top_p)
    tokenizer = tokenizers.known(own.card)
    end, most = language.end_of(tokenizer), own.module.positions
    numbers = tokenizer.open().encode(prompt).ids
    numbers = numbers[:-1] if numbers and numbers[-1] == end else numbers  # the text goes on
    if not 0 < len(numbers) < most:
        found = f"the prompt has {len(numbers)} tokens, expected 1 to {most - 1}"
        raise ValueError(f"{found}: {own.name} has {most} positions")
    rng, begin = np.random.default_rng(seed), len(numbers)
    variables = jax.device_put(own.variables)
    while len(numbers) - begin < tokens:
        if len(numbers) == most:
            log(f"stopped after {most - begin} of {tokens} tokens: {own.name} has {most} positions")
            break
        p = nucleus(next_logits(own.module, variables, numbers), temperature, top_p)
        numbers.append(int(rng.choice(len(p), p=p)))
        if numbers[-1] == end:
            break
    return tokenizer.decode(numbers[begin:])


def _check(model: Any, tokens: int, temperature: float, top_p: float) -> None:
    if not getattr(getattr(model, "module", None), "next_token", False):
        name = getattr(model, "name", repr(model))
        raise ValueError(
            f"{name} was not made to predict the next token; expected a network such as gpt2, as `load` gives it"
        )
    ranges = {
        "tokens": (tokens, checks.integer(1, 2**20)),
        "temperature": (temperature, checks.number(0)),
        "top_p": (top_p, checks.number(0, 1, above=True)),
    }
    wrong = [f"{name} = {x!r}: expected {check.expected}" for name, (x, check) in ranges.items() if not check.fits(x)]
    checks.refuse("nothing is generated", wrong)


def next_logits(module: Any, variables: Any, numbers: list[int]) -> np.ndarray:
    """Logits [V] of the token behind these, float64; texts are padded to one of LENGTHS, each a program."""
    length = min(next(length for length in LENGTHS if length >= len(numbers)), module.positions)
    x = np.full((1, length, 2), PADDING, np.int32)
    x[0, :, 1], x[0, : len(numbers), 0] = 0, numbers
    return np.asarray(_last(module.clone(num_classes=0, head=()), variables, x), np.float64)[: module.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _last(module: Any, variables: Any, x: jax.Array) -> jax.Array:
    hidden, _ = module.apply(variables, x, stop=module.cuts[-2])
    last = (x[0, :, 0] >= 0).sum() - 1
    one = jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
    return module.apply(variables, one, method="token_logits")[0, 0].astype(jnp.float32)


def nucleus(logits: np.ndarray, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities [V] of softmax(logits / temperature) in the nucleus, float64 (Holtzman et al. 2020, section 3.1).

    The nucleus is the smallest set of the most probable tokens that holds at least `top_p`; the others have 0. At
    temperature 0 the most probable token has 1.
    """
    if not temperature:
        return np.eye(1, len(logits), int(np.argmax(logits)))[0]
    p = scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-p, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))
    kept = np.zeros_like(p)
    kept[order[:count]] = p[order[:count]]
    return kept / kept.sum()
