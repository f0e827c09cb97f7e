"""Training loops as others write them: five steps of an accelerated model give the losses of the plain one.

BatchNorms over few values and large steps magnify any round-off many times in each step. The problems here do not: the plain run
moves as little if its weights are changed by round-off.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import effdet_fast
from tests.acceleration.test_retinanet import batch, plain_model

ROOT = Path(__file__).parents[2]
STEPS = 5


def both(model):
    """The plain model, and an accelerated copy."""
    accelerated = copy.deepcopy(model)
    assert effdet_fast.accelerate(accelerated).swapped
    return model, accelerated


def assert_losses_equal(actual, expected):
    assert len(actual) == len(expected) == STEPS and len(set(expected)) == STEPS
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_resnet18_fpn",
        *(pytest.param(f"retinanet_resnet50_fpn{form}", marks=pytest.mark.slow) for form in ("", "_v2")),
    ],
)
def test_torchvisions_retinanet(name):
    """With the transform of images of different sizes; BatchNorms are frozen, as is usual for batches as small as these."""
    runs = []
    for model in both(plain_model(name).train()):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4, momentum=0.9)
        losses = []
        for _ in range(STEPS):
            loss = sum(model(*batch()).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert_losses_equal(runs[1], runs[0])


@pytest.mark.slow
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, images_and_labels, index):
            images, labels = images_and_labels
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    torch.manual_seed(0)
    data = [(torch.randn(3, 64, 64), index % 4) for index in range(STEPS * 4)]
    runs = []
    for number, model in enumerate(both(timm.create_model("mobilenetv3_small_050", num_classes=4))):
        client = Classifier(model)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        folder = tmp_path / str(number)
        trainer = lightning.Trainer(max_steps=STEPS, accelerator="cpu", default_root_dir=folder, **options)
        trainer.fit(client, torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint(folder / "last.ckpt")
        runs.append(client)
    plain, accelerated = runs
    assert_losses_equal(accelerated.losses, plain.losses)
    state = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)["state_dict"]
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain.eval().model(images), accelerated.eval().model(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def distributed_runs(tmp_path_factory):
    """For each process its runs: (model, accelerated) to losses, state and running mean of the state."""
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, "-m", "tests.acceleration.distributed_checks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_two_processes(name, distributed_runs):
    first, second = ([runs[name, accelerated] for accelerated in (False, True)] for runs in distributed_runs)
    for plain, accelerated in (first, second):
        assert_losses_equal(accelerated["losses"], plain["losses"])
        for part in ("state", "average"):
            assert accelerated[part].keys() == plain[part].keys()
            torch.testing.assert_close(accelerated[part], plain[part], rtol=1e-4, atol=1e-4)
    assert any(name.startswith("Accelerated") for name in first[1]["classes"])
    assert not any(name.startswith("Accelerated") for name in first[0]["classes"])
    assert first[0]["losses"] != second[0]["losses"]
    parameters = {key for key in first[1]["state"] if "running" not in key and "num_batches" not in key}
    assert all(torch.equal(first[1]["state"][key], second[1]["state"][key]) for key in parameters)


def test_timms_running_mean_of_a_model():
    """In float64: its last maps have so few values that steps in float32 stray by 1e-4."""
    torch.manual_seed(0)
    runs = []
    for model in both(timm.create_model("mobilenetv3_small_050", num_classes=4).double()):
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        assert [type(module) for module in average.module.modules()] == [type(module) for module in model.modules()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(STEPS):
            images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
            average.update(model)
        runs.append(average.module.state_dict())
    assert not torch.equal(runs[1]["conv_stem.weight"], model.state_dict()["conv_stem.weight"])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_synchronized_batch_norm_can_still_be_made(convert):
    torch.manual_seed(0)
    plain, accelerated = (convert(model).eval() for model in both(timm.create_model("mobilenetv3_small_050")))
    kinds = [[isinstance(m, nn.SyncBatchNorm) for m in model.modules()] for model in (accelerated, plain)]
    assert kinds[0] == kinds[1] and any(kinds[0])
    assert list(accelerated.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(accelerated(images), plain(images), rtol=1e-4, atol=1e-5)
