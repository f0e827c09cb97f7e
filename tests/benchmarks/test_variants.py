"""benchmarks/variants by emulation, against float64; damage to a variant is noticed; what machine code nvcc makes of them."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import cuobjdump
from effdet_fast._build_info import read_build_info
from tests.emulation.build import INCLUDE, ROOT

DEPTHWISE = ["words", "async, 2 ahead", "async, 4 ahead", "staged, 4 rows", "staged, 6 rows"]
LOSS = ["degree 8", "degree 4", "degree 3"]
CHAIN = ["every warp", "one thread", "one thread, sleeping"]
ASYNC, STAGED = DEPTHWISE[1:3], DEPTHWISE[3:]
MARGIN = 64  # values on each side of an array that no kernel may use; keeps the alignment

Damage = tuple[str, str, str]  # file, the text to damage, what it becomes
DAMAGES: list[tuple[list[Damage], list[str]]] = [
    (
        [
            ("depthwise_rows.cuh", "__syncthreads();  // this row", "// this row"),
            ("depthwise_rows.cuh", "wait_for_copies<kAhead>()", "wait_for_copies<kAhead + 1>()"),
            ("loss.cuh", "0.499999791f", "0.49f"),
            ("chain.cuh", "__syncthreads();\n      kept = heard", "kept = heard"),
        ],
        [*ASYNC, *STAGED, "degree 4", "one thread", "one thread, sleeping"],
    ),
    (
        [
            ("depthwise_rows.cuh", "x < m.w &&", "x <= m.w &&"),  # a column of the next row for the one outside
            ("depthwise_rows.cuh", "if (!(rows.valid >> i & 1)) own_", "if (false) own_"),
            ("loss.cuh", "kBar = 0xc02e", "kBar = 0xbf00"),
        ],
        [*ASYNC, *STAGED, "degree 4", "degree 3"],
    ),
    ([("depthwise_rows.cuh", "word & 0xffff0000u", "word & 0xff000000u")], ["words", *ASYNC, *STAGED]),
]


def build(root: Path, folder: Path) -> ctypes.CDLL:
    library = folder / "variants.so"
    source = root / "tests/emulation/variants_emulated.cpp"
    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-DEF_EMULATE_CUDA"]
    command = ["g++", *flags, f"-I{INCLUDE}", f"-I{root / 'tests/emulation'}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.loss.restype = ctypes.c_double
    loaded.depthwise.restype = loaded.chain.restype = ctypes.c_bool
    loaded.set_thread_order_seed(3)
    return loaded


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> ctypes.CDLL:
    return build(ROOT, tmp_path_factory.mktemp("variants"))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def with_margins(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy in the middle of NaN, and all of it."""
    whole = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    middle = whole[MARGIN:-MARGIN].view(tensor.shape)
    middle.copy_(tensor)
    return middle, whole


def is_close(found: torch.Tensor, whole: torch.Tensor, expected: torch.Tensor, smallest: float) -> bool:
    """As near as bfloat16 allows; nothing written beside it."""
    margins = torch.cat([whole[:MARGIN], whole[-MARGIN:]])
    near = torch.isclose(found.double(), expected, rtol=2**-8, atol=smallest)
    return bool(near.all() and margins.isnan().all())


def depthwise_is_right(library: ctypes.CDLL, variant: str, kernel: int, shape: tuple[int, ...], tile_rows: int) -> bool:
    n, c, h, w = shape
    x, _ = with_margins(torch.randn(n, h, w, c).bfloat16())
    weight = torch.randn(c, kernel, kernel).bfloat16()
    y, whole = with_margins(torch.full((n, h, w, c), torch.nan).bfloat16())
    sizes = map(ctypes.c_int64, (*shape, tile_rows))
    assert library.depthwise(variant.encode(), kernel, *sizes, *map(pointer, (x, weight, y)))
    expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight[:, None].double(), padding=kernel // 2, groups=c)
    return is_close(y, whole, expected.permute(0, 2, 3, 1), 1e-5)


def focal(x: torch.Tensor, labels: torch.Tensor, alpha: float, smoothing: float) -> torch.Tensor:
    target = (labels[:, None] == torch.arange(x.shape[1])).double()
    p = torch.sigmoid(x)
    p_t, alpha_t = p * target + (1 - p) * (1 - target), alpha * target + (1 - alpha) * (1 - target)
    cross_entropy = F.softplus(x) - x * (target * (1 - smoothing) + smoothing / 2)
    loss = alpha_t * (1 - p_t) ** 1.5 * cross_entropy
    return loss[labels != -2].sum()


def loss_is_right(
    library: ctypes.CDLL, variant: str, logits: torch.Tensor, labels: torch.Tensor, alpha: float, smoothing: float
) -> bool:
    x, _ = with_margins(logits.bfloat16())
    grad, whole = with_margins(torch.full(x.shape, torch.nan).bfloat16())
    scale = 0.5
    sizes = map(ctypes.c_int64, x.shape)
    numbers = ctypes.c_double(alpha), ctypes.c_double(smoothing), ctypes.c_float(scale)
    found = library.loss(variant.encode(), *sizes, *numbers, *map(pointer, (x, labels, grad)))
    exact = x.double().requires_grad_()
    expected = focal(exact, labels, alpha, smoothing)
    (slope,) = torch.autograd.grad(expected, exact)
    return abs(found / expected.item() - 1) < 1e-6 and is_close(grad, whole, scale * slope, 1e-7)


