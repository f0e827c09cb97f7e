"""The module: what nn.BatchNorm2d does, with an activation; alone and over several processes."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from effdet_fast.nn import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm, synchronize_batch_norm
from effdet_fast.ops import batch_norm_act
from tests.emulation.build import ROOT
from tests.ops.test_batch_norm_act import ACTIVATIONS, make

OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
def test_does_what_batch_norm_does(backend, options, activation):
    peer = nn.BatchNorm2d(6, **options).to(backend.device)
    if peer.affine:
        nn.init.normal_(peer.weight), nn.init.normal_(peer.bias)
    ours = BatchNormAct2d(6, **options, activation=activation).to(backend.device)
    assert ours.state_dict().keys() == peer.state_dict().keys()
    ours.load_state_dict(peer.state_dict())
    for training in (True, True, False, True):
        ours.train(training), peer.train(training)
        x, grad, *_ = make((3, 6, 5, 4), torch.float32, backend.device)
        results = []
        for module, after in ((ours, lambda y: y), (peer, ACTIVATIONS[activation])):
            leaf = x.clone().requires_grad_()
            y = after(module(leaf))
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], grad)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(ours.state_dict(), peer.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("activation", ["relu", None])
def test_frozen_does_what_torchvisions_does_in_any_mode(backend, eps, activation):
    peer = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(6, eps=eps).to(backend.device)
    for buffer in peer.buffers():
        nn.init.uniform_(buffer, 0.5, 1.5)
    ours = FrozenBatchNormAct2d(6, eps, activation=activation).to(backend.device).train()
    assert not list(ours.parameters())
    ours.load_state_dict({**peer.state_dict(), "num_batches_tracked": torch.tensor(7)})
    assert list(ours.state_dict()) == list(peer.state_dict())
    x, grad, *_ = make((3, 6, 5, 4), torch.float32, backend.device)
    results = []
    for module, after in ((ours, lambda y: y), (peer, ACTIVATIONS[activation])):
        leaf = x.clone().requires_grad_()
        y = after(module(leaf))
        results.append([y.detach(), *torch.autograd.grad(y, leaf, grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), peer.state_dict(), rtol=0, atol=0)


def test_freezing_keeps_evaluation_mode_and_refuses_what_it_does_not_know():
    model = nn.Sequential(
        BatchNormAct2d(4, eps=1e-3, activation="silu"), nn.BatchNorm2d(4), BatchNormAct2d(4, bias=False)
    )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 4, 3, 5)
    expected = model.eval()(x)
    frozen = freeze_batch_norm(copy.deepcopy(model)).train()
    torch.testing.assert_close(frozen(x), expected)
    assert not list(frozen.parameters())

    class WithDropout(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="freeze_batch_norm: WithDropout cannot be frozen"):
        freeze_batch_norm(nn.Sequential(WithDropout(3)))


def test_fifty_batches_leave_the_running_statistics_of_batch_norm(native_backend):
    ours, peer = BatchNormAct2d(4, activation="silu").to(native_backend.device), nn.BatchNorm2d(4)
    for _ in range(50):
        x = torch.randn(2, 4, 3, 3) * 3 + 100
        ours(x.to(native_backend.device)), peer(x)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].cpu(), value, rtol=1e-5, atol=0)


def test_one_value_per_channel_is_refused_in_training_only(backend):
    module = BatchNormAct2d(3, activation="relu").to(backend.device)
    x = torch.randn(1, 3, 1, 1, device=backend.device)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        module(x)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        nn.BatchNorm2d(3).to(backend.device)(x)
    torch.testing.assert_close(module.eval()(x), x.relu(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(x[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_behind_a_convolution(backend, dtype):
    """The convolution gives half precision, the parameters stay float32; running statistics are kept in float32."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8, activation="silu")).to(backend.device)
    x = torch.randn(2, 3, 9, 9, device=backend.device)
    with torch.autocast(backend.device.type, dtype):
        convolved = model[0](x)
        y = model(x)
    assert convolved.dtype == y.dtype == dtype and model[1].running_mean.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    expected = nn.functional.silu(nn.functional.batch_norm(convolved.double(), None, None, training=True))
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_a_module_in_half_precision(native_backend):
    module = BatchNormAct2d(8, activation="silu").to(native_backend.device, torch.bfloat16)
    x = torch.randn(4, 8, 5, 5, device=native_backend.device).bfloat16()
    module(x).sum().backward()
    assert module.running_var.dtype == module.weight.grad.dtype == torch.bfloat16
    module.eval()(x)


