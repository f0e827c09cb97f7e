"""What two processes do together; run by torchrun from `test_distributed.py`, writes `rank<N>.json` to the folder given.

torchrun --nproc-per-node 2 -m tests.training.distributed_checks FOLDER
"""

import hashlib
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from effdet_fast.training import NonFiniteLoss, run, run_data, train
from effdet_fast.training.distributed import Agreement, Processes, join_processes
from tests.training.tiny_detector import create_tiny, tiny_config


def check_agreement(processes: Processes) -> list[int]:
    agreement = Agreement(processes)
    seen = [agreement.exchange(15 if processes.rank == 1 and call == 2 else 0) for call in range(5)]
    return [*seen, agreement.drain(), agreement.drain()]


def check_error_on_main(processes: Processes) -> str:
    def fail() -> None:
        raise ValueError(f"only seen by process {processes.rank}")

    try:
        processes.on_main(fail)
    except ValueError as error:
        return str(error)
    return "no error"


def digest(model: torch.nn.Module) -> str:
    """Of the parameters and the buffers, bit for bit."""
    content = hashlib.sha256()
    for value in model.state_dict().values():
        content.update(value.numpy().tobytes())
    return content.hexdigest()


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    images, annotations = folder / "train" / "images", folder / "train" / "annotations.json"
    val_images, val_annotations = folder / "val" / "images", folder / "val" / "annotations.json"
    models: list = []
    evaluated: list[int] = []
    on_loss = None

    def create(*args, **options):
        model = create_tiny(*args, **options)
        model.on_loss = on_loss
        detect = model.detect
        model.detect = lambda outputs, **kw: (evaluated.append(len(outputs[0][0])), detect(outputs, **kw))[1]
        models.append(model)
        return model

    run.create_model = create
    run.model_config = run_data.model_config = tiny_config
    options = {
        "train_images": images,
        "train_annotations": annotations,
        "val_images": val_images,
        "val_annotations": val_annotations,
        "model": "tiny",
        "batch_size": 2,
        "workers": 0,
        "lr": 0.1,
        "epochs": 2,
        "progress": False,
        "ema_decay": 0.0,  # evaluates the very model whose calls are counted
    }
    report: dict = {}
    processes, _ = join_processes("cpu")
    report["ranks"] = processes.gather(processes.rank)
    report["agreement"] = check_agreement(processes)
    report["error"] = check_error_on_main(processes)

    straight = train(output=folder / "straight", **options)
    report["evaluated"] = sum(evaluated)
    report["digest"] = digest(models[-1])
    report["metrics"] = straight.metrics
    report["steps"] = straight.steps

    # Only process 1 gets the signal; both stop after the same step.
    on_loss = lambda call: os.kill(os.getpid(), signal.SIGTERM) if (rank, call) == (1, 1) else None  # noqa: E731
    stopped = train(output=folder / "stopped", **options)
    report["stopped"] = [stopped.signal, stopped.steps]
    on_loss = None
    train(resume=stopped.last)
    report["resumed_digest"] = digest(models[-1])

    on_loss = lambda call: math.nan if (rank, call) == (1, 2) else None  # noqa: E731
    try:
        train(output=folder / "broken", **options)
    except NonFiniteLoss as error:
        report["failure"] = [error.step, error.what, error.image_ids]
    report["finite"] = all(bool(p.isfinite().all()) for p in models[-1].parameters())
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
