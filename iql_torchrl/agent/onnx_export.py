"""Translation of a traced policy to ONNX, for runtimes other than torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from iql_torchrl.descriptions import one_line

__all__ = [
    "ONNX_PACKAGES",
    "ONNX_SUFFIX",
    "ONNX_TOLERANCE",
    "check_onnx_packages",
    "onnx_function",
    "to_onnx",
]

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_SUFFIX = ".onnx"
ONNX_TOLERANCE = 1e-5
REASON = 300  # characters of another library's message that are repeated


def check_onnx_packages() -> None:
    """Raise ``ImportError`` naming what to install, unless all of ``ONNX_PACKAGES`` are there."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ImportError(
            f"an ONNX program is written with {', '.join(ONNX_PACKAGES)}, and {', '.join(missing)} "
            'cannot be found; install them with pip install "iql_torchrl[onnx]", or write a .pt2 file.'
        )


def to_onnx(program: ExportedProgram, inputs: Sequence[str], policy: str) -> bytes:
    """``program`` as an ONNX file's content; ``inputs`` are named, and its output ``action``.

    The first dimension of each input is ``batch``. ONNX has no assertions: the program's checks of
    values are left out.

    Raises ``RuntimeError`` naming ``policy`` (a class) where ONNX has no such operation.
    """
    try:
        with _quiet_exporter():
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=["action"],
            )
        model = translated.model_proto
        for node in (n for part in (model.graph, *model.functions) for n in part.node):
            del node.metadata_props[
                :
            ]  # where torch and onnxscript made each node: half of the file
        del model.graph.value_info[:]
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        content: bytes = model.SerializeToString()
    except Exception as error:  # its kinds differ between versions of torch and onnxscript
        raise RuntimeError(
            f"this {policy} cannot be translated to ONNX ({_reason(error)}); write a .pt2 file, which "
            "torch runs."
        ) from error
    return content


def onnx_function(content: bytes, policy: str) -> Callable[..., Tensor]:
    """The function that onnxruntime computes from an ONNX file's content, on one CPU thread.

    Raises ``RuntimeError`` naming ``policy`` where onnxruntime lacks an operation for a dtype.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime derives its errors from Exception
        raise RuntimeError(
            f"this {policy} was translated to ONNX, but onnxruntime {onnxruntime.__version__} cannot "
            f"run it ({_reason(error)}); write a .pt2 file, or train it on float32 data."
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        values = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        (action,) = session.run(None, values)
        return torch.from_numpy(action)

    return run


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """A context without the exporter's remarks on torch's own code and on absent torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The message of the first cause in one line: the exporter's own has steps of the translation."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = one_line(error) or type(error).__name__
    return text if len(text) <= REASON else f"{text[:REASON]} ..."
