"""The kernels that read or write whole maps: what each must move, its launch and its code, and what those predict together."""

import re
from dataclasses import dataclass
from statistics import median

from benchmarks.launches import Call
from benchmarks.machine_code import Accesses, Code, Instruction
from benchmarks.prediction import Prediction, Walk, blocks_on_multiprocessor, predict, walk
from tests.emulation.observation import Launch


@dataclass(frozen=True)
class Hot:
    """What a kernel moves once at least: a letter for each, x for all maps that are inputs of its operator and for their
    gradients, y for the results and theirs. Its elements are those of the last letter's.

    common: its accesses where another case moves more. activated: the cases have an activation that another would not.
    with_prologue: what it moves then, if that is not the same.
    """

    kernel: str
    moves: str
    common: Accesses | None = None
    activated: bool = False
    with_prologue: str | None = None


HOT = (
    Hot(r"depthwise_conv_kernel<", "xy"),
    Hot(r"depthwise_conv_grad_input_kernel<", "yx", with_prologue="yxx"),
    Hot(r"depthwise_conv_grad_weight_kernel<", "xy"),
    Hot(r"batch_norm_stats_kernel<", "x"),
    Hot(r"batch_norm_act_kernel<", "xx"),
    Hot(r"batch_norm_act_sums_kernel<", "xx"),
    Hot(r"batch_norm_act_grad_input_kernel<", "xxx"),
    Hot(r"squeeze_excite_reduce_kernel<\w+, \d, false", "x"),
    Hot(r"squeeze_excite_reduce_kernel<\w+, \d, true", "xx"),
    Hot(r"squeeze_excite_scale_kernel<", "xx"),
    # One plain input and one nearest, of which a round takes a pixel and its four children; two plain and one pooled, whose
    # maxima and taps are kept.
    Hot(r"fusion_kernel<2, \(Resample\)1, false, [48]", "xy", Accesses(16, 5, 4), activated=True),
    Hot(r"fusion_kernel<3, \(Resample\)2, true, 8", "xyy", Accesses(8, 11, 3), activated=True),
    Hot(r"fusion_kernel<3, \(Resample\)2, true, 4", "xyy", Accesses(4, 11, 3), activated=True),
    Hot(r"fusion_backward_kernel<2, \(Resample\)1, [48]", "yxx", Accesses(16, 9, 5), activated=True),
    Hot(r"fusion_backward_kernel<3, \(Resample\)0, [48]", "yyyyyyy", Accesses(16, 4, 3), activated=True),
    Hot(r"fusion_max_pool_backward_kernel<[48]", "yyyyy"),
    Hot(r"detection_loss_kernel<", "xx", Accesses(16, 1, 1)),  # a vector of background
)


@dataclass(frozen=True)
class Analysis:
    """Of one launch of a hot kernel: what a round of its main path does, and what is predicted of the whole."""

    round: Walk
    blocks: int  # on a multiprocessor
    elements: float  # of a thread in a round
    prediction: Prediction

    @property
    def instructions(self) -> float:
        """An element."""
        return self.round.instructions / self.elements

    @property
    def special(self) -> float:
        return self.round.special / self.elements

    def bytes_in_flight(self, threads: int) -> float:
        """On a multiprocessor."""
        return self.round.bytes_in_flight * threads * self.blocks

    @property
    def ahead(self) -> float:
        return median(self.round.ahead) if self.round.ahead else 0.0


def hot(kernel: str) -> Hot | None:
    """`kernel`: its C++ name."""
    return next((one for one in HOT if re.search(rf"::{one.kernel}", kernel)), None)


def analyze(kernel: Hot, code: Code, registers: int, call: Call, launch: Launch, itemsize: int) -> Analysis:
    """`itemsize`: bytes of an element."""
    way_in, path = main_path(kernel, code, call.has_prologue)
    once, before = walk(path), walk(way_in, rounds=1, before_loop=True)
    blocks, threads = _product(launch.grid), _product(launch.block)
    warps = -(-threads // 32)
    widest = max(once.loads)
    rounds = rounds_of(path, before, launch.loads.of_width[widest] / (launch.blocks_run * warps))
    moves = kernel.with_prologue if call.has_prologue and kernel.with_prologue else kernel.moves
    size = {"x": call.x, "y": call.y}
    fit = blocks_on_multiprocessor(threads, registers, launch.shared_bytes)
    prediction = predict(
        path,
        blocks=blocks,
        threads=threads,
        on_multiprocessor=fit,
        before=before.cycles,
        rounds=rounds,
        floor_bytes=sum(size[letter] for letter in moves),
    )
    elements = size[moves[-1]] / itemsize / (blocks * warps * 32 * rounds)
    return Analysis(once, fit, elements, prediction)


def rounds_of(path: list[Instruction], before: Walk, loads: float) -> float:
    """Rounds of `path` that a warp takes if it executes so many of its widest loads, those before the loop included. What a round
    loads for the next one is loaded for the first one there, beside constants."""
    once = walk(path, rounds=1)
    of_round, at_first = (some.loads.count(max(once.loads)) for some in (once, before))
    carried = min(len(once.loads) - len(once.ahead), at_first)
    return (loads - at_first + carried) / of_round


def main_path(kernel: Hot, code: Code, has_prologue: bool = False) -> tuple[list[Instruction], list[Instruction]]:
    """As `Code.main`. Without a prologue a kernel that would read x for it does not load it, as often as it stores."""
    common = kernel.common
    if kernel.with_prologue and not has_prologue:
        most = walk(code.main()[1], rounds=1)
        common = Accesses(min(most.loads), len(most.loads) - len(most.stores), len(most.stores))
    return code.main(common, activated=has_prologue or kernel.activated)


def _product(size: tuple[int, int, int]) -> int:
    return size[0] * size[1] * size[2]
