"""A training that is killed again and again, at any moment."""

import csv
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effdet_fast.cli.main import main
from effdet_fast.training.checkpoint import read_run_checkpoint
from effdet_fast.training.run_folder import RUN_FILES
from tests.generated_data import make_dataset

ROOT = Path(__file__).parents[2]
KILLS = 50


@pytest.mark.slow
def test_a_killed_run_can_be_resumed_and_leaves_no_stray_file(tmp_path, capsys):
    images, annotations = make_dataset(tmp_path / "data", images=4, size=(60, 80))
    run, moments = tmp_path / "run", random.Random(0)
    start = ["--model", "efficientdet_lite0", "--image-size", 64, "--batch-size", 2, "--epochs", 10000, "--workers", 1]
    start += ["--train-images", images, "--train-annotations", annotations, "--output", run, "--device", "cpu"]
    resume = ["--resume", run / "last.pt"]
    steps = 0
    for kill in range(KILLS):
        command = [sys.executable, "-m", "effdet_fast", "train", *map(str, resume if kill else start)]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as training:
            assert "steps of 2 images per epoch" in training.stdout.readline()
            while not (run / "last.pt").exists():
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1))
            training.send_signal(signal.SIGKILL)
        state = read_run_checkpoint(run / "last.pt").state
        assert state.step >= steps
        steps = state.step
        with open(run / "results.csv") as file:
            epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) - state.epoch in (0, 1)  # a kill may fall between the two files; resuming writes both
    assert steps > 0
    assert main(["train", *map(str, resume), "--epochs", str(state.epoch + 1), "--no-progress"]) == 0
    assert "finished" in capsys.readouterr().out
    assert {entry.name for entry in run.iterdir()} <= set(RUN_FILES)
