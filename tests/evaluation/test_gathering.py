"""Evaluation shared by two processes gives the numbers of one, on both."""

import json

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from effdet_fast.data import CocoDetection
from effdet_fast.evaluation import evaluate_model
from tests.evaluation.test_evaluation import Oracle, loader_of
from tests.generated_data import make_dataset


def share(rank, world_size, folder, data):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    metrics = []
    for images, file in data:
        dataset = CocoDetection(images, file)
        loader = loader_of(dataset, rank=rank, world_size=world_size)
        model = Oracle(dataset, order=range(rank, len(dataset), world_size), label_shift=rank)
        metrics.append(evaluate_model(model, loader, dataset, device="cpu", rank=rank, world_size=world_size))
    with open(f"{folder}/{rank}.json", "w") as out:
        json.dump(metrics, out)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    # With one image the second process has nothing to do but to take part.
    data = [tuple(map(str, make_dataset(tmp_path / str(n), images=n, size=(70, 111), seed=1))) for n in (1, 7)]
    mp.spawn(share, args=(2, str(tmp_path), data), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0]["AR100"] == pytest.approx(1.0)
    # Rank 1 names every class wrong here, so its half of the boxes is missed.
    assert 0.1 < first[1]["AR100"] < 0.9
