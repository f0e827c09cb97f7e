"""What this installation consists of, whether each op works on each backend, and what to do about what is missing."""

import contextlib
import importlib.util
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdet_fast import _libraries, ops
from effdet_fast._build_info import covers, sources_hash
from effdet_fast._libraries import REBUILD, REBUILD_CUDA
from effdet_fast.version import __version__


@dataclass
class Finding:
    """One line of the report. `remedy` says in one line what to do; `failed` makes the whole report fail."""

    name: str
    value: str
    remedy: str | None = None
    failed: bool = False


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(finding.failed for finding in self.findings)

    def add(self, name: str, value: str, remedy: str | None = None, failed: bool = False) -> None:
        self.findings.append(Finding(name, value, remedy, failed))


def diagnose() -> Report:
    """Looks at versions, at what was built, and runs each op on each backend present against its reference."""
    report = Report()
    report.add("effdet_fast", __version__)
    report.add("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    report.add("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    _add_packages(report)
    _add_toolchain(report)
    _add_gpus(report)
    _add_build(report)
    for device in _devices():
        _add_self_tests(report, device)
    return report


def _add_packages(report: Report) -> None:
    for package in ("numpy", "pycocotools", "pillow", "tqdm"):
        try:
            report.add(package, version(package))
        except PackageNotFoundError:
            report.add(package, "missing", f"pip install {package}", failed=True)
    if importlib.util.find_spec("matplotlib") is None:
        report.add("matplotlib", "not installed (only for curves)", "pip install matplotlib")


def _add_toolchain(report: Report) -> None:
    compiler = _first_line("c++", "--version")
    remedy = "install a C++20 compiler (g++ >= 10 or clang >= 12) to build the kernels from source"
    report.add("C++ compiler", compiler or "not found", None if compiler else remedy)
    nvcc = next((line for line in _output("nvcc", "--version").splitlines() if "release" in line), "")
    remedy = "to build CUDA kernels, install the CUDA toolkit of torch's major version, or set CUDA_HOME"
    report.add("nvcc", nvcc.strip() or "not on PATH", remedy if not nvcc and torch.version.cuda else None)


def _add_gpus(report: Report) -> None:
    if not torch.cuda.is_available():
        report.add(
            "GPU",
            "none visible",
            "on a machine with an NVIDIA GPU: see that nvidia-smi works and torch is a CUDA build",
        )
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        report.add(f"GPU {i}", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")


def _add_build(report: Report) -> None:
    """The libraries of kernels: what is loaded, what is missing, and whether they fit the GPUs and the sources beside them."""
    info, gpu = _libraries.build_info(), torch.cuda.is_available()
    if cpu := info["cpu"]:
        report.add("CPU kernels", f"{cpu['cpu_levels']} ({cpu['cpu_level']} chosen on this processor), {_origin(cpu)}")
    else:
        report.add("CPU kernels", f"not loaded: {_libraries.missing['cpu']}", REBUILD, failed=True)
    if cuda := info["cuda"]:
        report.add("CUDA kernels", f"CUDA {cuda['cuda']} ({cuda['cuda_archs']}), {_origin(cuda)}")
        for i in range(torch.cuda.device_count() if gpu else 0):
            capability = torch.cuda.get_device_capability(i)
            if not covers(cuda["cuda_archs"], capability):
                arch = "{}.{}".format(*capability)
                remedy = f"with TORCH_CUDA_ARCH_LIST={arch}, {REBUILD}"
                value = f"kernels built for {cuda['cuda_archs']}, not for this GPU's sm_{arch}"
                report.add(f"GPU {i}", value, remedy, failed=True)
    else:
        reason = f"not loaded: {_libraries.missing['cuda']}"
        report.add("CUDA kernels", reason, REBUILD_CUDA if gpu else None, failed=gpu)
    checkout = Path(__file__).resolve().parents[1]
    built_from = {library["sources"] for library in info.values() if library}
    if built_from and (checkout / "csrc").is_dir() and built_from != {sources_hash(checkout)}:
        report.add("sources", "changed since the kernels were built", REBUILD)
    if helpers := _libraries.helpers():
        report.add("processor", " ".join(helpers.processor_features()))
    else:
        report.add("processor", "not asked: effdet_fast._C was not built for this Python (optional)")


def _origin(info: dict[str, Any]) -> str:
    return f"by {info['compiler']}, against torch {info['torch']}, sources {info['sources']}"


def _devices() -> list[torch.device]:
    native = _libraries.native_device_types()
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [torch.device(name) for name in names if name in native]


def _add_self_tests(report: Report, device: torch.device) -> None:
    for name, check in SELF_TESTS.items():
        try:
            with convolutions(tf32=False):
                error = check(device)
            failed = not error <= 1e-4
            report.add(
                f"{name} on {device.type}",
                f"differs from its reference by {error:.1e}" if failed else "ok",
                failed=failed,
            )
        except Exception as error:  # the report must list every op, whatever went wrong in one
            report.add(f"{name} on {device.type}", f"{type(error).__name__}: {error}", REBUILD, failed=True)


@contextlib.contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    """cuDNN's convolutions of float32 round their inputs to TF32, 10 bits, as they do unless told otherwise; or do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _difference(function: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Largest difference between an op and its reference, of the result and of the gradients of all inputs."""

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        weight = torch.linspace(0.5, 1.5, y.numel(), device=y.device).view(y.shape)
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]

    ours = run()
    with ops.use_reference():
        expected = run()
    return max(float((mine - other).abs().max()) for mine, other in zip(ours, expected, strict=True))


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _check_focal_loss(device: torch.device) -> float:
    labels = (torch.arange(41) % 11 - 2).to(device)  # 41 * 9 logits: the last vector is not full
    return _difference(lambda x: ops.sigmoid_focal_loss(x, labels, reduction="sum"), _random(device, 41, 9))


def _check_detection_loss(device: torch.device) -> float:
    levels = [(4, 8), (3, 3)]
    labels = (torch.arange(2 * 82) % 11 - 2).view(2, 82).to(device)  # vectors of logits straddle the 9 classes
    codes, positives = _random(device, 2, 82, 4), (labels >= 0).sum(1).float()
    corners = _random(device, 82, 2).abs() * 20
    anchors = torch.cat([corners, corners + 9], 1)

    def worst(memory_format: torch.memory_format, **options: Any) -> float:
        def loss(*outputs: Tensor) -> Tensor:
            targets = (labels, codes, positives)
            total, cls, box = ops.detection_loss(outputs[:2], outputs[2:], *targets, num_classes=9, **options)
            return total + cls + box

        outputs = [_random(device, 2, 2 * values, *size) for values in (9, 4) for size in levels]
        return _difference(loss, *(x.contiguous(memory_format=memory_format) for x in outputs))

    per_image = {"box_loss": "giou", "anchors": anchors, "normalizer": "per_image", "box_loss_weight": 2.0}
    formats = (torch.contiguous_format, torch.channels_last)
    return max(worst(memory_format, **options) for memory_format in formats for options in ({}, per_image))


def _check_fusion(device: torch.device) -> float:
    def fuse(a: Tensor, b: Tensor, c: Tensor, weights: Tensor) -> Tensor:
        return ops.weighted_fusion([a, b, c], weights, resample=["none", "nearest", "max_pool"], activation="silu")

    shapes = ((2, 8, 6, 6), (2, 8, 3, 3), (2, 8, 12, 12))
    return _difference(
        fuse, *(_random(device, *shape) for shape in shapes), torch.tensor([0.7, 0.2, 1.1], device=device)
    )


def _check_depthwise(device: torch.device) -> float:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x, weight, stride=2, padding="same", prologue="silu")

    x = _random(device, 2, 16, 9, 9)
    return max(
        _difference(convolve, x.to(memory_format=memory_format), _random(device, 16, 1, 5, 5))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )


