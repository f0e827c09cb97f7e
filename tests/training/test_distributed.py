"""Two processes on the CPU, started by torchrun, talking through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effdet_fast.device import choose_device
from effdet_fast.training.distributed import Agreement, Processes, join_processes
from tests.generated_data import make_dataset

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_dataset(folder / "train", images=7, size=(40, 48))
    make_dataset(folder / "val", images=5, size=(40, 48), seed=1)
    done = torchrun("-m", "tests.training.distributed_checks", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)], folder


def test_they_know_and_agree_with_each_other(reports):
    for report in reports[0]:
        assert report["ranks"] == [0, 1]
        assert report["agreement"] == [0, 0, 0, 15, 0, 0, 0]
        assert report["error"] == "only seen by process 0"


def test_they_end_with_the_same_weights_and_numbers_and_every_image_is_evaluated(reports):
    first, second = reports[0]
    assert first["digest"] == second["digest"]
    assert first["metrics"] == second["metrics"] and len(first["metrics"]) == 12
    assert first["steps"] == second["steps"] == 2 * 2
    assert first["evaluated"] + second["evaluated"] == 2 * 5
    assert first["evaluated"] > 0 and second["evaluated"] > 0


def test_a_signal_to_one_stops_both_after_the_same_step_and_the_run_resumes_to_the_same_bits(reports):
    first, second = reports[0]
    assert first["stopped"] == second["stopped"] and first["stopped"][0] == 15
    assert first["stopped"][1] < first["steps"]
    assert first["resumed_digest"] == second["resumed_digest"] == first["digest"]


def test_a_bad_loss_on_one_stops_both_with_its_images(reports):
    (first, second), folder = reports
    assert first["failure"] == second["failure"]
    step, what, image_ids = first["failure"]
    assert (step, what) == (2, "loss")
    order = np.resize(np.random.default_rng([0, 1]).permutation(7), (2, 2, 2))  # epoch 1: [batch, rank, image]
    assert image_ids == [100 + 3 * int(i) for i in order[0, 1]]
    assert first["finite"] and second["finite"]
    assert json.loads((folder / "broken" / "failure.json").read_text())["step"] == 2


def test_one_process_needs_no_group():
    processes, device = join_processes("cpu")
    assert (processes.is_main, processes.world_size, device.type) == (True, 1, "cpu")
    assert processes.gather(3) == [3] and processes.on_main(lambda: 4) == 4
    assert Agreement(Processes()).exchange(7) == 7


def test_an_unusable_device_is_named():
    with pytest.raises(ValueError, match="device must be like cpu, cuda or cuda:1, got 'gpu'"):
        choose_device("gpu", 0)
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'mps'"):
        choose_device("mps", 0)
