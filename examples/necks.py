"""Compares six necks on one backbone and one head: size, speed, and AP after equally many steps on the data of `neon_data.py`.

All are EfficientDet-Lite0 at 320 x 320 with another neck of 64 channels, NAS-FPN and BiFPN repeated three times. Forward passes
(evaluation mode, batch 4) and training steps (forward, labels, loss and gradients, batch 4) are timed in turn in one process; the
AP is of one run of each, with the recipe of `neon_trees.py` in fewer epochs.

    python examples/necks.py [--epochs 10] [--output runs/necks] [--docs docs] [--data examples/data]

writes necks.md and necks.png to the folder --docs, and keeps the runs in --output, where finished ones are taken up again.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from neon_data import WEIGHTS, make_data_set
from neon_trees import RECIPE

import effdet_fast
from effdet_fast.models import DetectionModel, summary

MODEL = "efficientdet_lite0"
NECKS = {
    "FPN": {"neck": "fpn", "fusion": "sum"},
    "PANet": {"neck": "panet", "fusion": "sum"},
    "NAS-FPN": {"neck": "nas_fpn", "fusion": "sum"},
    "BiFPN, sum": {"neck": "bifpn", "fusion": "sum"},
    "BiFPN, softmax": {"neck": "bifpn", "fusion": "softmax"},
    "BiFPN, fast": {"neck": "bifpn", "fusion": "fast"},
}
BATCH, SIZE, OBJECTS = 4, 320, 20


@dataclass
class Row:
    """One neck. Times are medians in seconds of the whole detector; parameters and multiply-adds are the neck's."""

    name: str
    parameters: int
    multiply_adds: int
    forward: float
    step: float
    AP: float
    AP50: float


def build(options: dict) -> DetectionModel:
    torch.manual_seed(0)
    model = effdet_fast.create_model(MODEL, 1, image_size=SIZE, **options)
    return model.to(memory_format=torch.channels_last)


def time_all(rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a forward pass and of a training step of each neck; they take turns."""
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    corners = 0.8 * SIZE * torch.rand(BATCH, OBJECTS, 2)
    boxes = torch.cat([corners, corners + 30], dim=2)
    labels = torch.zeros(BATCH, OBJECTS, dtype=torch.int64)
    models = {name: build(options) for name, options in NECKS.items()}

    def forward(model: DetectionModel) -> None:
        with torch.no_grad():
            model.eval()(images)

    def step(model: DetectionModel) -> None:
        model.train().zero_grad()
        model.loss(model(images), boxes, labels).total.backward()

    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            for work, times in zip((forward, step), samples[name], strict=True):
                start = time.perf_counter()
                work(model)
                if i > 0:  # the first round warms up
                    times.append(time.perf_counter() - start)
    return {name: (statistics.median(f), statistics.median(s)) for name, (f, s) in samples.items()}


def trained_metrics(name: str, options: dict, epochs: int, output: Path, data: Path) -> dict[str, float]:
    """COCO metrics of a finished run, which is trained first where it is missing."""
    file = output / f"{'_'.join(options.values())}_{epochs}" / "metrics.json"
    if not file.exists():
        splits = make_data_set(data)
        print(f"training {name}", flush=True)
        result = effdet_fast.train(
            train_images=splits["train"][0],
            train_annotations=splits["train"][1],
            val_images=splits["val"][0],
            val_annotations=splits["val"][1],
            model=MODEL,
            model_options=options,
            backbone_checkpoint=data / Path(WEIGHTS).name,
            output=file.parent,
            overwrite=True,
            **(RECIPE | {"epochs": epochs, "eval_every": epochs}),
        )
        if result.signal is not None:
            raise SystemExit(f"stopped after {result.steps} steps of {name}")
        file.write_text(json.dumps(result.metrics))
    return json.loads(file.read_text())


def table(rows: list[Row], epochs: int, threads: int) -> str:
    fast = rows[-1]
    softmax = rows[-2]
    lines = [
        "# Necks compared",
        "",
        "EfficientDet-Lite0 at 320 x 320 with six necks of 64 channels, NAS-FPN and BiFPN repeated three times. Written by",
        f"`python examples/necks.py --epochs {epochs}` on a CPU with {threads} threads.",
        "",
        "Parameters and multiply-adds are the neck's, of one image. Times are the whole detector's, batch "
        f"{BATCH}, channels_last, float32; a tenth either way is noise. AP is of one training run each of {epochs} epochs on "
        "the tree photographs: it says how fast a neck starts to learn, which favors those with few layers, and not what it "
        "comes to.",
        "",
        "| neck | parameters | multiply-adds | forward | training step | AP | AP50 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {row.parameters:,} | {row.multiply_adds / 1e6:.1f} M | {row.forward * 1e3:.1f} ms "
        f"| {row.step * 1e3:.0f} ms | {row.AP:.3f} | {row.AP50:.3f} |"
        for row in rows
    ]
    lines += [
        "",
        "The paper (arXiv:1911.09070, table 6) reports fast fusion 1.26 to 1.31 times as fast as softmax on a GPU. Here "
        "either is one fused pass, and they differ in the normalization of two or three weights: softmax takes "
        f"{softmax.forward / fast.forward:.2f} times as long forward and {softmax.step / fast.step:.2f} times as long in a "
        "training step. Neither has been measured on a GPU.",
        "",
        "![AP against the time of a training step](necks.png)",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for row in rows:
        axis.scatter(row.step * 1e3, row.AP50, s=row.parameters / 1e3, alpha=0.6)
        axis.annotate(row.name, (row.step * 1e3, row.AP50), textcoords="offset points", xytext=(8, 4))
    axis.set(xlabel="training step, ms (area: parameters of the neck)", ylabel="AP50", ylim=(0, None))
    axis.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare necks on one backbone.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15, help="timed forward passes and steps of each")
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="where downloads and tiles are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/necks"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the table and the picture")
    arguments = parser.parse_args()
    metrics = {
        name: trained_metrics(name, options, arguments.epochs, arguments.output, arguments.data)
        for name, options in NECKS.items()
    }
    times = time_all(arguments.rounds)
    rows = []
    for name, options in NECKS.items():
        neck = next(part for part in summary(build(options)).parts if part.name == "neck")
        scores = {key: metrics[name][key] for key in ("AP", "AP50")}
        rows.append(Row(name, neck.parameters, neck.multiply_adds, *times[name], **scores))
    (arguments.output / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    arguments.docs.mkdir(parents=True, exist_ok=True)
    (arguments.docs / "necks.md").write_text(table(rows, arguments.epochs, torch.get_num_threads()))
    draw(rows, arguments.docs / "necks.png")
    print((arguments.docs / "necks.md").read_text())


if __name__ == "__main__":
    main()
