"""Plain and accelerated models trained by two processes; run by torchrun from `test_clients.py`, writes `rank<N>.pt`.

torchrun --nproc-per-node 2 -m tests.acceleration.distributed_checks FOLDER
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import effdet_fast
from tests.acceleration.test_retinanet import batch, plain_model

STEPS = 5


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", num_classes=4)


def classifier_loss(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    images = torch.randn(4, 3, 64, 64, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.randint(0, 4, (4,), generator=generator))


def detector() -> nn.Module:
    return plain_model("retinanet_resnet18_fpn")


def detector_loss(model: nn.Module, step: int) -> torch.Tensor:
    images, targets = batch()
    image = (step + dist.get_rank()) % 2  # the second shows no object
    losses = model(images[image : image + 1], targets[image : image + 1])
    return sum(losses.values())  # type: ignore[return-value]


def train(model: nn.Module, loss_of, accelerated: bool) -> dict:
    """Losses of this process, and the state after the steps: of the model and of its running mean."""
    if accelerated:
        effdet_fast.accelerate(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    parallel = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(parallel, step)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return {
        "losses": losses,
        "state": copy.deepcopy(model.state_dict()),
        "average": copy.deepcopy(average.module.state_dict()),
        "classes": sorted({type(module).__name__ for module in average.module.modules()}),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    runs = {
        (name, accelerated): train(create(), loss_of, accelerated)
        for name, create, loss_of in (("timm", classifier, classifier_loss), ("torchvision", detector, detector_loss))
        for accelerated in (False, True)
    }
    torch.save(runs, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
