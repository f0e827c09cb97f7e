import math

import pytest

from effdet_fast.training.optimizer import WarmupCosine


def test_warmup_is_linear_and_the_cosine_ends_near_zero():
    schedule = WarmupCosine(peak=0.8, warmup_steps=4, total_steps=24)
    rates = [schedule(step) for step in range(24)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert rates[14] == pytest.approx(0.4)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert rates[-1] == pytest.approx(0.4 * (1 + math.cos(math.pi * 19 / 20)))


def test_without_warmup_the_first_step_has_the_peak():
    assert WarmupCosine(peak=0.1, warmup_steps=0, total_steps=1)(0) == pytest.approx(0.1)