def _check_depthwise_levels(device: torch.device) -> float:
    def convolve(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ys = ops.depthwise_conv2d_levels([a, b, c], weight, bias, padding="same")
        return torch.cat([y.flatten() for y in ys])

    def worst(memory_format: torch.memory_format) -> float:
        sizes = ((9, 7), (4, 4), (1, 2))
        maps = [_random(device, 2, 10, *size).contiguous(memory_format=memory_format) for size in sizes]
        return _difference(convolve, *maps, _random(device, 10, 1, 3, 3), _random(device, 10))

    return max(worst(memory_format) for memory_format in (torch.contiguous_format, torch.channels_last))


def _check_nms(device: torch.device) -> float:
    n = 1200  # more than a block takes alone
    corners = _random(device, 2, n, 2).abs() * 100
    corners[1] *= 100  # of this image nearly all boxes stay
    boxes = torch.cat([corners, corners + 25], dim=-1)
    scores, labels = _random(device, 2, n), (torch.arange(n) % 3 * (torch.arange(2) == 0)[:, None]).to(device)

    def kept() -> list[Tensor]:
        few = ops.batched_nms(boxes[0, :200], scores[0, :200], labels[0, :200], 0.5)
        return [
            few,
            *(ops.batched_nms_padded(boxes, scores, labels, 0.5, max_detections=k).indices for k in (700, 1060)),
        ]

    ours = kept()
    with ops.use_reference():
        return float(not all(map(torch.equal, ours, kept())))


def _check_soft_nms(device: torch.device) -> float:
    corners = _random(device, 200, 2).abs() * 40
    boxes, scores = torch.cat([corners, corners + 25], dim=-1), (torch.arange(200, device=device) * 37 % 200 + 1) / 200
    idxs = torch.arange(200, device=device) % 3

    def found() -> tuple[Tensor, ...]:
        linear = ops.soft_nms(boxes, scores, idxs, method="linear")
        return *linear, ops.soft_nms(boxes, scores, idxs, score_threshold=0.05)[0]

    ours = found()
    with ops.use_reference():
        return float(not all(map(torch.equal, ours, found())))


def _check_anchor_matching(device: torch.device) -> float:
    corners = _random(device, 300, 2).abs() * 40
    anchors = torch.cat([corners, corners + 25], dim=-1)
    boxes = anchors[:120].view(3, 40, 4) + _random(device, 3, 40, 4)
    labels = (torch.arange(120, device=device) % 5 - 1).view(3, 40)
    anchors = anchors[:-20]  # 280: the last warp is not full

    def targets() -> list[Tensor]:
        low_quality = ops.match_anchors(
            anchors, boxes, labels, neg_iou=0.4, force_match=False, allow_low_quality_matches=True
        )
        return [*ops.match_anchors(anchors, boxes, labels), *low_quality]

    ours = targets()
    with ops.use_reference():
        expected = targets()
    return max(float((mine - other).abs().max()) for mine, other in zip(ours, expected, strict=True))


def _check_batch_norm(device: torch.device) -> float:
    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.batch_norm_act(x, None, None, weight, bias, training=True, activation="silu")

    x = _random(device, 3, 40, 7, 8) * 2 + 3
    return max(
        _difference(normalise, x.to(memory_format=memory_format), _random(device, 40), _random(device, 40))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )


def _check_decode_detections(device: torch.device) -> float:
    sizes = ((5, 5), (3, 3))
    cls_outputs = [(_random(device, 2, 8, h, w) * 4).round() / 4 for h, w in sizes]  # some are equal
    box_outputs = [_random(device, 2, 8, h, w) * 0.3 for h, w in sizes]
    corners = _random(device, 68, 2).abs() * 40
    anchors = torch.cat([corners, corners + 25], dim=-1)

    def found() -> list[Tensor]:
        detections = ops.decode_detections(
            cls_outputs, box_outputs, anchors, num_classes=4, max_candidates=90, max_detections=90
        )
        return [detections.labels, detections.indices]

    ours = found()
    with ops.use_reference():
        return float(not all(map(torch.equal, ours, found())))


def _check_squeeze_excite(device: torch.device) -> float:
    def excite(x: Tensor, *weights: Tensor) -> Tensor:
        return ops.squeeze_excite(x, *weights)

    # Several parts of an image and of a plane. Small values, as the gradients of the weights are sums over all pixels.
    shapes = ((10, 40, 1, 1), (10,), (40, 10, 1, 1), (40,))
    weights, x = [_random(device, *shape) for shape in shapes], 0.02 * (_random(device, 2, 40, 44, 48) + 0.5)
    return max(
        _difference(excite, x.contiguous(memory_format=memory_format), *weights)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )


SELF_TESTS: dict[str, Callable[[torch.device], float]] = {
    "sigmoid_focal_loss": _check_focal_loss,
    "detection_loss": _check_detection_loss,
    "weighted_fusion": _check_fusion,
    "depthwise_conv2d": _check_depthwise,
    "depthwise_conv2d_levels": _check_depthwise_levels,
    "batched_nms_padded": _check_nms,
    "soft_nms": _check_soft_nms,
    "match_anchors": _check_anchor_matching,
    "batch_norm_act": _check_batch_norm,
    "decode_detections": _check_decode_detections,
    "squeeze_excite": _check_squeeze_excite,
}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first_line(*command: str) -> str:
    return _output(*command).partition("\n")[0]
