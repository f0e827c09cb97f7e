"""A training step of a whole model: forward, labels, loss, backward, optimizer; peers with and without `accelerate`."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdet_fast
from benchmarks.step_profile import LABELS, LOSS, scopes
from benchmarks.workload import CHANNELS_LAST, OURS, STEP, Case, Implementation, Workload, compiled, optional
from effdet_fast import ops
from effdet_fast.checkpoints.convert import convert_state_dict
from effdet_fast.training import GraphedStep
from effdet_fast.training.graphed_step import WARMUP_STEPS

OP = "training_step"
SIZE, OBJECTS = 512, 20
CLASSES = 1000  # of ImageNet
LEARNING_RATE = 1e-4
# The biases before a BatchNorm have no gradient but round-off. Two values of a max-pool window may be nearly equal: then
# round-off says which of them gets the gradient, and moves the whole. D0's was off by 2e-5 to 3e-3 in eight trials, with
# PyTorch's operators as with ours, and by 1e-5 without max-pools.
GRADIENT_TOLERANCE = 1e-2
GRAPHED = f"{OURS}, graphed"


def cases(device_type: str) -> list[Case]:
    gpu = device_type == "cuda"
    # bfloat16 is autocast's, and in the timed step only: the gradients of a new model would be mostly round-off in it.
    dtypes = (torch.float32, torch.bfloat16) if gpu else (torch.float32,)
    shapes = (
        (efficientdet, "", "efficientdet_d0", 16 if gpu else 4, SIZE),
        (retinanet, "", f"retinanet_resnet{50 if gpu else 18}_fpn", 8 if gpu else 2, SIZE),
        (classifier, "accelerate on timm's ", "efficientnet_b0", 64 if gpu else 8, 224),
    )
    return [
        Case(
            f"{what}{name}, {batch} x {size}^2",
            partial(build, name=name, batch=batch, size=size),
            layouts=(CHANNELS_LAST,),
            dtypes=dtypes,
            convolves=True,
        )
        for build, what, name, batch, size in shapes
    ]


def efficientdet(
    device: torch.device, dtype: torch.dtype, layout: str, *, name: str, batch: int, size: int
) -> Workload:
    """Beside effdet's model in its own bench. Drop-path is off: it is random."""
    model = effdet_fast.create_model(name, 90, image_size=(size, size), drop_path_rate=0.0)
    images, boxes, labels = data(model, batch, size, device)
    absent: dict[str, str] = {}
    peers = []
    if effdet := optional("effdet", absent):
        config = effdet.get_efficientdet_config(f"tf_{name}")
        config.image_size = (size, size)
        config.backbone_args = {"drop_path_rate": 0.0}
        sizes = torch.full((batch, 2), float(size), device=device)
        target = {
            "bbox": boxes[..., [1, 0, 3, 2]],
            "cls": labels + 1.0,
            "img_scale": sizes[:, 0] / size,
            "img_size": sizes,
        }

        def bench() -> nn.Module:
            peer = effdet.EfficientDet(config, pretrained_backbone=False)
            peer.load_state_dict(model.state_dict())
            return effdet.DetBenchTrain(peer)

        def labeler(bench: Any) -> tuple[Any, str, str]:
            return bench.anchor_labeler, "batch_label_anchors", LABELS

        def loss(bench: nn.Module) -> Tensor:
            return bench(images, target)["loss"]

        peers = variants("effdet", bench, loss, images.device, dtype, compile=True, method=labeler)
    return workload(model, images, boxes, labels, dtype, peers, absent)


def retinanet(device: torch.device, dtype: torch.dtype, layout: str, *, name: str, batch: int, size: int) -> Workload:
    """Beside torchvision's model, which is given images that its transform leaves as they are."""
    model = effdet_fast.create_model(name, 91, image_size=(size, size))
    images, boxes, labels = data(model, batch, size, device)
    absent: dict[str, str] = {}
    peers = []
    if optional("torchvision", absent):
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        from torchvision.models.detection.retinanet import RetinaNet
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        weights = convert_state_dict(model.state_dict(), "torchvision", model=model.config).state_dict
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]

        def peer() -> nn.Module:
            backbone = resnet_fpn_backbone(
                backbone_name=name.split("_")[1],
                weights=None,
                trainable_layers=5,
                returned_layers=[2, 3, 4],
                extra_blocks=LastLevelP6P7(256, 256),
            )
            made = RetinaNet(backbone, 91, min_size=size, max_size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3)
            made.load_state_dict(weights)
            return made

        def loss(peer: nn.Module) -> Tensor:
            return sum(peer(list(images), targets).values())

        peers = variants(
            "torchvision",
            peer,
            loss,
            images.device,
            dtype,
            compile=False,
            method=lambda peer: (peer, "compute_loss", LOSS),
        )
    return workload(model, images, boxes, labels, dtype, peers, absent)


