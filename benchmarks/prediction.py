"""How fast a kernel would run on an H200, predicted from its machine code and its launch. No GPU has said so.

A quarter of a multiprocessor issues one instruction a cycle. Two things take time there: the warps that fit, whose schedule is
played instruction by instruction (a load of global memory takes 850 cycles, and so bytes in flight make a bandwidth, by
Little's law), and memory, which moves what must be moved at the rate of a copy. Where the two times are near they hinder each
other: the sum of their cubes is the cube of the whole. A launch goes in waves of as many blocks as fit.
"""

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.machine_code import GLOBAL_LOADS, GLOBAL_STORES, Instruction

MULTIPROCESSORS, QUARTERS = 132, 4
HERTZ, COPY_BYTES_A_SECOND = 1.98e9, 4.3e12
COPY_BYTES_A_CYCLE = COPY_BYTES_A_SECOND / HERTZ / MULTIPROCESSORS / QUARTERS  # of a quarter
MEMORY_LATENCY, SECOND_LEVEL_LATENCY, FIRST_LEVEL_LATENCY = 850, 280, 35  # cycles of a load
LATENCIES = {"LDS": 30, "MUFU": 24, "SHFL": 24, "LDC": 40, "S2R": 20, "S2UR": 20, "ATOMS": 60}
OTHER_LATENCY = 16  # of what else sets a barrier
SPECIAL_CYCLES = 8  # a quarter has 4 lanes of special functions
SHARPNESS = 3
WARM_UP, ROUNDS = 3, 4  # until warps are out of step, and what each has under way is the same in every round
MAX_THREADS, MAX_BLOCKS, REGISTERS, SHARED_BYTES = 2048, 32, 65536, 233472
REGISTER_UNIT, SHARED_BYTES_OF_SYSTEM = 256, 1024  # registers are given to a warp by the unit


@dataclass
class Walk:
    """What one warp does in a round of a path, and how long it takes if it has the multiprocessor's quarter for itself."""

    cycles: float = 0
    instructions: int = 0
    special: int = 0
    loads: list[int] = field(default_factory=list)  # of global memory; bytes a thread
    stores: list[int] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(
        default_factory=list
    )  # for loads: how many are under way then, and their bytes
    ahead: list[int] = field(default_factory=list)  # instructions between a load and the wait for it

    @property
    def loads_in_flight(self) -> float:
        """When a warp waits for one, on average over the waits."""
        return sum(loads for loads, _ in self.waits) / len(self.waits) if self.waits else 0.0

    @property
    def bytes_in_flight(self) -> float:
        """Of a thread, when it waits for one."""
        return sum(size for _, size in self.waits) / len(self.waits) if self.waits else 0.0


class Warp:
    """Where a warp is on its path, and which loads it waits for."""

    def __init__(self, path: Sequence[Instruction], before_loop: bool = False) -> None:
        self.path, self.before_loop = path, before_loop
        self.at = self.issued = 0
        # By barrier, of what will clear it: when it is there, bytes of a global load, and its place among all instructions.
        self.pending: list[list[tuple[float, int, int]]] = [[] for _ in range(6)]
        self.bases: set[str] = set()
        self.walk = Walk()

    def ready(self, now: float) -> float:
        """When its next instruction can be issued, at `now` at the earliest."""
        waits = self.path[self.at].waits
        return max([now, *(time for i in range(6) if waits >> i & 1 for time, _, _ in self.pending[i])])

    def issue(self, asked: float, now: float) -> float:
        """Issues its next instruction at `now`, `asked` without what it waits for; returns when the warp goes on."""
        one, record = self.path[self.at], self.walk
        for i in range(6):
            if one.waits >> i & 1 and self.pending[i]:
                loads = [(time, number) for time, size, number in self.pending[i] if size]
                if any(time > asked for time, _ in loads):
                    under_way = [size for some in self.pending for time, size, _ in some if size and time > asked]
                    record.waits.append((len(under_way), sum(under_way)))
                record.ahead += [self.issued - number for _, number in loads]
                self.pending[i] = []
                asked = max([asked, *(time for time, _ in loads)])
        size = one.bytes if one.name in GLOBAL_LOADS else 0
        if one.sets is not None:
            latency = self._latency_of_load(one) if size else LATENCIES.get(one.name, OTHER_LATENCY)
            self.pending[one.sets].append((now + latency, size, self.issued))
        record.instructions += 1
        record.special += one.name == "MUFU"
        if size:
            record.loads.append(size)
        if one.name in GLOBAL_STORES:
            record.stores.append(one.bytes)
        self.issued += 1
        self.at = (self.at + 1) % len(self.path)
        return now + one.pause

    def _latency_of_load(self, one: Instruction) -> float:
        """Before the main loop, small tensors are read, which a cache holds; beside one that was read, the nearest cache."""
        if not self.before_loop:
            return MEMORY_LATENCY
        base = re.search(r"\[(\w+)", one.operands)
        near = base is not None and base[1] in self.bases
        self.bases |= {base[1]} if base else set()
        return FIRST_LEVEL_LATENCY if near else SECOND_LEVEL_LATENCY


