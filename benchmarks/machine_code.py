"""The machine code (SASS) of a kernel: its loops, the path that a warp takes through one, and what it waits for there.

Every instruction of sm_70 and later carries its own schedule: how many cycles the warp pauses behind it, the barrier (one of
six) that tells when a slow result is there, and the barriers that must be clear before it is issued. So a warp's time along a
path can be read off the code (`prediction.py`). The main path is a round of the innermost loop that moves the most global memory,
and of the ways through it the one that moves the most; of several that with the fewest special functions (no activation), the
most multiply-adds (nothing is skipped), the fewest instructions. Where the common case moves less, its accesses are given.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

# Bytes per thread in the names of memory instructions; one without a width moves 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
GLOBAL_LOADS, GLOBAL_STORES = frozenset({"LDG", "LDGSTS"}), frozenset({"STG"})
Worth = tuple[int, int, int, int, int]
LINE = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9]+)((?:\.\w+)*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/"
)
SECOND_LINE = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
ENDS = {"EXIT", "RET", "BRX", "JMX", "KILL"}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    name: str
    modifiers: tuple[str, ...]
    operands: str
    control: int  # pause 4 bits, yield 1, barrier of the result 3, of the operands 3, barriers to wait for 6

    @property
    def pause(self) -> int:
        return max(1, self.control & 15)

    @property
    def sets(self) -> int | None:
        barrier = self.control >> 5 & 7
        return None if barrier == 7 else barrier

    @property
    def waits(self) -> int:
        """As bits."""
        return self.control >> 11 & 63

    @property
    def bytes(self) -> int:
        return next((WIDTHS[part] for part in self.modifiers if part in WIDTHS), 4)

    @property
    def target(self) -> int | None:
        """Where it may go on instead of behind itself."""
        if self.name not in ("BRA", "JMP") or "DIV" in self.modifiers:  # DIV: the way of a warp that is not whole
            return None
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(match[1], 16) if match else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        conditional = bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))
        return conditional or not (self.name in ENDS or self.target is not None)


def instructions_of(lines: Iterable[str]) -> list[Instruction]:
    """Of one function's listing as `cuobjdump -sass` prints it."""
    found: list[Instruction] = []
    first: re.Match[str] | None = None
    for line in lines:
        if match := LINE.match(line):
            first = match
        elif first and (second := SECOND_LINE.match(line)):
            address, predicate, name, modifiers, operands = first.groups()[:5]
            control = int(second[1], 16) >> 41
            found.append(
                Instruction(int(address, 16), predicate or "", name, tuple(modifiers.split(".")[1:]), operands, control)
            )
            first = None
    return found


@dataclass(frozen=True)
class Accesses:
    """All of global memory in a round of the common case: loads and stores, each at least so many bytes a thread wide."""

    width: int
    loads: int
    stores: int

    def of(self, some: Sequence[Instruction]) -> tuple[int, int] | None:
        """Loads and stores among these instructions; None where one is narrower."""
        loads, stores = ([one.bytes for one in some if one.name in names] for names in (GLOBAL_LOADS, GLOBAL_STORES))
        return (len(loads), len(stores)) if min([self.width, *loads, *stores]) == self.width else None


