import math

import pytest
import torch

from effdet_fast.training.distributed import Processes
from effdet_fast.training.monitor import LossMonitor, LossSums, NonFiniteLoss


def _record(monitor, step, total=1.0, norm=1.0, ids=(1, 2)):
    losses = (torch.tensor(total), torch.tensor(total / 4), torch.tensor(total * 3 / 4))
    monitor.record(step, losses, torch.tensor(norm), torch.tensor(ids))


def _monitor(**options):
    return LossMonitor(torch.device("cpu"), Processes(), **{"window": 4, **options})


def test_means_count_every_step_once_over_windows_and_flushes():
    monitor = _monitor()
    for step in range(10):
        _record(monitor, step, total=float(step))
    monitor.flush()
    assert monitor.sums.steps == 10
    assert monitor.sums.means() == pytest.approx((4.5, 4.5 / 4, 4.5 * 3 / 4))
    monitor.flush()
    assert monitor.sums.steps == 10
    monitor.start_epoch(LossSums(1, 2.0, 1.0, 1.0))
    assert monitor.sums.means() == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_names_its_step_and_images_within_a_window(value):
    monitor = _monitor()
    for step in range(5):
        _record(monitor, step)
    _record(monitor, 5, total=value, ids=(77, 78))
    with pytest.raises(NonFiniteLoss) as raised:
        for step in range(6, 12):
            _record(monitor, step, total=math.nan)
    assert step < 10
    error = raised.value
    assert (error.step, error.image_ids, error.what) == (5, [77, 78], "loss")
    assert "step 5" in str(error) and "[77, 78]" in str(error)


def test_skipped_steps_count_from_the_second_window_behind_on():
    monitor = _monitor(scaled=True)
    seen = []
    for step in range(17):
        seen.append(monitor.steps_taken(step))
        _record(monitor, step, norm=math.inf if step in (0, 1, 5) else 1.0)
    assert monitor.skipped == [0, 1, 5]
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 9, 10, 11, 12, 13]
    resumed = _monitor(scaled=True)
    resumed.skipped = [0, 1, 5]
    assert [resumed.steps_taken(step) for step in range(17)] == seen


def test_a_non_finite_gradient_stops_a_run_without_a_scaler():
    monitor = _monitor()
    _record(monitor, 0, norm=math.inf, ids=(9,))
    with pytest.raises(NonFiniteLoss, match="non-finite gradient in step 0") as raised:
        monitor.flush()
    assert raised.value.image_ids == [9]


def test_a_scaler_may_skip_steps_but_not_for_ever():
    monitor = _monitor(scaled=True, patience=6)
    for step in range(5):
        _record(monitor, step, norm=math.inf)
    _record(monitor, 5)
    monitor.flush()
    assert monitor.sums.steps == 6 and monitor.sums.means() == (1.0, 0.25, 0.75)  # their losses are right
    for step in range(6, 11):
        _record(monitor, step, norm=math.nan)
    monitor.flush()
    _record(monitor, 11, norm=math.nan)
    with pytest.raises(NonFiniteLoss, match="gradient in step 11"):
        monitor.flush()