def walk(path: Sequence[Instruction], rounds: int = ROUNDS, before_loop: bool = False) -> Walk:
    """Of one warp alone in the last round."""
    warp, now, begun = Warp(path, before_loop), 0.0, 0.0
    for _ in range(rounds):
        warp.walk, begun = Walk(), now
        for _ in path:
            now = warp.issue(now, warp.ready(now))
    warp.walk.cycles = now - begun
    return warp.walk


def cycles_of_round(path: Sequence[Instruction], warps: int) -> float:
    """Of all `warps` of a quarter, as long as none of them ends: in each cycle the first that can issues its next instruction."""
    if not path or not warps:
        return 0.0
    running = [Warp(path) for _ in range(warps)]
    done = [0.0] * warps  # with the instruction before
    waiting = [(0.0, i) for i in range(warps)]  # when it can issue
    ready: list[int] = []
    now = special_free = began = 0.0
    issued, a_round = 0, len(path) * warps
    while issued < (WARM_UP + ROUNDS) * a_round:
        if not ready:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            heapq.heappush(ready, heapq.heappop(waiting)[1])
        i = heapq.heappop(ready)
        if running[i].path[running[i].at].name == "MUFU":
            if now < special_free:
                heapq.heappush(waiting, (special_free, i))
                continue
            special_free = now + SPECIAL_CYCLES
        done[i] = running[i].issue(done[i], now)
        heapq.heappush(waiting, (running[i].ready(done[i]), i))
        now += 1
        issued += 1
        if issued == WARM_UP * a_round:
            began = now
    return (now - began) / ROUNDS


def blocks_on_multiprocessor(threads: int, registers: int, shared_bytes: int) -> int:
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_warp // QUARTERS * QUARTERS // warps if of_warp else MAX_BLOCKS
    by_shared = SHARED_BYTES // (shared_bytes + SHARED_BYTES_OF_SYSTEM)
    return min(MAX_BLOCKS, MAX_THREADS // (warps * 32), by_registers, by_shared)


@dataclass(frozen=True)
class Prediction:
    microseconds: float
    percent_of_copy: float
    waves: float
    bytes: float  # that it must move


def predict(
    path: Sequence[Instruction],
    *,
    blocks: int,
    threads: int,
    on_multiprocessor: int,
    before: float,
    rounds: float,
    floor_bytes: float,
) -> Prediction:
    """Of a launch of `blocks` x `threads`, each of whose warps takes `rounds` of the path, `before` cycles after its beginning,
    and which must move `floor_bytes`."""
    warps = math.ceil(threads / 32)
    waves = blocks / (MULTIPROCESSORS * on_multiprocessor)

    def wave(resident: int) -> float:
        """Cycles of `resident` blocks a multiprocessor from beginning to end."""
        moved = floor_bytes / blocks * resident / QUARTERS  # bytes of a quarter
        memory = moved / COPY_BYTES_A_CYCLE
        issue = before + rounds * cycles_of_round(path, math.ceil(resident * warps / QUARTERS))
        return (issue**SHARPNESS + memory**SHARPNESS) ** (1 / SHARPNESS)

    full = int(waves)
    rest = math.ceil((blocks - full * MULTIPROCESSORS * on_multiprocessor) / MULTIPROCESSORS)
    cycles = full * wave(on_multiprocessor) if full else 0.0
    cycles += wave(rest) if rest else 0.0
    seconds = cycles / HERTZ
    return Prediction(seconds * 1e6, 100 * floor_bytes / COPY_BYTES_A_SECOND / seconds, waves, floor_bytes)
