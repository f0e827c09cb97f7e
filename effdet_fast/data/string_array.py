"""Many strings without an object for each; see `annotations` for why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class StringArray:
    """Many strings in one buffer; indexes to `str`, as a list would."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
        self._ends = np.cumsum([0] + [len(e) for e in encoded])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def tolist(self) -> list[str]:
        return list(self)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
