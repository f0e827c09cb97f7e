"""The loader: same batches for any number of workers, exact resume, fair shares, errors that name files."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from effdet_fast.data import CocoDetection, create_loader, normalize
from effdet_fast.data.sampler import EvaluationBatches, TrainingBatches
from tests.checks import all_equal
from tests.generated_data import make_dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return CocoDetection(*make_dataset(tmp_path_factory.mktemp("loader"), images=11, suffix=".jpg"))


def loader_of(dataset, **options):
    options = {"image_size": (48, 64), "batch_size": 4, "training": True, "workers": 0, "seed": 3, **options}
    return create_loader(dataset, mean=MEAN, std=STD, **options)


def test_batches(dataset):
    for batch in loader_of(dataset):
        assert batch.images.shape == (4, 3, 48, 64) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.gt_boxes.shape == (4, 8, 4) and batch.gt_boxes.dtype == torch.float32
        assert batch.gt_labels.shape == (4, 8) and batch.gt_labels.dtype == torch.int64
        assert batch.image_ids.dtype == torch.int64 and batch.scales.dtype == torch.float32
        assert batch.sizes.tolist() == [[96, 128]] * 4
        real = batch.gt_labels >= 0
        assert (batch.gt_boxes[~real] == 0).all() and (batch.gt_labels[real] < 3).all()
        sides = batch.gt_boxes[real][:, 2:] - batch.gt_boxes[real][:, :2]
        assert (sides >= 1).all() and (batch.gt_boxes[real] <= torch.tensor([64.0, 48, 64, 48])).all()


def test_batch_moves_as_a_whole(dataset):
    batch = next(iter(loader_of(dataset)))
    moved = batch.to("meta")
    assert all(t.device.type == "meta" for t in moved) and moved.images.shape == batch.images.shape
    assert type(moved) is type(batch)


def test_evaluation_batches_are_letterboxed_in_order(dataset):
    batches = list(loader_of(dataset, training=False, image_size=64))
    assert [len(b.images) for b in batches] == [4, 4, 3]
    assert torch.cat([b.image_ids for b in batches]).tolist() == dataset.image_ids
    assert (batches[0].scales == 0.5).all()
    assert (batches[0].images[:, :, 48:].permute(0, 2, 3, 1) == torch.tensor([124, 116, 104])).all()
    sample = dataset[0]
    n = len(sample["labels"])
    torch.testing.assert_close(batches[0].gt_boxes[0, :n], torch.from_numpy(sample["boxes"]) / 2)
    assert batches[0].gt_labels[0, :n].tolist() == sample["labels"].tolist()
    assert (batches[-1].gt_labels[-1] == -1).all()  # the image without boxes


def test_workers_change_nothing_and_epochs_and_seeds_do(dataset):
    alone, together = loader_of(dataset), loader_of(dataset, workers=2)
    epochs = []
    for epoch in (0, 1, 1):
        alone.set_epoch(epoch)
        together.set_epoch(epoch)
        epochs.append(list(alone))
        assert all_equal(epochs[-1], list(together))
    assert all_equal(epochs[1], epochs[2]) and not all_equal(epochs[0], epochs[1])
    assert not all_equal(epochs[0], list(loader_of(dataset, seed=4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(dataset, workers):
    loader = loader_of(dataset, workers=workers, batch_size=2)
    loader.set_epoch(5)
    whole = list(loader)
    assert len(whole) == len(loader) == 6
    loader.set_epoch(5, start_batch=4)
    assert len(loader) == 6 and all_equal(list(loader), whole[4:])
    assert all_equal(list(loader), whole), "only the next iteration starts later"
    # One left in the middle does not leak into the next.
    for _ in loader:
        break
    loader.set_epoch(5)
    assert all_equal(list(loader), whole)
    loader.set_epoch(5, start_batch=6)
    assert list(loader) == []


def test_torchs_global_generator_is_left_alone(dataset):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(loader_of(dataset))
    list(loader_of(dataset, training=False))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("length, batch_size, world", [(11, 2, 2), (3, 4, 2), (16, 4, 2), (1, 1, 3), (100, 7, 3)])
def test_training_shares(length, batch_size, world):
    def share(rank, drop_last=False):
        return list(TrainingBatches(length, batch_size, seed=1, rank=rank, world_size=world, drop_last=drop_last))

    shares = [share(rank) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1 and all(len(b) == batch_size for s in shares for b in s)
    counts = np.bincount([i for s in shares for b in s for _, i in b], minlength=length)
    assert counts.min() >= 1 and counts.sum() - length < batch_size * world
    dropped = [share(rank, drop_last=True) for rank in range(world)]
    if length >= batch_size * world:
        assert max(np.bincount([i for s in dropped for b in s for _, i in b])) == 1
    assert all(len(s) == max(1, length // (batch_size * world)) for s in dropped)
    # The images of a step do not depend on how many processes share it.
    alone = list(TrainingBatches(length, batch_size * world, seed=1, rank=0, world_size=1))
    assert [sorted(b) for b in alone] == [sorted(k for s in shares for k in s[n]) for n in range(len(alone))]


@pytest.mark.parametrize("length, batch_size, world", [(11, 2, 2), (1, 4, 3), (12, 4, 3)])
def test_evaluation_shares_hold_each_image_once(length, batch_size, world):
    shares = [EvaluationBatches(length, batch_size, rank=rank, world_size=world) for rank in range(world)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(keys) == [(0, i) for i in range(length)]
    assert all(len(list(share)) == len(share) for share in shares)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_names_the_file(tmp_path, workers):
    images, file = make_dataset(tmp_path, images=3, suffix=".jpg")
    dataset = CocoDetection(images, file)
    data = (images / "picture_001.jpg").read_bytes()
    (images / "picture_001.jpg").write_bytes(data[: len(data) // 3])
    with pytest.raises(ValueError, match="picture_001.jpg: cannot be decoded"):
        list(loader_of(dataset, workers=workers))


def test_workers_outlive_ctrl_c(dataset):
    loader = loader_of(dataset, workers=1, batch_size=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.2)
    assert worker.is_alive() and len(list(batches)) == 10


@pytest.mark.parametrize("boxes", [8, 9])
def test_padding_grows_in_powers_of_two(tmp_path, boxes):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    row = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "categories": [{"id": 1}],
                "annotations": [{**row, "id": i} for i in range(boxes)],
            }
        )
    )
    (batch,) = loader_of(CocoDetection(tmp_path, tmp_path / "a.json"), training=False)
    assert batch.gt_labels.shape == (1, 8 if boxes == 8 else 16) and (batch.gt_labels >= 0).sum() == boxes


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )
    out = normalize(images, MEAN, STD)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    half = normalize(images, MEAN, STD, dtype=torch.bfloat16, channels_last=False)
    assert half.is_contiguous() and half.dtype == torch.bfloat16
    assert torch.equal(half, expected.float().bfloat16()) or (half.double() - expected).abs().max() < 0.01
    with torch.inference_mode():
        normalize(images, (0.1, 0.2, 0.3), STD)
    normalize(images, (0.1, 0.2, 0.3), STD).requires_grad_()
    padding = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalize(padding, MEAN, STD).abs().max() < 0.01
    with pytest.raises(TypeError, match="must be uint8, got torch.float32"):
        normalize(images.float(), MEAN, STD)
    with pytest.raises(ValueError, match=r"shape \[B, 3, H, W\], got \[3, 5, 7\]"):
        normalize(images[0], MEAN, STD)
    with pytest.raises(ValueError, match="3 values"):
        normalize(images, (0.5,), STD)
    with pytest.raises(ValueError, match="std must be positive"):
        normalize(images, MEAN, (0.0, 1, 1))


BAD = [
    {"batch_size": 0},
    {"workers": -1},
    {"rank": 2, "world_size": 2},
    {"seed": -1},
    {"image_size": (0, 4)},
    {"hflip": 2},
]


@pytest.mark.parametrize("options", BAD)
def test_bad_arguments(dataset, options):
    with pytest.raises(ValueError):
        loader_of(dataset, **options)


def test_bad_epochs(dataset):
    loader = loader_of(dataset)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        loader.set_epoch(-1)
    with pytest.raises(ValueError, match=r"start_batch must be in \[0, 3\], got 4"):
        loader.set_epoch(0, 4)
