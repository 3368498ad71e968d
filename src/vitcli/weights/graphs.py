"""Models as graphs that other programs run: ONNX files, and programs of torch.export.

Both take images (batch, 3, H, W), normalised as the file's description says, of any batch size, and return logits (batch, K).
The description is one JSON object named `vit`, in ONNX's metadata and among the extra files of a program: class names,
preprocessing, the model section.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcli.errors import CheckpointError
from vitcli.models import Model

__all__ = ["OPSET", "open_onnx", "open_program", "require_onnx", "write_onnx", "write_program"]

OPSET = 20  # the first with GELU as one operator; onnxruntime has it since 1.17
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
KEY = "vit"

Logits = Callable[[Tensor], Tensor]


def require_onnx() -> None:
    """Raise CheckpointError if a package that ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"ONNX files need {' and '.join(missing)}; install with: pip install 'vitcli[onnx]'")


def write_program(path: Path, model: Model, *, about: Mapping[str, Any]) -> None:
    """Write a model in evaluation mode as a program of torch.export (.pt2), for any batch size."""
    archive = io.BytesIO()  # torch's zip writer takes the whole process along when the disk is full
    with quietly():
        torch.export.save(export(model), archive, extra_files={KEY: json.dumps(about)})
    path.write_bytes(archive.getbuffer())


def open_program(path: Path) -> tuple[Logits, dict[str, Any]]:
    """Return what a program computes, and its description. torch unpickles parts of such files: open only your own."""
    extra = {KEY: ""}  # torch leaves an empty dict empty
    with quietly():
        module = torch.export.load(path, extra_files=extra).module()
    return module, json.loads(extra[KEY])


def write_onnx(path: Path, model: Model, *, about: Mapping[str, Any]) -> None:
    """Write a model in evaluation mode as ONNX, for any batch size; beyond 1.5 GiB the weights go to `path`.data."""
    require_onnx()
    with quietly(), sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            export(model), input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False, dynamo=True
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of this machine's source files
    program.model.metadata_props.clear()
    program.model.metadata_props[KEY] = json.dumps(about)
    program.save(path)


def open_onnx(path: Path) -> tuple[Logits, dict[str, Any]]:
    """Return what onnxruntime computes on the CPU from an ONNX file, and the file's description."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: what it thinks of this machine's GPUs is of no use here
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return logits, json.loads(session.get_modelmeta().custom_metadata_map[KEY])


def export(model: Model) -> torch.export.ExportedProgram:
    """Trace a model in evaluation mode with a batch size that stays open."""
    assert not model.training
    example = torch.zeros(2, 3, *model.image_size)  # a batch of 1 would stay 1
    # Other attention kernels return heads last; a graph traced on that would fail where a runtime's do not. Only the tracing is
    # told: what runs the graph takes the kernel it likes.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this machine's source files
    return program


@contextmanager
def quietly() -> Iterator[None]:
    """Keep from the user what torch's exporters tell their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
