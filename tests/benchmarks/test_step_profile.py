"""Operators fall into the right families, forward and backward, calls are counted, and memory is that of a process."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import step_profile
from benchmarks.harness import measure
from benchmarks.step_profile import profile_step, scopes
from benchmarks.workload import OURS, Case, Implementation, Workload
from effdet_fast.nn import BatchNormAct2d, DepthwiseConv2d

CPU = torch.device("cpu")


class SqueezeExcite(nn.Module):
    """Named as timm's."""

    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Labeler:
    def label(self, x):
        return x.detach().exp()


def step_of(model):
    x = torch.randn(2, 8, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_families_of_our_operators_by_their_names():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8, activation="silu"), DepthwiseConv2d(8, 3, padding=1))
    profile = profile_step(step_of(model), CPU)
    expected = {"depthwise convolution", "other convolutions", "batch norm, activation", "optimizer", "rest"}
    assert set(profile.seconds) == expected and min(profile.seconds.values()) > 0
    assert profile.launches >= 3


def test_families_of_a_peer_by_its_modules():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), SqueezeExcite())
    step = step_of(model)
    assert "squeeze-excite" not in profile_step(step, CPU).seconds
    with scopes(model):
        seconds = profile_step(step, CPU).seconds
    assert {"depthwise convolution", "batch norm, activation", "squeeze-excite", "optimizer"} <= set(seconds)
    assert "other convolutions" not in seconds
    assert not model[2]._forward_hooks and not model[2]._forward_pre_hooks


def test_the_backward_counts_with_its_forward(monkeypatch):
    model = nn.Sequential(nn.Identity(), SqueezeExcite())
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    seen = []
    family = step_profile._family
    monkeypatch.setattr(step_profile, "_family", lambda e, n: seen.append((e.name, family(e, n))) or seen[-1][1])
    with scopes(model):
        profile_step(lambda: model(x).sum().backward(), CPU)
    assert ("SigmoidBackward0", "squeeze-excite") in seen and ("SumBackward0", "rest") in seen


def test_methods_are_told_apart_and_given_back():
    labeler, x = Labeler(), torch.randn(10)
    with scopes(nn.Identity(), ((labeler, "label", "labels"),)):
        assert "labels" in profile_step(lambda: labeler.label(x), CPU).seconds
    assert "label" not in vars(labeler) and torch.equal(labeler.label(x), x.exp())


def keep(megabytes):
    """A step that holds so much at once, and a peer that holds twice as much."""

    def step(count):
        return torch.ones(count << 18).sum()

    one = partial(torch.ones, ())
    peer = Implementation("peer", one, step=partial(step, 2 * megabytes))
    return Workload(Implementation(OURS, one, step=partial(step, megabytes)), peer, {"step": 1}, [peer])


def build(megabytes, device, dtype, layout):
    return keep(megabytes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_alone_in_a_process_and_what_it_grows_by():
    case = Case("holds 200 MB", partial(build, 200))
    plain, tuned = measure("training_step", case, CPU, torch.float32, "contiguous", min_rounds=3)
    assert (plain.setting, tuned.setting) == ("float32", "float32, after tune_cpu()")
    for row in (plain, tuned):
        assert set(row.timings) == set(row.profiles) == {OURS, "peer"}
        assert all(timing.rounds == 6 and 0 < timing.median < 1 and timing.first > 0 for timing in row.timings.values())
    assert tuned.ours.median < plain.ours.median  # no fresh pages
    ours, peer = (plain.timings[name].peak_bytes / 2**20 for name in (OURS, "peer"))
    assert 190 < ours < 300 and 390 < peer < 500
    assert tuned.ours.peak_bytes > 190 << 20


@pytest.mark.cuda
def test_kernels_and_their_time_on_a_gpu():
    x = torch.randn(1 << 20, device="cuda")
    profile = profile_step(lambda: (x + 1).relu_(), torch.device("cuda"))
    assert profile.launches == 2 and profile.seconds.keys() == {"batch norm, activation", "rest"}
