"""Tries the installed package, for tests/wheel.sh: an op with its gradient against the reference, and a training step."""

import warnings

warnings.simplefilter("ignore", RuntimeWarning)  # of a package without kernels

import torch  # noqa: E402

import effdet_fast  # noqa: E402
from effdet_fast import _libraries, ops  # noqa: E402


def gradient(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    ops.sigmoid_focal_loss(logits, torch.arange(-2, 6), reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad


torch.manual_seed(0)
logits = torch.randn(8, 6)
with ops.use_reference():
    expected = gradient(logits)
torch.testing.assert_close(gradient(logits), expected)

model = effdet_fast.create_model("efficientdet_d0", image_size=128)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
before = [parameter.detach().clone() for parameter in model.parameters()]
boxes, labels = torch.tensor([[[10.0, 20, 100, 120]]] * 2), torch.tensor([[17]] * 2)
loss = model(torch.randn(2, 3, 128, 128), (boxes, labels)).total
loss.backward()
optimizer.step()
assert loss.isfinite() and any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

kernels = " and ".join(sorted(_libraries.native_device_types())) or "no"
print(f"loss {loss.item():.4f} in a training step with {kernels} kernels; missing: {_libraries.missing}")
