"""Where a step's time goes, from PyTorch's profiler: seconds by family of operations, launches."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.records import Profile
from benchmarks.workload import Implementation

DEPTHWISE, CONVOLUTION, NORM, EXCITE = (
    "depthwise convolution",
    "other convolutions",
    "batch norm, activation",
    "squeeze-excite",
)
FUSION, LABELS, LOSS, OPTIMIZER, GENERATED, REST = "fusion", "labels", "loss", "optimizer", "generated code", "rest"
FAMILIES = (DEPTHWISE, CONVOLUTION, NORM, EXCITE, FUSION, LABELS, LOSS, OPTIMIZER, GENERATED, REST)

# By the beginning of an operator's name.
NAMES = {
    "effdet_fast::depthwise": DEPTHWISE,
    "effdet_fast::batch_norm": NORM,
    "effdet_fast::squeeze_excite": EXCITE,
    "effdet_fast::fusion": FUSION,
    "effdet_fast::match_anchors": LABELS,
    "effdet_fast::detection_loss": LOSS,
    "effdet_fast::focal_loss": LOSS,
    "aten::native_batch_norm": NORM,
    "aten::cudnn_batch_norm": NORM,
    "aten::silu": NORM,
    "aten::relu": NORM,
    "aten::hardtanh": NORM,
    "aten::threshold_backward": NORM,
    "aten::upsample_nearest2d": FUSION,
    "aten::_foreach": OPTIMIZER,
    "aten::_fused": OPTIMIZER,
    "Optimizer.": OPTIMIZER,
    "## Call CompiledFxGraph": GENERATED,
    "Torch-Compiled Region": GENERATED,
    "CompiledFunction": GENERATED,
    "triton_": GENERATED,
}
# Modules of effdet, timm and torchvision whose operators have names that say nothing.
MODULES = {
    "BatchNormAct2d": NORM,
    "BatchNorm2d": NORM,
    "FrozenBatchNorm2d": NORM,
    "SqueezeExcite": EXCITE,
    "FpnCombine": FUSION,
    "DetectionLoss": LOSS,
}
CONVOLUTIONS = ("conv", "addmm", "mm")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
SCOPE = "family: "


def profile_of(implementation: Implementation, device: torch.device) -> Profile:
    """Of a step of an implementation that has taken some."""
    assert implementation.step is not None, f"{implementation.name} has no step"
    with implementation.scopes():
        return profile_step(implementation.step, device)


def profile_step(step: Callable[[], Any], device: torch.device) -> Profile:
    """Runs a step under the profiler, which makes it slower: times are shares, not durations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events()
    return Profile(_launches(events, device), _seconds(events, device))


@contextlib.contextmanager
def scopes(model: nn.Module, methods: tuple[tuple[Any, str, str], ...] = ()) -> Iterator[None]:
    """Inside, what a peer's known modules do is told apart by where it runs, as are methods given as (object, name, family)."""
    handles, open_scopes = [], []

    def enter(module: nn.Module, *_: Any) -> None:
        open_scopes.append(record_function(SCOPE + MODULES[type(module).__name__]))
        open_scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    for module in model.modules():
        if type(module).__name__ in MODULES:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    for owner, name, family in methods:
        # Not as an attribute of a module, which would refuse a plain function of that name.
        object.__setattr__(owner, name, record_function(SCOPE + family)(getattr(owner, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, name, _ in methods:
            object.__delattr__(owner, name)


def _seconds(events: Any, device: torch.device) -> dict[str, float]:
    """On a GPU the time of the kernels an operator launched, else of the operator itself; without what it called."""
    on_gpu = device.type == "cuda"
    family_of_node: dict[int, str | None] = {}
    for event in sorted(filter(_is_operator, events), key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0:
            family_of_node[event.sequence_nr] = _scope(event)  # the last operator with this number made the node
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time and event.device_type == torch.autograd.DeviceType.CPU:
            seconds[_family(event, family_of_node)] += time / 1e6
    return {family: seconds[family] for family in FAMILIES if family in seconds}


def _family(event: Any, family_of_node: dict[int, str | None]) -> str:
    for ancestor in _and_ancestors(event):
        operator = ancestor.name.partition("::")[2].removeprefix("_").removeprefix("slow_").removeprefix("thnn_")
        if ancestor.name.startswith("aten::") and operator.removeprefix("mkldnn_").startswith(CONVOLUTIONS):
            return DEPTHWISE if _is_depthwise(ancestor.input_shapes) else CONVOLUTION
        if ancestor.name.startswith(SCOPE):
            return ancestor.name.removeprefix(SCOPE)
        for beginning, family in NAMES.items():
            if ancestor.name.startswith(beginning):
                return family
        if ancestor.name.startswith("autograd::engine") and (scope := family_of_node.get(ancestor.sequence_nr)):
            return scope
    return REST


def _scope(event: Any) -> str | None:
    names = (ancestor.name for ancestor in _and_ancestors(event))
    return next((name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)), None)


def _is_depthwise(shapes: list[list[int]]) -> bool:
    """Whether one of the first three tensors is a filter [C, 1, k, k]."""
    return any(len(shape) == 4 and shape[1] == 1 and shape[0] > 1 and shape[2] > 1 for shape in shapes[1:3])


def _and_ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _launches(events: Any, device: torch.device) -> int:
    """Kernels, copies and graphs that the host launched; on a CPU, operators it called that no other operator called."""
    if device.type == "cuda":
        return sum(event.name.startswith(LAUNCHES) for event in events)
    return sum(_is_operator(event) and not any(map(_is_operator, _and_ancestors(event.cpu_parent))) for event in events)


def _is_operator(event: Any) -> bool:
    return event.name.startswith(("aten::", "effdet_fast::"))