@pytest.mark.compiles
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_without_a_break(device, training, momentum):
    module = BatchNormAct2d(8, momentum=momentum, activation="silu").to(device).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 5, 6, device=device).contiguous(memory_format=layout)
        results = []
        for function, owner in ((compiled, module), (twin, twin)):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *owner.parameters()])])
        for mine, eager in zip(*results, strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-6, atol=1e-5)
            assert mine.stride() == eager.stride()
        torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


def test_keeps_only_its_input_for_the_backward_pass():
    module = BatchNormAct2d(4, activation="silu")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    large = [t for t in kept if t.numel() > 8]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_is_a_batch_norm_to_others():
    module = BatchNormAct2d(4, activation="relu6")
    assert isinstance(module, nn.BatchNorm2d) and "activation='relu6'" in repr(module)
    assert copy.deepcopy(module).activation == "relu6"
    assert BatchNormAct2d(4, bias=False).bias is None
    with pytest.raises(ValueError, match="BatchNormAct2d: activation must be one of .* got 'gelu'"):
        BatchNormAct2d(4, activation="gelu")


def test_the_activation_is_never_dropped_by_sync_batch_norm():
    model = nn.Sequential(BatchNormAct2d(4, activation="silu"), BatchNormAct2d(4), nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="would drop the activation 'silu'; use effdet_fast.nn.synchronize_batch_norm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct2d(4))) is nn.SyncBatchNorm
    state, parameters = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    shared = synchronize_batch_norm(model)
    assert [type(m) for m in shared] == [BatchNormAct2d, BatchNormAct2d, BatchNormAct2d, nn.SyncBatchNorm]
    assert all(m.synchronized for m in shared[:3]) and [m.activation for m in shared[:3]] == ["silu", None, None]
    assert all(a is b for a, b in zip(shared.parameters(), parameters, strict=True))
    torch.testing.assert_close(shared.state_dict(), state)


def test_alone_a_synchronized_one_is_a_plain_one():
    x = torch.randn(2, 4, 3, 3)
    plain, shared = BatchNormAct2d(4, activation="silu"), synchronize_batch_norm(BatchNormAct2d(4, activation="silu"))
    assert torch.equal(plain(x), shared(x))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", "tests.ops.shared_batch_norm", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["even", "uneven", "one empty", "reference", "bfloat16"])
def test_two_processes_are_one_with_the_joint_batch(reports, case):
    """Outputs, gradients of the input, summed gradients of the parameters, running statistics; relative errors."""
    for report in reports:
        assert len(report[case]) == 6
        assert all(error <= (1e-2 if case == "bfloat16" else 2e-5) for error in report[case].values()), report[case]


def test_both_processes_keep_the_same_bits(reports):
    assert reports[0]["digests"] == reports[1]["digests"] and len(reports[0]["digests"]) == 5


def test_no_second_derivative_over_several_processes(reports):
    assert all(
        report["second derivative"] == "batch_norm_act: there is no second derivative over several processes"
        for report in reports
    )


def test_the_raw_function_needs_no_module():
    x, _, weight, bias = make((2, 4, 3, 3), torch.float32, "cpu")
    module = BatchNormAct2d(4, eps=1e-3, activation="silu")
    with torch.no_grad():
        module.weight.copy_(weight), module.bias.copy_(bias)
    assert torch.equal(module(x), batch_norm_act(x, None, None, weight, bias, True, eps=1e-3, activation="silu"))
