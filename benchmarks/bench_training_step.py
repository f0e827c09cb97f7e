"""A training step of EfficientDet-D0: forward, labels, loss and the gradients of all parameters."""

import copy
from functools import partial

import torch
from torch import nn

import effdet_fast
from benchmarks.workload import BOTH, CHANNELS_LAST, OURS, Case, Implementation, Workload, optional
from effdet_fast import ops
from effdet_fast.models import DetectionModel

OP = "training_step"
MODEL, SIZE, OBJECTS = "efficientdet_d0", 512, 20


def cases(device_type: str) -> list[Case]:
    batch = 16 if device_type == "cuda" else 4
    build = partial(step, name=MODEL, batch=batch, size=SIZE)
    # In half precision the gradients of a new model are mostly round-off, so that nothing could tell right from wrong.
    return [Case(f"{MODEL}, {batch} x {SIZE}^2", build, layouts=(CHANNELS_LAST,), dtypes=(torch.float32,))]


def step(device: torch.device, dtype: torch.dtype, layout: str, *, name: str, batch: int, size: int) -> Workload:
    """A new model. Drop-path is off: it is random."""
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    model = effdet_fast.create_model(name, 90, image_size=(size, size), drop_path_rate=0.0)
    model = model.to(device).to(memory_format=memory_format).train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=memory_format)
    corners = 0.75 * size * torch.rand(batch, OBJECTS, 2, device=device)
    boxes = torch.cat([corners, corners + size * (0.03 + 0.2 * torch.rand_like(corners))], dim=2)
    labels = torch.randint(90, (batch, OBJECTS), device=device)

    def loss(model: DetectionModel) -> torch.Tensor:
        return model.loss(model(images), boxes, labels).total

    def peer_loss(bench: nn.Module) -> torch.Tensor:
        sizes = torch.full((batch, 2), float(size), device=device)
        target = {
            "bbox": boxes[..., [1, 0, 3, 2]],
            "cls": labels + 1.0,
            "img_scale": sizes[:, 0] / size,
            "img_size": sizes,
        }
        return bench(images, target)["loss"]

    exact = copy.deepcopy(model).double()

    def exact_loss() -> torch.Tensor:
        with ops.use_reference():
            return exact.loss(exact(images.double()), boxes.double(), labels).total

    absent: dict[str, str] = {}
    peers = []
    if effdet := optional("effdet", absent):
        config = effdet.get_efficientdet_config(f"tf_{name}")
        config.image_size = (size, size)
        config.backbone_args = {"drop_path_rate": 0.0}
        peer = effdet.EfficientDet(config, pretrained_backbone=False)
        peer.load_state_dict(model.state_dict())
        peer = peer.to(device).to(memory_format=memory_format).train()
        bench = effdet.DetBenchTrain(peer).train().to(device)
        peers.append(Implementation("effdet", partial(peer_loss, bench), tuple(peer.parameters())))
    parameters = tuple(model.parameters())
    floats = images.numel() + 2 * sum(parameter.numel() for parameter in parameters)
    return Workload(
        ours=Implementation(OURS, partial(loss, model), parameters),
        oracle=Implementation("float64", exact_loss, tuple(exact.parameters())),
        bytes={BOTH: 4 * floats},
        joined=True,  # the biases before a BatchNorm have no gradient but round-off
        # PyTorch's BatchNorm in channels_last sums a batch in plain float32: its statistics have five digits, and gradients on
        # top of them two, at 512 pixels. The tests compare those of a smaller one.
        results_of_peers=1,
        peers=peers,
        absent=absent,
    )
