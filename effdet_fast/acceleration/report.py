"""The report of `accelerate`: what was swapped, and what was left alone and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One candidate for a swap.

    Attributes:
        path: Its name in the model, as in `named_modules()`; "" is the model itself.
        kind: The name of its class.
        family: Its family, one of `FAMILIES`.
        replacement: The operator that it now runs on; None if it was left alone.
        reason: Why it was left alone; None if it was swapped.
    """

    path: str
    kind: str
    family: str
    replacement: str | None
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; it prints as a table, with one line for candidates that differ in their path alone.

    Attributes:
        rows: All candidates.
    """

    rows: tuple[Row, ...]

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The candidates that were swapped."""
        return tuple(row for row in self.rows if row.replacement)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        """The candidates that were left alone."""
        return tuple(row for row in self.rows if not row.replacement)

    def __str__(self) -> str:
        if not self.rows:
            return "accelerate: nothing to swap"
        lines = [f"accelerate: {len(self.swapped)} of {len(self.rows)} candidates swapped"]
        table = [("family", "class", "", "count", "where")]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in (*self.swapped, *self.left_alone):
            what = f"-> {row.replacement}" if row.replacement else f"left alone: {row.reason}"
            groups.setdefault((row.family, row.kind, what), []).append(row.path or "the model")
        for (family, kind, what), paths in groups.items():
            table.append((family, kind, what, str(len(paths)), paths[0] + (", ..." if len(paths) > 1 else "")))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        for *cells, where in table:
            lines.append("  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [where]))
        return "\n".join(line.rstrip() for line in lines)
