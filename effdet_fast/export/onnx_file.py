"""ONNX files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from effdet_fast.export.description import as_texts
from effdet_fast.export.onnx_operators import onnx_translations
from effdet_fast.version import __version__

OPSET = 18


def check_packages() -> None:
    """Raises a ValueError if what PyTorch needs to write ONNX is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ValueError("export: format onnx needs `pip install effdet_fast[onnx]`")


def translated(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> torch.onnx.ONNXProgram:
    """A program in ONNX's standard operators, with these names of its inputs and outputs.

    Raises:
        ValueError: It has operators that ONNX has not.
    """
    try:
        onnx_program = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=[{0: "batch" if name == inputs[0] else None} for name in inputs],  # names all their axes 0
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"export: ONNX's operators do not suffice for this model: {cause}") from error
    assert onnx_program is not None
    model = onnx_program.model
    foreign = sorted({str(node.op_identifier()) for node in model.graph.all_nodes() if node.domain})
    if foreign or model.functions:
        raise ValueError(f"export: an ONNX file must have standard operators only, this model has {foreign}")
    return onnx_program


def onnx_bytes(program: ExportedProgram, description: Mapping[str, Any]) -> bytes:
    """The program as an ONNX file, weights included; its description as the model's `metadata_props`.

    Raises:
        ValueError: It has operators that ONNX has not.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    outputs = description["outputs"]
    onnx_program = translated(program, ["images"], list(outputs))
    model = onnx_program.model
    ClearMetadataAndDocStringPass()(model)  # of every node where in this machine's files it comes from
    model.metadata_props.update(as_texts(description))
    model.producer_name, model.producer_version = "effdet_fast", __version__
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, text in zip(values, (description["input"], *outputs.values()), strict=True):
        value.metadata_props.clear()
        value.doc_string = text
    return onnx_program.model_proto.SerializeToString()
