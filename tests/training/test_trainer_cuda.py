"""What only a GPU can show of the training loop."""

import pytest
import torch

from effdet_fast.training import train
from effdet_fast.training.trainer import Trainer
from tests.checks import all_equal
from tests.generated_data import make_dataset

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize(("amp", "optimizer"), [("none", "sgd"), ("bf16", "adamw"), ("fp16", "sgd")])
def test_a_step_of_the_real_model_never_waits_for_the_gpu(tmp_path, monkeypatch, amp, optimizer):
    pytest.importorskip("pycocotools", reason="the run evaluates")
    images, annotations = make_dataset(tmp_path / "data", images=8)
    step, watched = Trainer._train_step, []

    def watch(self, batch):
        mode = "error" if self.step >= 2 else "default"  # the first steps bring constants to the GPU
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(mode)

    monkeypatch.setattr(Trainer, "_train_step", watch)
    result = train(
        train_images=images,
        train_annotations=annotations,
        val_images=images,
        val_annotations=annotations,
        output=tmp_path / "run",
        model="efficientdet_lite0",
        image_size=128,
        batch_size=2,
        epochs=2,
        workers=1,
        amp=amp,
        optimizer=optimizer,
        device="cuda",
        progress=False,
    )
    assert watched.count("error") == 6
    assert len(result.metrics) == 12


def test_two_runs_with_one_seed_end_with_the_same_bits(tmp_path):
    images, annotations = make_dataset(tmp_path / "data", images=8)
    options = {"train_images": images, "train_annotations": annotations, "image_size": 128, "batch_size": 2}
    options |= {"model": "efficientdet_lite0", "workers": 0, "device": "cuda", "amp": "bf16", "progress": False}
    runs = [train(output=tmp_path / name, epochs=2, **options) for name in ("a", "b")]
    a, b = (torch.load(run.last, weights_only=True)["training"]["model"] for run in runs)
    assert all_equal(a, b)
