"""Random weights under the names of projects that the tests cannot install, and what those projects compute from them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from tests.models.effdet_models import randomise

StateDict = dict[str, torch.Tensor]


def classifier(name: str):
    """timm's, with all values its own."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(4)
    model = timm.create_model(f"tf_{name}", num_classes=11)
    randomise(model, (64, 64))
    return model.eval()


def underscored(state_dict: StateDict) -> StateDict:
    """timm's EfficientNet in the naming with `_blocks.N._part`."""
    blocks = list(dict.fromkeys(m[1] for key in state_dict if (m := re.match(r"blocks\.(\d+\.\d+)\.", key))))
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    expanded = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    renamed = {}
    for key, value in state_dict.items():
        module, tensor = key.rsplit(".", 1)
        if match := re.match(r"blocks\.(\d+\.\d+)\.(.+)", module):
            names = {**(plain if match[1].startswith("0.") else expanded), **squeeze}
            renamed[f"_blocks.{blocks.index(match[1])}.{names[match[2]]}.{tensor}"] = value
        else:
            renamed[f"{top[module]}.{tensor}"] = value
    assert len(renamed) == len(state_dict)
    return renamed


def zylo117_d0(num_classes: int, seed: int = 0) -> StateDict:
    """An EfficientDet-D0 of Yet-Another-EfficientDet-Pytorch: 3 cells and 3 head convolutions of 64 channels."""
    generator = torch.Generator().manual_seed(seed)
    weights: StateDict = {}

    def uniform(*shape: int, low: float = -0.3, high: float = 0.3) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = uniform(64, low=0.6, high=1.4), uniform(64)
        weights[f"{name}.running_mean"], weights[f"{name}.running_var"] = uniform(64), uniform(64, low=0.5, high=1.5)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(len(weights))

    def projection(name: str, channels: int) -> None:
        scale = (3 / channels) ** 0.5
        weights[f"{name}.0.conv.weight"] = uniform(64, channels, 1, 1, low=-scale, high=scale)
        weights[f"{name}.0.conv.bias"] = uniform(64)
        norm(f"{name}.1")

    def separable(name: str, outputs: int) -> None:
        weights[f"{name}.depthwise_conv.conv.weight"] = uniform(64, 1, 3, 3, low=-0.6, high=0.6)
        weights[f"{name}.pointwise_conv.conv.weight"] = uniform(outputs, 64, 1, 1, low=-0.2, high=0.2)
        weights[f"{name}.pointwise_conv.conv.bias"] = uniform(outputs)

    for cell in range(3):
        for level in (6, 5, 4, 3):
            weights[f"bifpn.{cell}.p{level}_w1"] = uniform(2, low=-0.2, high=1.5)
        for level in (4, 5, 6, 7):
            weights[f"bifpn.{cell}.p{level}_w2"] = uniform(2 if level == 7 else 3, low=-0.2, high=1.5)
        for node in ("6_up", "5_up", "4_up", "3_up", "4_down", "5_down", "6_down", "7_down"):
            separable(f"bifpn.{cell}.conv{node}", 64)
            norm(f"bifpn.{cell}.conv{node}.bn")
        if cell == 0:
            for name, channels in (("p5_down_channel", 320), ("p4_down_channel", 112), ("p3_down_channel", 40),
                                   ("p5_to_p6", 320), ("p4_down_channel_2", 112), ("p5_down_channel_2", 320)):  # fmt: skip
                projection(f"bifpn.0.{name}", channels)
    for head, outputs in (("regressor", 4), ("classifier", num_classes)):
        for repeat in range(3):
            separable(f"{head}.conv_list.{repeat}", 64)
        for level in range(5):
            for repeat in range(3):
                norm(f"{head}.bn_list.{level}.{repeat}")
        separable(f"{head}.header", 9 * outputs)
    for key, value in underscored(classifier("efficientnet_b0").state_dict()).items():
        if not key.startswith(("_conv_head", "_bn1.", "_fc")):
            padded = re.sub(r"(_conv_stem|_conv|_se_reduce|_se_expand)\.(weight|bias)$", r"\1.conv.\2", key)
            weights[f"backbone_net.model.{padded}"] = value
    return weights


class Zylo117:
    """Neck and heads of Yet-Another-EfficientDet-Pytorch, written out over a state dict; even feature maps only."""

    def __init__(self, weights: StateDict) -> None:
        self.weights = weights

    def neck(self, c3: torch.Tensor, c4: torch.Tensor, c5: torch.Tensor) -> list[torch.Tensor]:
        """P3 to P7 after all cells."""
        p6 = self._down(self._projection("p5_to_p6", c5))
        laterals = {3: self._projection("p3_down_channel", c3), 4: self._projection("p4_down_channel", c4),
                    5: self._projection("p5_down_channel", c5), 6: p6, 7: self._down(p6)}  # fmt: skip
        again = {**laterals, 4: self._projection("p4_down_channel_2", c4), 5: self._projection("p5_down_channel_2", c5)}
        for cell in range(3):
            outputs = self._cell(f"bifpn.{cell}.", laterals, again)
            laterals = again = outputs
        return [laterals[level] for level in range(3, 8)]

    def head(self, name: str, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of "classifier" (before the sigmoid) or "regressor", per level."""
        outputs = []
        for level, x in enumerate(levels):
            for repeat in range(3):
                x = self._separable(f"{name}.conv_list.{repeat}", x)
                x = F.silu(self._norm(f"{name}.bn_list.{level}.{repeat}", x))
            outputs.append(self._separable(f"{name}.header", x))
        return outputs

    def _cell(self, cell: str, inputs: dict, inputs_again: dict) -> dict:
        up = {7: inputs[7]}
        for level in (6, 5, 4, 3):
            coarser = F.interpolate(up[level + 1], scale_factor=2.0, mode="nearest")
            up[level] = self._node(cell, f"conv{level}_up", f"p{level}_w1", [inputs[level], coarser])
        out = {3: up[3]}
        for level in (4, 5, 6):
            sources = [inputs_again[level], up[level], self._down(out[level - 1])]
            out[level] = self._node(cell, f"conv{level}_down", f"p{level}_w2", sources)
        out[7] = self._node(cell, "conv7_down", "p7_w2", [inputs[7], self._down(out[6])])
        return out

    def _node(self, cell: str, conv: str, weights: str, sources: list[torch.Tensor]) -> torch.Tensor:
        positive = F.relu(self.weights[cell + weights])
        shares = positive / (positive.sum() + 1e-4)
        x = F.silu(sum(share * source for share, source in zip(shares, sources, strict=True)))
        return self._norm(f"{cell}{conv}.bn", self._separable(cell + conv, x))

    def _projection(self, name: str, x: torch.Tensor) -> torch.Tensor:
        conv = f"bifpn.0.{name}.0.conv"
        return self._norm(
            f"bifpn.0.{name}.1", F.conv2d(x, self.weights[f"{conv}.weight"], self.weights[f"{conv}.bias"])
        )

    def _separable(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.weights[f"{name}.depthwise_conv.conv.weight"], padding=1, groups=64)
        pointwise = f"{name}.pointwise_conv.conv"
        return F.conv2d(x, self.weights[f"{pointwise}.weight"], self.weights[f"{pointwise}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (
            self.weights[f"{name}.{tensor}"] for tensor in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)
