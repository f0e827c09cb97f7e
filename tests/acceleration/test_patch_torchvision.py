"""`patch_torchvision` changes which code answers to torchvision's names, and nothing else."""

import pickle
import sys

import pytest
import torch
import torchvision
from torchvision.models.detection import fcos, retinanet
from torchvision.ops import batched_nms as original_batched_nms
from torchvision.ops import boxes, focal_loss
from torchvision.ops import nms as original_nms
from torchvision.ops import sigmoid_focal_loss as original_focal_loss

import effdet_fast
from effdet_fast.acceleration import patching
from tests.acceleration.test_retinanet import batch, plain_model

HOLDERS = {
    "nms": [torchvision.ops, boxes],
    "batched_nms": [torchvision.ops, boxes],
    "sigmoid_focal_loss": [torchvision.ops, focal_loss, retinanet, fcos],
}
ORIGINALS = {"nms": original_nms, "batched_nms": original_batched_nms, "sigmoid_focal_loss": original_focal_loss}


def is_original():
    return [getattr(holder, name) is ORIGINALS[name] for name, holders in HOLDERS.items() for holder in holders]


@pytest.fixture(autouse=True)
def _stays_clean():
    yield
    assert all(is_original())


@pytest.fixture
def calls(monkeypatch):
    """The names of our functions that were called and returned."""
    names = []

    def spy(name, function):
        def spied(*args, **kwargs):
            result = function(*args, **kwargs)
            names.append(name)
            return result

        return spied

    for name in HOLDERS:
        monkeypatch.setattr(patching, name, spy(name, getattr(patching, name)))
    return names


def some_boxes(count=200, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    size = torch.rand(count, 2, generator=generator) * 50 + 1
    scores, classes = torch.rand(count, generator=generator), torch.randint(0, 5, (count,), generator=generator)
    return torch.cat([corner, corner + size], 1).to(dtype), scores.to(dtype), classes


def test_a_call_holds_until_restored():
    patch = effdet_fast.patch_torchvision()
    assert not any(is_original())
    assert torchvision.ops.nms is boxes.nms and torchvision.ops.nms.__doc__ == original_nms.__doc__
    patch.restore()
    assert all(is_original())
    patch.restore()


def test_a_block_restores_also_after_an_error():
    with pytest.raises(KeyError), effdet_fast.patch_torchvision():
        assert not any(is_original())
        raise KeyError


def test_patches_may_be_nested_and_end_in_any_order():
    with effdet_fast.patch_torchvision():
        inside = torchvision.ops.nms
        with effdet_fast.patch_torchvision() as inner:
            assert torchvision.ops.nms is inside
        assert torchvision.ops.nms is inside
        inner.restore()
        assert torchvision.ops.nms is inside
    first, second = effdet_fast.patch_torchvision(), effdet_fast.patch_torchvision()
    first.restore()
    assert not any(is_original())
    second.restore()


def test_what_somebody_else_put_there_stays():
    def own(*args):
        raise NotImplementedError

    try:
        retinanet.sigmoid_focal_loss = own
        with effdet_fast.patch_torchvision():
            assert retinanet.sigmoid_focal_loss is own
            fcos.sigmoid_focal_loss = own
        assert retinanet.sigmoid_focal_loss is fcos.sigmoid_focal_loss is own
    finally:
        retinanet.sigmoid_focal_loss = fcos.sigmoid_focal_loss = original_focal_loss


def test_whoever_took_a_function_along_has_torchvisions_afterwards(calls):
    with effdet_fast.patch_torchvision():
        taken = torchvision.ops.nms
        taken(*some_boxes()[:2], 0.5)
    assert calls == ["nms"]
    assert torch.equal(taken(*some_boxes()[:2], 0.5), original_nms(*some_boxes()[:2], 0.5))
    assert calls == ["nms"]


def test_a_module_imported_meanwhile_is_restored_too(monkeypatch):
    name = "torchvision.models.detection._utils"
    with effdet_fast.patch_torchvision():
        monkeypatch.setattr(sys.modules[name], "nms", torchvision.ops.nms, raising=False)
    assert sys.modules[name].nms is original_nms


def test_without_torchvision(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="patch_torchvision: torchvision must be installed"):
        effdet_fast.patch_torchvision()
    monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 200, 1500])
