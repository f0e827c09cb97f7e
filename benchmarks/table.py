"""The table on the screen, and how one gets into a page."""

from benchmarks.records import OURS, Row, Timing

HEADER = (
    f"{'':34} {'median':>9}  {'20 % .. 80 %':>18} {'GB/s':>7} {'of copy':>8} {'vs ours':>8} {'peak MB':>8} {'error':>8}"
)


def format_row(row: Row) -> str:
    """A block: one line per implementation, fastest first, then the copy, then those that could not take part."""
    lines = [f"{row.op} | {row.case} | {row.setting}, {row.layout} | {row.phase} | {row.bytes / 1e6:.1f} MB", HEADER]
    for name, timing in sorted(row.timings.items(), key=lambda item: (item[0] != OURS, item[1].median)):
        lines.append(_line(row, name, timing))
    if row.copy:
        lines.append(_line(row, "copy of as many bytes", row.copy))
    lines += [f"  {name:32} {problem}" for name, problem in row.problems.items()]
    return "\n".join(lines)


def _line(row: Row, name: str, timing: Timing) -> str:
    spread = f"{milliseconds(timing.q20)} .. {milliseconds(timing.q80)}"
    percent = row.copy_percent(timing)
    against_ours = f"{timing.median / row.ours.median:7.2f}x" if row.ours else ""
    peak = f"{timing.peak_bytes / 1e6:.1f}" if timing.peak_bytes is not None else "-"
    error = f"{timing.error:.0e}" if timing.error is not None else ""
    return (
        f"  {name:32} {milliseconds(timing.median):>9}  {spread:>18} {row.gigabytes_per_second(timing):7.1f} "
        f"{f'{percent:.0f} %' if percent is not None else '':>8} {against_ours:>8} {peak:>8} {error:>8}"
    )


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = seconds * 1e3
    return f"{value:.{max(0, min(4, 2 - _magnitude(value)))}f} ms"


def _magnitude(value: float) -> int:
    magnitude = 0
    while value >= 10:
        value, magnitude = value / 10, magnitude + 1
    while 0 < value < 1 and magnitude > -4:
        value, magnitude = value * 10, magnitude - 1
    return magnitude


def between(name: str, text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` between its markers; ValueError, with its `name`, unless it has each of them once, in this order."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest or end in before + after:
        raise ValueError(f"{name}: must have exactly one {begin} and one {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"
