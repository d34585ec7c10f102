"""A network as an ONNX file, by jax2onnx, which is compared with the network itself before anybody gets it."""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from tl_jax.api.model import Model
from tl_jax.core.checks import refuse
from tl_jax.models.kernels import convolve
from tl_jax.serving import program

CLOSE = 1e-4  # of the largest value
INSTALL = "pip install --no-deps -r requirements-onnx.txt"


def write(network: Model, path: pathlib.Path, inputs: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
    """Writes `network.answer` with its weights as constants; input "inputs" [B, *card.shape], outputs by their names.

    inputs, outputs: an example, and what the network answers. Raises ValueError where jax2onnx is missing, or cannot
    convert the network, or where ONNX Runtime answers otherwise: jax2onnx 0.17 has silently written wrong files.
    """
    check_installed()
    with _quiet():
        import onnxruntime
        from jax2onnx import to_onnx

        network = dataclasses.replace(network, module=network.module.clone(attention="xla"))
        length = ("T",) if network.card.input == "text" else ()  # of the tokens
        shape = jax.ShapeDtypeStruct(("B", *length, *inputs.shape[1 + len(length) :]), inputs.dtype)
        names = sorted(outputs)
        try:
            with convolve.traced_for("onnx"), jax.numpy_rank_promotion("allow"):  # jax2onnx adds biases so
                found = to_onnx(
                    lambda x: tuple(network.answer(network.variables, x)[name] for name in names), [shape],
                    input_names=["inputs"], output_names=names, model_name=network.card.model,
                )  # fmt: skip
        except Exception as error:  # of any kind: a plugin of jax2onnx meets what it does not expect
            raise ValueError(f"jax2onnx cannot convert {network.card.model}: {type(error).__name__} {error}") from error
        path.write_bytes(found.SerializeToString())
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        answers = dict(zip(names, session.run(names, {"inputs": inputs}), strict=True))
    wrong = program.differences(answers, outputs, CLOSE)
    refuse(f"ONNX Runtime answers otherwise than {network.card.model} itself: no ONNX file of it is written", wrong)


def check_installed() -> None:
    """Raises ValueError where a package is missing."""
    try:
        with _quiet():
            import jax2onnx  # noqa: F401
            import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(f"an ONNX file needs jax2onnx and onnxruntime ({error}): {INSTALL}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx logs the examples that it cannot import, and onnx-ir what it leaves out."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