def losses() -> list[tuple]:
    low = torch.randn(56, 90) * 0.2 - 3.5  # all below -2.7
    mixed = torch.randn(112, 9) * 1.25 - 3  # a row is no multiple of a vector
    mixed[3, :4] = torch.tensor([-80.0, 80.0, -2.703125, -2.71875])
    mixed[32:64] = -2.71875
    mixed[64:96] = -2.703125
    background = torch.full((56,), -1, dtype=torch.int32)
    labels = torch.full((112,), -1, dtype=torch.int32)
    labels[::7], labels[::11] = torch.arange(16) % 9, -2
    return [(low, background, 0.25, 0.0), (mixed, labels, 0.25, 0.0), (mixed, labels, 0.4, 0.1)]


def mixed_bits(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def chain_words(chains: int, steps: int) -> list[int]:
    words = []
    for tile in range(chains * steps):
        suppressed = 0
        for kept in words[tile - tile % steps :]:
            suppressed = (suppressed << 1 | suppressed >> 63) & (1 << 64) - 1 ^ kept
        kept = 0
        for i in range(64):
            if not suppressed >> i & 1:
                first = (tile * 64 + i) * 3 + 1
                row = mixed_bits(first) & mixed_bits(first + 1) & mixed_bits(first + 2)
                kept |= 1 << i
                suppressed |= row >> (i + 1) << (i + 1)
        words.append(kept)
    return words


def chain_is_right(library: ctypes.CDLL, variant: str, chains: int, steps: int) -> bool:
    counter, published = torch.zeros(1, dtype=torch.int64), torch.zeros(chains * steps, 2, dtype=torch.int64)
    sizes = ctypes.c_int64(chains), ctypes.c_int64(steps)
    assert library.chain(variant.encode(), *sizes, pointer(counter), pointer(published))
    there = bool((published >> 32 == 1).all())
    low = [word & 0xFFFFFFFF for word in published.flatten().tolist()]
    return there and [a | b << 32 for a, b in zip(low[::2], low[1::2], strict=True)] == chain_words(chains, steps)


def wrong_variants(library: ctypes.CDLL) -> list[str]:
    shapes = [((2, 24, 7, 5), 3), ((1, 72, 9, 37), 4), ((1, 40, 2, 1), 32), ((1, 8, 6, 70), 5), ((1, 136, 5, 33), 9)]
    wrong = [
        variant
        for variant in DEPTHWISE
        if not all(depthwise_is_right(library, variant, k, shape, rows) for k in (3, 5) for shape, rows in shapes)
    ]
    wrong += [variant for variant in LOSS if not all(loss_is_right(library, variant, *given) for given in losses())]
    return wrong + [variant for variant in CHAIN if not chain_is_right(library, variant, 3, 7)]


def run(library: ctypes.CDLL, file: Path) -> tuple[int, list[dict]]:
    status = library.run_all(str(file).encode())
    return status, [json.loads(line) for line in file.read_text().splitlines()]


def test_all_variants_are_right(sound, one_thread):
    assert wrong_variants(sound) == []


@pytest.mark.parametrize(
    "damages, noticed",
    [pytest.param(*damage, id=str(i), marks=[pytest.mark.slow] if i else []) for i, damage in enumerate(DAMAGES)],
)
def test_damage_to_a_variant_is_noticed(tmp_path, one_thread, damages, noticed):
    for name in ("csrc", "tests/emulation", "benchmarks/variants"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file, before, after in damages:
        source = tmp_path / "benchmarks/variants" / file
        text = source.read_text()
        assert before in text, "the control no longer fits the variant"
        source.write_text(text.replace(before, after))
    library = build(tmp_path, tmp_path)
    assert wrong_variants(library) == noticed
    if DEPTHWISE[0] in noticed:  # with which the device compares the others
        return
    status, lines = run(library, tmp_path / "out.jsonl")
    assert status == 1 and {line["variant"] for line in lines if not line["agrees"]} <= set(noticed)


def test_the_program_writes_a_line_for_each(sound, tmp_path, capfd):
    status, lines = run(sound, tmp_path / "out.jsonl")
    assert status == 0 and [line["variant"] for line in lines] == 4 * DEPTHWISE + 2 * LOSS + 2 * CHAIN
    assert all(line["agrees"] and line["difference"] < 0.01 and line["milliseconds"] > 0 for line in lines)
    assert all((line["percent_of_copy"] is None) == (line["case"] == "chain") for line in lines)
    assert (tmp_path / "out.jsonl").read_text() == capfd.readouterr().out


@pytest.mark.parametrize("degree, exact_error", [(4, 1e-9), (3, 5e-8)])
def test_the_short_polynomials_are_as_good_as_the_long_one(sound, degree, exact_error):
    """Whose relative error is 2e-7 (csrc/common/math.h), in float32; their own, apart from rounding, is less."""
    s = torch.cat([torch.linspace(1e-6, 1 / 16, 200001), torch.logspace(-35, -1.3, 20001)]).clamp(max=1 / 16)
    single, exact = torch.empty_like(s), torch.empty(s.shape, dtype=torch.float64)
    sound.low_polynomial(degree, ctypes.c_int64(len(s)), *map(pointer, (s, single, exact)))
    expected = -torch.log1p(-s.double())
    assert (exact / expected - 1).abs().max() < exact_error
    assert (single.double() / expected - 1).abs().max() < 2e-7


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None or cuobjdump.find_cuobjdump() is None, reason="needs nvcc and cuobjdump"
)
def test_what_nvcc_makes_of_them(tmp_path):
    program = tmp_path / "variants"
    command = [sys.executable, "-m", "benchmarks.variants", str(program)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"})
    assert read_build_info(program) == {"cuda_archs": "sm_90"}
    libraries = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in libraries and "libcuda" not in libraries and "not found" not in libraries
    tool = cuobjdump.find_cuobjdump()
    assert tool is not None
    found = cuobjdump.resources(program, tool)
    assert len(found) >= 2 * 7 + 3 + 3 and [symbol for (symbol, _), kernel in found.items() if kernel.stack] == []
