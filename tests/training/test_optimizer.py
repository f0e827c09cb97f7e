import copy
import math

import pytest
import torch
from torch import nn

from effdet_fast.training.optimizer import (
    DeviceLearningRates,
    clip_gradients,
    create_optimizer,
    marked_capturable,
    parameter_groups,
    set_learning_rate,
    set_skip_flag,
)
from tests.checks import all_equal


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.edge_weights = nn.Parameter(torch.ones(3))

    def forward(self, x):
        scale, shift = self.bn.weight.view(1, -1, 1, 1), self.bn.bias.view(1, -1, 1, 1)
        return (self.conv(x).tanh() * scale + shift).square().sum() * self.edge_weights.sum()


def test_only_convolution_weights_decay():
    model = Small()
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [model.conv.weight]
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (model.conv.bias, model.bn.weight, model.bn.bias, model.edge_weights)
    }


def test_frozen_parameters_are_left_out_and_all_frozen_is_an_error():
    model = Small()
    model.bn.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 3
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(model, 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_matches_the_plain_optimizer(name):
    torch.manual_seed(0)
    ours, plain = Small(), Small()
    plain.load_state_dict(ours.state_dict())
    optimizer = create_optimizer(ours, name=name, lr=0.05, weight_decay=0.01)
    if name == "sgd":
        peer = torch.optim.SGD(parameter_groups(plain, 0.01), lr=0.05, momentum=0.9, nesterov=True, foreach=False)
    else:
        peer = torch.optim.AdamW(parameter_groups(plain, 0.01), lr=0.05, foreach=False)
    for step in range(4):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        for model, chosen in ((ours, optimizer), (plain, peer)):
            chosen.zero_grad()
            model(x).backward()
            chosen.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_flagged_step_changes_nothing_even_the_first(name):
    torch.manual_seed(0)
    model, never_bad = Small(), Small()
    never_bad.load_state_dict(model.state_dict())
    optimizer = create_optimizer(model, name=name, lr=0.05, weight_decay=0.01)
    twin = create_optimizer(never_bad, name=name, lr=0.05, weight_decay=0.01)
    x = torch.randn(2, 3, 5, 5)

    before = {key: value.clone() for key, value in model.named_parameters()}
    (model(x) * math.nan).backward()
    norm = clip_gradients(list(model.parameters()), 1.0)
    set_skip_flag(optimizer, (~norm.isfinite()).float())
    optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key])

    for chosen, net in ((optimizer, model), (twin, never_bad)):
        chosen.zero_grad()
        net(x).backward()
        set_skip_flag(chosen, torch.zeros(()))
        chosen.step()
    for a, b in zip(model.parameters(), never_bad.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_clipping_returns_the_norm_before():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 0.0).item() == pytest.approx(5.0)
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_learning_rate_on_the_device_gives_the_same_bits(name):
    torch.manual_seed(0)
    plain, held = Small(), Small()
    held.load_state_dict(plain.state_dict())
    optimizers = [create_optimizer(model, name=name, lr=0.1, weight_decay=0.01) for model in (plain, held)]
    rates = DeviceLearningRates(optimizers[1], torch.device("cpu"))
    for step in range(3):
        x = torch.randn(2, 3, 5, 5)
        for model, optimizer in zip((plain, held), optimizers, strict=True):
            set_learning_rate(optimizer, 0.1 / (step + 1))
            if model is held:
                rates.take_over()
                assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
    assert all_equal(plain.parameters(), held.parameters())


def test_learning_rates_stay_where_they_are_whatever_is_put_in_their_place():
    optimizer = create_optimizer(Small(), name="sgd", lr=0.1, weight_decay=0.01)
    own = torch.tensor(0.3)
    optimizer.param_groups[1]["lr"] = own
    rates = DeviceLearningRates(optimizer, torch.device("cpu"))
    first = optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[1]["lr"] is own and first == torch.tensor(0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert own == torch.tensor(0.15)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.7
    rates.take_over()
    assert optimizer.param_groups[0]["lr"] is first and first == torch.tensor(0.7)
    optimizer.load_state_dict(saved)
    rates.take_over()
    assert optimizer.param_groups[0]["lr"] is first and optimizer.param_groups[1]["lr"] is own
    assert first == torch.tensor(0.05) and own == torch.tensor(0.15)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.9})
    rates.take_over()
    assert optimizer.param_groups[2]["lr"] == torch.tensor(0.9)


def test_the_mark_of_capture_is_taken_off_again():
    optimizer = create_optimizer(Small(), name="adamw", lr=0.1, weight_decay=0.01)
    with pytest.raises(RuntimeError, match="broken off"), marked_capturable(optimizer):
        assert all(group["capturable"] for group in optimizer.param_groups)
        raise RuntimeError("broken off")
    assert not any(group["capturable"] for group in optimizer.param_groups)
    with marked_capturable(sgd := create_optimizer(Small(), name="sgd", lr=0.1, weight_decay=0.01)):
        assert "capturable" not in sgd.param_groups[0]
