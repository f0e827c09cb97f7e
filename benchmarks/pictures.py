"""A picture per op: speed relative to ours of every implementation, case by case. Drawn from records alone."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import records

COLORS = ["#0b6e4f", "#b5651d", "#6a4c93", "#1f77b4", "#999999", "#c44e52"]
COPY = "copy of as many bytes"


def draw_all(record: records.Record, folder: Path) -> list[Path]:
    """Draws each op of the record into `<op>-<device>.png`, over an older picture of the same."""
    return [draw(record, op, folder) for op in dict.fromkeys(row.op for row in records.shown(record.rows) if row.ours)]


def draw(record: records.Record, op: str, folder: Path) -> Path:
    rows = [row for row in records.shown(record.rows) if row.op == op and row.ours]
    names = list(dict.fromkeys(name for row in rows for name in row.timings))
    names.sort(key=lambda name: name != records.OURS)
    bars = [*names, COPY]
    height = 0.9 / len(bars)
    figure, axes = plt.subplots(figsize=(10, 1.5 + len(rows) * (0.25 + 0.16 * len(bars))), layout="constrained")
    for b, name in enumerate(bars):
        timings = [(row.copy if row.is_large else None) if name == COPY else row.timings.get(name) for row in rows]
        there = [(i, timing) for i, timing in enumerate(timings) if timing]
        medians = [timing.median * 1e3 for _, timing in there]
        spread = [
            [max(0.0, timing.median - timing.q20) * 1e3 for _, timing in there],
            [max(0.0, timing.q80 - timing.median) * 1e3 for _, timing in there],
        ]
        positions = [i + (b - (len(bars) - 1) / 2) * height for i, _ in there]
        color = "#dddddd" if name == COPY else COLORS[names.index(name) % len(COLORS)]
        axes.barh(
            positions, medians, height, xerr=spread, color=color, label=name, error_kw={"lw": 0.8, "ecolor": "#444444"}
        )
        for position, (_, timing) in zip(positions, there, strict=True):
            axes.annotate(
                f"{1e3 * timing.median:.3g}",
                (1e3 * max(timing.median, timing.q80), position),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
    axes.set_yticks(
        range(len(rows)), [f"{row.case}\n{row.setting}, {row.layout}, {row.phase}" for row in rows], fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms (log scale; median, whiskers: 20 % and 80 % quantile)")
    axes.set_title(f"{op}: {record.device_name}, {record.date[:10]}", fontsize=10)
    axes.legend(
        fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.02, 1, 0), bbox_transform=figure.transFigure
    )
    path = folder / f"{op}-{record.device_slug}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=records.RESULTS, help="with the records; gets the pictures"
    )
    folder = parser.parse_args().folder
    everything = records.load_all(folder)
    for slug in dict.fromkeys(record.device_slug for record in everything):
        for op, (record, rows) in records.newest_rows(everything, slug).items():
            if any(row.ours for row in records.shown(rows)):
                print(draw(record, op, folder))


if __name__ == "__main__":
    main()