def test_nms_is_the_same(count, dtype, calls):
    found, scores, classes = some_boxes(count, dtype)
    found[: count // 4, 2:] = found[: count // 4, :2]  # without area
    scores = (scores * 50).round() / 50  # with equal ones
    with effdet_fast.patch_torchvision():
        kept = torchvision.ops.nms(found, scores=scores, iou_threshold=0.4)
        by_class = torchvision.ops.batched_nms(found, some_boxes(count, dtype)[1], classes, 0.4)
    assert torch.equal(kept, original_nms(found, scores, 0.4))
    assert torch.equal(by_class, original_batched_nms(found, some_boxes(count, dtype)[1], classes, 0.4))
    assert calls == ["nms", "batched_nms"]


def test_batched_nms_of_few_boxes_is_that_of_many():
    """torchvision's offset between classes, the largest coordinate and 1, is 0 here; its loop needs none."""
    found, scores = torch.tensor([[-40.0, -40, -1, -1]] * 2), torch.tensor([0.9, 0.8])
    classes = torch.tensor([0, 1])
    with effdet_fast.patch_torchvision():
        kept = torchvision.ops.batched_nms(found, scores, classes, 0.5)
    assert torch.equal(kept, boxes._batched_nms_vanilla(found, scores, classes, 0.5))
    assert len(kept) == 2 and len(original_batched_nms(found, scores, classes, 0.5)) == 1


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_focal_loss_is_the_same(reduction, dtype, autocast, calls):
    targets = torch.rand(40, 7)
    targets[:20] = targets[:20].round()
    results = []
    for patched in (True, False):
        inputs = (3 * torch.linspace(-2, 2, 280).view(40, 7)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if patched:
                with effdet_fast.patch_torchvision():
                    loss = torchvision.ops.sigmoid_focal_loss(inputs, targets.to(dtype), 0.3, reduction=reduction)
            else:
                loss = original_focal_loss(inputs, targets.to(dtype), 0.3, reduction=reduction)
        loss.sum().backward()
        results.append((loss.detach(), inputs.grad))
    precision = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.04, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(*results, rtol=precision, atol=precision / 4)
    assert calls == ["sigmoid_focal_loss"]


def test_what_ours_do_not_take_is_torchvisions(calls):
    found, scores, classes = some_boxes()
    logits, targets = torch.randn(5, 3), torch.rand(5, 3)
    with effdet_fast.patch_torchvision():
        quantized = torch.quantize_per_tensor(found, 1.0, 0, torch.quint8)
        kept = torchvision.ops.nms(quantized, torch.quantize_per_tensor(scores, 0.01, 0, torch.quint8), 0.5)
        by_float_class = torchvision.ops.batched_nms(found, scores, classes.float(), 0.5)
        wide = torchvision.ops.sigmoid_focal_loss(logits, targets.double())
        torchvision.ops.sigmoid_focal_loss(logits, targets.requires_grad_(), reduction="sum").backward()
        gradient = targets.grad
        for function, arguments, error in (
            (torchvision.ops.nms, (found, scores[:3], 0.5), RuntimeError),
            (torchvision.ops.nms, (found, scores.double(), 0.5), RuntimeError),
            (torchvision.ops.nms, ([], [], 0.5), AttributeError),
            (torchvision.ops.sigmoid_focal_loss, (logits, targets[:2]), ValueError),
            (torchvision.ops.sigmoid_focal_loss, (logits, torch.zeros(5, dtype=torch.int64)), ValueError),
            (torchvision.ops.sigmoid_focal_loss, (logits, targets, 2.0), ValueError),
            (torchvision.ops.sigmoid_focal_loss, (logits, targets, 0.25, 2, "max"), ValueError),
        ):
            with pytest.raises(error) as raised:
                function(*arguments)
            with pytest.raises(error) as expected:
                ORIGINALS[function.__name__](*arguments)
            assert str(raised.value) == str(expected.value)
    assert calls == ["nms"]  # which torchvision's batched_nms calls for classes that are no integers
    assert 0 < len(kept) < len(found) and wide.dtype == torch.float64 and gradient.norm() > 0
    assert torch.equal(by_float_class, original_batched_nms(found, scores, classes, 0.5))


def test_tracing_gets_torchvisions(calls):
    found, scores, _ = some_boxes()
    with effdet_fast.patch_torchvision():
        traced = torch.jit.trace(lambda b, s: torchvision.ops.nms(b, s, 0.5), (found, scores), check_trace=False)
    assert "torchvision::nms" in str(traced.graph) and not calls
    assert torch.equal(traced(found, scores), original_nms(found, scores, 0.5))


def test_a_compiled_function_has_no_graph_break():
    logits, targets = torch.randn(5, 3), torch.rand(5, 3)
    with effdet_fast.patch_torchvision():
        function = torch.compile(torchvision.ops.sigmoid_focal_loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(function(logits, targets), original_focal_loss(logits, targets))


def test_a_pickled_reference_is_torchvisions_afterwards():
    with effdet_fast.patch_torchvision():
        pickled = pickle.dumps(torchvision.ops.nms)
    assert pickle.loads(pickled) is original_nms


def test_torchvisions_own_models_run_on_ours(calls):
    plain = plain_model()
    images, targets = batch()
    with torch.no_grad():
        expected = plain.train()(images, targets), plain.eval()(images)
        with effdet_fast.patch_torchvision():
            found = plain.train()(images, targets), plain.eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert calls == ["sigmoid_focal_loss"] * 2 + ["batched_nms"] * 2
