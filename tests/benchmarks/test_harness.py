"""The harness on tiny cases: what is wrong is not timed, what is right is, and who fails is named."""

import pytest
import torch

from benchmarks import timing
from benchmarks.correctness import TOLERANCE, WrongResultError, check
from benchmarks.harness import measure
from benchmarks.records import OURS
from benchmarks.table import format_row
from benchmarks.timing import CpuClock, CudaClock, Task, copy_task, interleaved
from benchmarks.workload import Case, Implementation, Workload, optional

CPU = torch.device("cpu")


def doubling(scale_of_ours: float = 2.0, spoil_gradient: bool = False, spoil_one: bool = False) -> Case:
    """The function 2 x, with ways to get ours wrong."""

    def build(device: torch.device, dtype: torch.dtype, layout: str) -> Workload:
        x = torch.randn(1000, device=device).to(dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()

        def ours():
            y = scale_of_ours * x
            if spoil_gradient:
                y = y.detach() + 0.5 * (y - y.detach())
            if spoil_one:
                y = y + torch.nn.functional.one_hot(torch.tensor(500, device=device), 1000) * 0.1
            return y

        def breaks():
            raise NotImplementedError("not on this device\nand more")

        return Workload(
            ours=Implementation(OURS, ours, (x,)),
            oracle=Implementation("float64", lambda: 2 * exact, (exact,)),
            bytes={"forward": 8000, "backward": 8000, "both": 16000},
            peers=[
                Implementation("sum", lambda: x + x, (x,)),
                Implementation("wrong", lambda: 3 * x, (x,)),
                Implementation("broken", breaks, (x,)),
            ],
            absent={"missing": "ModuleNotFoundError: No module named 'missing'"},
        )

    return Case("doubling", build)


def rows_of(case: Case, **options):
    return list(measure("doubling", case, CPU, torch.float32, "contiguous", seconds=0.001, min_rounds=3, **options))


def test_times_what_is_right_in_each_phase():
    rows = rows_of(doubling())
    assert [row.phase for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert set(row.timings) == {OURS, "sum"}
        assert row.ours.rounds >= 3 and row.copy.rounds == row.ours.rounds
        assert 0 < row.ours.q20 <= row.ours.median <= row.ours.q80
        assert row.ours.error < 1e-6
        assert row.ours.peak_bytes is None
        assert row.best_peer[0] == "sum"
        assert row.speed_up == row.timings["sum"].median / row.ours.median


def test_names_peers_that_are_wrong_broken_or_missing():
    problems = rows_of(doubling())[0].problems
    assert problems["wrong"].startswith("wrong result: result 0 is off by")
    assert problems["broken"] == "failed: NotImplementedError: not on this device"
    assert problems["missing"] == "ModuleNotFoundError: No module named 'missing'"


@pytest.mark.parametrize(
    "wrong, result",
    [
        ({"scale_of_ours": 2.01}, 0),
        ({"scale_of_ours": float("nan")}, 0),
        ({"spoil_gradient": True}, 1),
        ({"spoil_one": True}, 0),
    ],
)
def test_a_wrong_op_is_reported_and_not_timed(wrong, result):
    for row in rows_of(doubling(**wrong)):
        assert row.ours is None and row.timings == {} and row.copy is None and row.speed_up is None
        assert row.problems[OURS].startswith(f"wrong result: result {result} is off by")
        assert row.problems[OURS] in format_row(row)


def test_the_wanted_phases_and_peers_only():
    (row,) = rows_of(doubling(), phases=("both",), peers=())
    assert row.phase == "both" and set(row.timings) == {OURS} and set(row.problems) == {"missing"}


def test_integer_results_must_be_equal():
    expected = [torch.tensor([1, 2, 3])]
    assert check(Implementation("x", lambda: torch.tensor([1, 2, 3])), expected, None, torch.float32, False) == 0
    with pytest.raises(WrongResultError, match="differs in 1 of 3 values"):
        check(Implementation("x", lambda: torch.tensor([1, 2, 4])), expected, None, torch.float32, True)


def test_shapes_and_number_of_results_are_checked():
    expected = [torch.ones(2, 3)]
    with pytest.raises(WrongResultError, match=r"shape \[3\] instead of \[2, 3\]"):
        check(Implementation("x", lambda: torch.ones(3)), expected, None, torch.float32, False)
    with pytest.raises(WrongResultError, match="2 results instead of 1"):
        check(Implementation("x", lambda: (torch.ones(2, 3), torch.ones(1))), expected, None, torch.float32, False)


def test_gradients_may_share_one_scale():
    """And a tolerance; what comes before them is held to its own."""
    exact = [torch.ones(()).double(), torch.ones(100).double(), torch.zeros(100).double()]

    def off_by(loss: float, gradient: float) -> Implementation:
        return Implementation("x", lambda: (torch.tensor(1 + loss), torch.ones(100), torch.full((100,), gradient)))

    with pytest.raises(WrongResultError, match="result 2 is off"):
        check(off_by(0, 1e-5), exact, None, torch.float32, False)
    given = (exact, None, torch.float32, False)
    assert check(off_by(0, 1e-5), *given, gradient_tolerance=1e-3) == pytest.approx(1e-5)
    assert check(off_by(5e-5, 1e-5), *given, gradient_tolerance=1e-3) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(WrongResultError, match="the vector of all gradients is off by 5.0e-03 of its norm"):
        check(off_by(0, 5e-3), *given, gradient_tolerance=1e-3)
    with pytest.raises(WrongResultError, match="result 0 is off"):
        check(off_by(5e-3, 0), *given, gradient_tolerance=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gate_lets_correct_rounding_through(dtype):
    exact = torch.randn(10000, dtype=torch.float64)
    assert check(Implementation("x", lambda: exact.to(dtype)), [exact], None, dtype, False) < TOLERANCE[dtype]


class FakeClock:
    """Each run takes a second; remembers who ran."""

    def __init__(self):
        self.ran = []

    def seconds(self, task):
        self.ran.append(task.run(None))
        return 1.0


@pytest.mark.parametrize("seconds, rounds", [(0, 5), (21, 7), (10000, 200)])
def test_turns_are_taken_each_round_in_another_order(seconds, rounds):
    clock = FakeClock()
    tasks = {name: Task(lambda _, name=name: name) for name in "abc"}
    samples, failures = interleaved(tasks, clock, seconds)
    assert failures == {}
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", rounds)
    turns = ["".join(clock.ran[i : i + 3]) for i in range(6, len(clock.ran), 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 2
    if rounds == 200:
        assert len(set(turns)) == 6 and min(map(turns.count, turns)) > 15


def test_one_that_fails_in_a_round_costs_no_other(monkeypatch):
    calls = iter(range(100))

    def sometimes(_):
        if next(calls) == 4:  # two runs before the rounds, each of them twice on a CPU
            raise RuntimeError("out of something\nand more")

    samples, failures = interleaved({"a": Task(lambda _: None), "b": Task(sometimes)}, CpuClock(), 0.0, 3)
    assert set(samples) == {"a"} and len(samples["a"]) == 3
    assert failures == {"b": "failed: RuntimeError: out of something"}


def failing_in_the_second_run(of_ours: bool) -> Case:
    """Right when it is checked, and failing when it is timed."""

    def build(device, dtype, layout):
        x, runs = torch.randn(10), []

        def fails():
            runs.append(None)
            if len(runs) > 1:
                raise RuntimeError("second run")
            return 2 * x

        first, second = (fails, lambda: 2 * x) if of_ours else (lambda: 2 * x, fails)
        return Workload(
            ours=Implementation(OURS, first),
            oracle=Implementation("float64", lambda: 2 * x.double()),
            bytes={"forward": 80},
            peers=[Implementation("peer", second)],
        )

    return Case("failing", build)


@pytest.mark.parametrize("of_ours, timed", [(False, {OURS}), (True, set())])
def test_who_fails_when_timed_is_named(of_ours, timed):
    (row,) = rows_of(failing_in_the_second_run(of_ours))
    assert set(row.timings) == timed
    assert row.problems == {OURS if of_ours else "peer": "failed: RuntimeError: second run"}


def test_a_graph_is_captured_before_the_rounds():
    runs = []
    task = Task(lambda _: runs.append(len(runs)), captured_after=3)
    clock = FakeClock()
    samples, _ = interleaved({"graphed": task, "other": Task(lambda _: None)}, clock, 0.0, 5)
    assert len(runs) == 4 + 1 + 5 and len(samples["graphed"]) == 5


def test_the_peak_of_a_graphed_step_has_the_pool_of_its_graph(monkeypatch):
    segments = [
        {"device": 0, "segment_pool_id": pool, "total_size": size}
        for pool, size in (((0, 0), 7), ((0, 1), 100), ((0, 1), 20))
    ]
    peak = {"memory_snapshot": segments, "memory_allocated": 5, "max_memory_allocated": 9}
    for name, value in {**peak, "synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    clock = CudaClock.__new__(CudaClock)
    clock.device = torch.device("cuda", 0)
    assert clock.peak_bytes(Task(lambda _: None)) == 4
    assert clock.peak_bytes(Task(lambda _: None, captured_after=3)) == 124


@pytest.mark.parametrize("tf32", [None, False, True])
def test_tf32_is_off_where_results_are_checked_and_as_wanted_where_they_are_timed(tf32):
    seen = []

    def build(device, dtype, layout):
        x = torch.randn(10)

        def ours():
            seen.append(torch.backends.cudnn.allow_tf32)
            return 2 * x

        oracle = Implementation("float64", lambda: 2 * x.double())
        return Workload(ours=Implementation(OURS, ours), oracle=oracle, bytes={"forward": 80})

    torch.backends.cudnn.allow_tf32 = True
    try:
        (row,) = rows_of(Case("convolves", build), tf32=tf32)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = False
    assert seen[0] is False and set(seen[1:]) == {tf32 is not False}
    assert row.tf32 is tf32
    assert row.precision == {None: "float32", False: "float32 without TF32", True: "float32 with TF32"}[tf32]


def test_compiled_peers_can_be_left_out():
    case = doubling()

    def build(*given):
        workload = case.build(*given)
        workload.peers.append(Implementation("sum, compiled", workload.peers[0].forward, workload.peers[0].leaves))
        return workload

    for compiled_peers in (True, False):
        (row,) = rows_of(Case("doubling", build), phases=("forward",), compiled_peers=compiled_peers)
        assert ("sum, compiled" in row.timings) == compiled_peers


def test_the_cpu_clock_times_the_second_of_two_runs(monkeypatch):
    order = []
    task = Task(lambda prepared: order.append(f"run {prepared}"), lambda: order.append("prepare") or 7)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(order.append("time") or len(order)))
    assert CpuClock().seconds(task) == 2
    assert order == ["prepare", "run 7", "prepare", "time", "run 7", "time"]


def test_the_gpu_clock_flushes_the_cache_outside_of_what_it_times(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 2500.0

    class Buffer:
        def zero_(self):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock.__new__(CudaClock)
    clock.flush_buffer = Buffer()
    task = Task(lambda prepared: order.append(f"run {prepared}"), lambda: order.append("prepare") or "it")
    assert clock.seconds(task) == 2.5
    assert order == ["prepare", "flush", "record", "run it", "record", "synchronize"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_measures_on_a_gpu():
    rows = list(measure("doubling", doubling(), torch.device("cuda"), torch.float32, "contiguous", seconds=0.01))
    assert [row.phase for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert set(row.timings) == {OURS, "sum"} and 1e-7 < row.ours.median < 1e-2
        assert 4000 <= row.ours.peak_bytes < 100_000
    assert CudaClock(torch.device("cuda")).flush_buffer.numel() >= 2 * torch.cuda.get_device_properties(0).L2_cache_size


def test_a_copy_moves_the_bytes_and_no_zeros():
    target = copy_task(1000, CPU).run(None)
    assert target.numel() == 500 and target.unique().numel() > 100


def test_a_missing_module_is_noted():
    absent: dict[str, str] = {}
    assert optional("no_such_package.at_all", absent) is None
    assert absent == {"no_such_package": "ModuleNotFoundError: No module named 'no_such_package'"}
    assert optional("json", absent).dumps({}) == "{}"