def classifier(device: torch.device, dtype: torch.dtype, layout: str, *, name: str, batch: int, size: int) -> Workload:
    """timm's model, alone and compiled, beside itself after `accelerate`: what one more line in a script may be."""
    import timm

    model = timm.create_model(name, num_classes=CLASSES).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images), labels)

    plain, compiles, accelerated, both = variants(
        "timm", lambda: copy.deepcopy(model), loss, device, dtype, compile=True
    )
    exact = copy.deepcopy(model).double()
    return Workload(
        ours=replace(accelerated, name=OURS),
        oracle=Implementation("float64", lambda: F.cross_entropy(exact(images.double()), labels), parameters_of(exact)),
        bytes={STEP: bytes_of_step(images, model)},
        gradient_tolerance=GRADIENT_TOLERANCE,
        results_of_peers=1,
        peers=[replace(both, name=f"{OURS}, compiled"), plain, compiles],
        images=batch,
    )


def bytes_of_step(images: Tensor, model: nn.Module) -> int:
    """Images and parameters are read, gradients written, and the optimizer reads and writes parameters, gradients, momenta."""
    return 4 * (images.numel() + 7 * sum(parameter.numel() for parameter in model.parameters()))


def data(model: nn.Module, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random images and objects; the model is brought to the device and into channels_last."""
    model.to(device).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    corners = 0.75 * size * torch.rand(batch, OBJECTS, 2, device=device)
    boxes = torch.cat([corners, corners + size * (0.03 + 0.2 * torch.rand_like(corners))], dim=2)
    return images, boxes, torch.randint(90, (batch, OBJECTS), device=device)


def variants(
    name: str,
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool,
    method: Callable[[Any], tuple[Any, str, str]] | None = None,
) -> list[Implementation]:
    """The peer as it is and accelerated, each also compiled; `method` names one for `scopes`."""
    found = []
    for accelerated in (False, True):
        for compiles in (False, True) if compile else (False,):
            model = make().to(device).to(memory_format=torch.channels_last).train()
            if accelerated:
                effdet_fast.accelerate(model)
            label = (f"{OURS} on {name}" if accelerated else name) + (", compiled" if compiles else "")
            run = partial(loss, model)
            plain = not (accelerated or compiles)  # hooks would keep modules from being fused
            methods = (method(model),) if method else ()
            told_apart = partial(scopes, model, methods) if plain else contextlib.nullcontext
            found.append(trained(label, compiled(run) if compiles else run, model, dtype, told_apart))
    return found


def workload(
    model: nn.Module,
    images: Tensor,
    boxes: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    peers: list[Implementation],
    absent: dict[str, str],
) -> Workload:
    exact = copy.deepcopy(model).double()

    def exact_loss() -> Tensor:
        with ops.use_reference():
            return exact(images.double(), (boxes.double(), labels)).total

    def loss(model: nn.Module) -> Tensor:
        return model(images, (boxes, labels)).total

    compiled_model = copy.deepcopy(model)
    peers = [trained(f"{OURS}, compiled", compiled(partial(loss, compiled_model)), compiled_model, dtype), *peers]
    if images.is_cuda:
        graphed_model = copy.deepcopy(model)
        parameters = parameters_of(graphed_model)
        optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, fused=True)
        step = GraphedStep(graphed_model, optimizer, amp="bf16" if dtype == torch.bfloat16 else "none")

        def replay() -> None:
            step(images, boxes, labels)
            if step.fallback_reason:
                raise RuntimeError(f"not captured: {step.fallback_reason}")

        graphed_loss = partial(loss, graphed_model)
        peers.append(Implementation(GRAPHED, graphed_loss, parameters, replay, captured_after=WARMUP_STEPS))
    else:
        absent[GRAPHED] = "needs a GPU"
    return Workload(
        ours=trained(OURS, partial(loss, model), model, dtype),
        oracle=Implementation("float64", exact_loss, tuple(exact.parameters())),
        bytes={STEP: bytes_of_step(images, model)},
        gradient_tolerance=GRADIENT_TOLERANCE,
        # PyTorch's BatchNorm in channels_last sums a batch in plain float32: its statistics have five digits, and gradients on
        # top of them two, at 512 pixels. The tests compare those of a smaller one.
        results_of_peers=1,
        peers=peers,
        absent=absent,
        images=len(images),
    )


def parameters_of(model: nn.Module) -> tuple[Tensor, ...]:
    """Those that are trained."""
    return tuple(parameter for parameter in model.parameters() if parameter.requires_grad)


def trained(
    name: str,
    loss: Callable[[], Tensor],
    model: nn.Module,
    dtype: torch.dtype,
    told_apart: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Implementation:
    """The loss and the model's gradients, and a step of SGD with momentum."""
    parameters = parameters_of(model)
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9)
    autocast = torch.autocast(parameters[0].device.type, dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with autocast:
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Implementation(name, loss, parameters, step, told_apart)
