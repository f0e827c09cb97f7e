"""`accelerate` changes what modules run on, and nothing else of a model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import effdet_fast
from effdet_fast.acceleration import FAMILIES


class Model(nn.Module):
    """Depthwise convolutions, BatchNorms and activations as PyTorch's users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        )
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.head(self.dilated(self.block(self.stem(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x():
    return torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(1))


def classes(model):
    return [type(module) for module in model.modules()]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def run(model, x):
    """Output, gradients of the parameters, buffers after it."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return y.detach(), grads, {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_stay(model, x, training):
    model.train(training)
    plain = copy.deepcopy(model)
    report = effdet_fast.accelerate(model)
    assert len(report.swapped) >= 5
    assert_same(run(model, x), run(plain, x))


def test_state_and_parameters_stay(model):
    state, parameters = dict(model.state_dict()), list(model.parameters())
    effdet_fast.accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.block[0], nn.Conv2d) and isinstance(model.stem, nn.Sequential)


def test_restore_undoes_it(model, x):
    before, attributes = classes(model), [set(module.__dict__) for module in model.modules()]
    effdet_fast.accelerate(model)
    assert classes(model) != before
    assert effdet_fast.restore(model) is model
    assert classes(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes


def test_an_optimizer_made_before_goes_on(model, x):
    plain = copy.deepcopy(model)
    runs = []
    for each, accelerated in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        if accelerated:
            effdet_fast.accelerate(each)
        for _ in range(3):
            run(each, x)
            optimizer.step()
        runs.append(each.state_dict())
    assert_same(*runs)


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_stay_accelerated(model, x, trip):
    effdet_fast.accelerate(model)
    if trip == "deepcopy":
        other = copy.deepcopy(model)
    elif trip == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert classes(other) == classes(model)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(other.eval()(x), model.eval()(x))
    effdet_fast.restore(other)
    assert nn.Conv2d in classes(other) and effdet_fast.restore(model) and classes(other) == classes(model)


@pytest.mark.parametrize("part", ["stem.1", "stem.2", "block.3", "head.0", "head.1", "block"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_are_called(model, x, part, before):
    """Those there were before, and those registered after."""
    calls = []
    module = model.get_submodule(part)
    if before:
        module.register_forward_hook(lambda *_: calls.append(part))
    plain = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    if not before:
        module.register_forward_hook(lambda *_: calls.append(part))
    calls.clear()
    y = model(x)
    assert calls == [part]
    assert_same(y, plain(x))


def test_a_hook_between_two_modules_keeps_them_apart(model):
    model.stem[1].register_forward_hook(lambda *_: None)
    assert "stem" not in {row.path for row in effdet_fast.accelerate(model).swapped}


def test_an_in_place_activation_still_writes_to_its_input(x):
    model = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(3, 3, 3, groups=3))
    report = effdet_fast.accelerate(model)
    assert [row.path for row in report.swapped] == ["1"]
    seen = x.clone()
    model(seen)
    assert torch.equal(seen, nn.functional.silu(x))


def test_the_report_gives_reasons(model):
    model.three = nn.Conv2d(4, 12, 3, groups=4)
    model.reflect = nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect")
    model.seven = nn.Conv2d(4, 4, 7, groups=4)
    report = effdet_fast.accelerate(model)
    reasons = {row.path: row.reason for row in report.left_alone}
    assert reasons == {
        "dilated": "dilation 2",
        "three": "3 filters per channel",
        "reflect": "padding_mode 'reflect'",
        "seven": "no kernel for 7 x 7",
    }
    text = str(report)
    assert all(reason in text for reason in reasons.values())
    assert f"{len(report.swapped)} of {len(report.rows)} candidates swapped" in text


def test_a_model_with_nothing_to_swap_says_so():
    assert str(effdet_fast.accelerate(nn.Linear(2, 2))) == "accelerate: nothing to swap"


def test_a_second_call_finds_nothing_left(model):
    effdet_fast.accelerate(model)
    before = classes(model)
    assert not effdet_fast.accelerate(model).swapped
    assert classes(model) == before


def test_families_can_be_chosen_and_add_up(model, x):
    everything = copy.deepcopy(model)
    effdet_fast.accelerate(everything)
    assert {row.family for row in effdet_fast.accelerate(model, only=["batch_norm_act"]).swapped} == {"batch_norm_act"}
    assert type(model.block[0]) is nn.Conv2d
    effdet_fast.accelerate(model, only=["depthwise_conv"])
    assert classes(model) == classes(everything)


def test_replaced_forwards_and_scripts_are_left_alone(model):
    model.block[0].forward = lambda x: x
    model.scripted = torch.jit.script(nn.Conv2d(4, 4, 3, groups=4))
    report = effdet_fast.accelerate(model)
    assert not {"block.0", "scripted"} & {row.path for row in report.swapped}


def test_sync_batch_norm_can_still_be_made(model, x):
    effdet_fast.accelerate(model)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(effdet_fast.restore(copy.deepcopy(model)))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.stem[1], nn.SyncBatchNorm)
    assert_same(model.eval()(x), plain.eval()(x))


def test_it_compiles_without_a_graph_break(model, x):
    plain = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), plain(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_layouts(model, x, layout):
    model = model.to(memory_format=layout)
    plain = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x.contiguous(memory_format=layout)), plain(x.contiguous(memory_format=layout))
    assert y.dtype == expected.dtype
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(model, x, dtype):
    plain = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    model, plain = model.to(dtype), plain.to(dtype)
    y, expected = model(x.to(dtype)), plain(x.to(dtype))
    assert y.dtype == expected.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [effdet_fast.accelerate, effdet_fast.restore])
def test_only_modules(function):
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        function([])


def test_unknown_families(model):
    with pytest.raises(ValueError, match=r"only must name families of \['depthwise_conv'.*got \['nsm'\]"):
        effdet_fast.accelerate(model, only=["nsm", "batch_norm_act"])
    with pytest.raises(TypeError, match="only must be a sequence of families, got the string 'nms'"):
        effdet_fast.accelerate(model, only="nms")
    assert len(FAMILIES) == len(set(FAMILIES)) >= 3
