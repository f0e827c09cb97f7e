"""Files of `torch.export.save`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

METADATA = "metadata.json"
_NAMESPACES = ("aten", "higher_order", "prim", "prims")


def torch_export_bytes(program: ExportedProgram, description: Mapping[str, Any]) -> bytes:
    """The program, and its description beside it.

    Raises:
        ValueError: It has operators that are not PyTorch's own.
    """
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    operators = {node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)}
    foreign = sorted(str(operator) for operator in operators if operator.namespace not in _NAMESPACES)
    if foreign:
        raise ValueError(f"export: a program must have PyTorch's own operators only, this model has {foreign}")
    for node in nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    program.example_inputs = None  # a batch of zeros, as large as pictures are
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(description)})
    return buffer.getvalue()
