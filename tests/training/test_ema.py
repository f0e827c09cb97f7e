import torch
from torch import nn

from effdet_fast.training.optimizer import ModelEma


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_average_follows_the_formula_with_its_warmup():
    model = _model()
    ema = ModelEma(model, decay=0.15)
    expected = model[0].weight.detach().clone()
    for update in (1, 2, 3):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update()
        decay = min(0.15, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.module[0].weight, expected)


def test_buffers_are_copied_and_not_averaged():
    model = _model()
    ema = ModelEma(model, decay=0.9)
    model(torch.randn(2, 3, 4, 4))
    state = ema.state_dict()
    assert torch.equal(state["1.running_mean"], model[1].running_mean)
    assert state["1.num_batches_tracked"].item() == 1


def test_loading_continues_bit_for_bit():
    model = _model()
    straight = ModelEma(model, decay=0.9)
    straight.update()
    resumed = ModelEma(model, decay=0.9)
    resumed.load({name: value.clone() for name, value in straight.state_dict().items()}, straight.updates)
    with torch.no_grad():
        model[0].weight.mul_(1.7)
    straight.update()
    resumed.update()
    assert torch.equal(straight.module[0].weight, resumed.module[0].weight)
    assert not any(parameter.requires_grad for parameter in resumed.module.parameters())