@dataclass
class Code:
    """A function as blocks of instructions that are entered at the top and left at the bottom."""

    instructions: list[Instruction]

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        starts = {one.target for one in self.instructions if one.target is not None}
        blocks: list[list[Instruction]] = []
        cut = True
        for one in self.instructions:
            if cut or one.address in starts:
                blocks.append([])
            blocks[-1].append(one)
            cut = one.target is not None or not one.goes_on
        return blocks

    @cached_property
    def successors(self) -> list[list[int]]:
        at = {block[0].address: i for i, block in enumerate(self.blocks)}
        found = []
        for i, block in enumerate(self.blocks):
            last = block[-1]
            after = [i + 1] if last.goes_on and i + 1 < len(self.blocks) else []
            if last.target is not None and last.target in at:
                after.append(at[last.target])
            found.append(after)
        return found

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop by its first."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, after in enumerate(self.successors):
            for j in after:
                before[j].append(i)
        order = self.order
        rank = {block: i for i, block in enumerate(order)}
        dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                known = [b for b in before[block] if b in dominator]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        if rank[new] > rank[other]:
                            new = dominator[new]
                        else:
                            other = dominator[other]
                if dominator.get(block) != new:
                    dominator[block] = new
                    changed = True
        loops: dict[int, set[int]] = {}
        for block in order:
            for head in self.successors[block]:
                up = block
                while up != head and up != 0:
                    up = dominator[up]
                if up != head:
                    continue
                body, left = loops.setdefault(head, {head}), [block]
                while left:
                    one = left.pop()
                    if one not in body:
                        body.add(one)
                        left += [b for b in before[one] if b in rank]
        return loops

    @cached_property
    def order(self) -> list[int]:
        """The blocks that can be reached, each before those behind it but for ways back."""
        order: list[int] = []
        seen, stack = {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((b for b in rest if b not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return order[::-1]

    def _best(
        self, inside: set[int], start: int, ends: set[int], common: Accesses | None, activated: bool
    ) -> list[Instruction]:
        """The main way from `start` to one of `ends`, no block twice; empty where none makes the `common` accesses."""
        rank = {block: i for i, block in enumerate(self.order)}
        # The best ways up to and with a block, by the accesses on them where those are asked for.
        best: dict[int, dict[tuple[int, int], tuple[Worth, tuple[int, ...]]]] = {start: {(0, 0): ((0, 0, 0, 0, 0), ())}}
        for block in sorted((b for b in inside if b in rank), key=lambda b: rank[b]):
            own = self.blocks[block]
            moves = common.of(own) if common else (0, 0)
            ways, best[block] = best.get(block, {}), {}
            if moves is None:
                continue
            own_worth = _worth(own, common is None, activated)
            for (loads, stores), (worth, way) in ways.items():
                total = loads + moves[0], stores + moves[1]
                if common is None or (total[0] <= common.loads and total[1] <= common.stores):
                    best[block][total] = _sum(worth, own_worth), (*way, block)
            for after in self.successors[block]:
                if after in inside and rank[after] > rank[block]:
                    there = best.setdefault(after, {})
                    for total, found in best[block].items():
                        if total not in there or found[0] > there[total][0]:
                            there[total] = found
        wanted = (common.loads, common.stores) if common else (0, 0)
        found_ways = [best[block][wanted] for block in ends if wanted in best.get(block, {})]
        return [one for block in max(found_ways)[1] for one in self.blocks[block]] if found_ways else []

    def main(
        self, common: Accesses | None = None, activated: bool = False
    ) -> tuple[list[Instruction], list[Instruction]]:
        """The shortest way to the main loop, and a round of it; nothing, and the whole kernel, where it has none.

        activated: of ways that move the same, the one with the most exponentials.
        """
        rounds = {}
        for head, body in self.loops.items():
            if common is None and any(other != head and other in body for other in self.loops):
                continue
            latches = {block for block in body if head in self.successors[block]}
            path = self._best(body, head, latches, common, activated)
            if any(one.name in GLOBAL_LOADS for one in path):
                rounds[head] = path
        if not rounds:
            exits = {i for i, block in enumerate(self.blocks) if any(one.name == "EXIT" for one in block)}
            return [], self._best(set(range(len(self.blocks))), 0, exits, common, activated)
        head = max(rounds, key=lambda head: _worth(rounds[head], common is None, activated))
        return self._way_to(head), rounds[head]

    def _way_to(self, goal: int) -> list[Instruction]:
        distance = {0: (0, [0])}
        for block in self.order:
            if block not in distance or block == goal:
                continue
            count, way = distance[block]
            for after in self.successors[block]:
                longer = count + len(self.blocks[block])
                if after not in distance or longer < distance[after][0]:
                    distance[after] = longer, [*way, after]
        return [one for block in distance[goal][1][:-1] for one in self.blocks[block]]


def _worth(some: Iterable[Instruction], by_bytes: bool, activated: bool) -> Worth:
    """What makes a way the main one, in this order."""
    some = list(some)
    # STRONG is what blocks leave to each other: csrc/common/last_block.cuh.
    maps = [one for one in some if one.name in GLOBAL_LOADS | GLOBAL_STORES and "STRONG" not in one.modifiers]
    moved = sum(one.bytes for one in maps) if by_bytes else 0
    special = [one.modifiers for one in some if one.name == "MUFU"]
    exponentials = special.count(("EX2",)) if activated else 0
    products = sum(one.name in ("FFMA", "DFMA") for one in some)
    return moved, exponentials, -len(special), products, -len(some)


def _sum(a: Worth, b: Worth) -> Worth:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4]
