"""A model that was looked at first, in whichever mode, can still be trained."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from effdet_fast.data import CocoDetection, create_loader
from effdet_fast.evaluation import evaluate_model
from effdet_fast.models import create_model
from tests.generated_data import make_dataset, random_objects

SIZE = (128, 128)
MODELS = [("efficientdet_lite0", {}), ("efficientdet_lite0", {"box_loss": "giou"}), ("retinanet_resnet18_fpn_v2", {})]
each_model = pytest.mark.parametrize(("name", "options"), MODELS)


def small(name, options):
    return create_model(name, 3, image_size=SIZE, fpn_channels=32, fpn_cells=1, head_repeats=1, **options)


def assert_trains(model):
    loss = model.train()(torch.randn(2, 3, *SIZE), random_objects(2, 4, SIZE, 3)).total
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@each_model
def test_after_an_evaluation(name, options, tmp_path):
    dataset, model = CocoDetection(*make_dataset(tmp_path, images=2, size=SIZE)), small(name, options)
    normal = {"mean": model.config.mean, "std": model.config.std}
    loader = create_loader(dataset, image_size=SIZE, batch_size=2, workers=0, training=False, **normal)
    evaluate_model(model, loader, dataset, device="cpu")
    assert_trains(model)


@each_model
def test_after_inference(name, options):
    model = small(name, options).eval()
    with torch.inference_mode():
        model.predict(torch.randn(2, 3, *SIZE))
        model.loss(model(torch.randn(2, 3, *SIZE)), *random_objects(2, 4, SIZE, 3))
    assert not model.anchors().is_inference()
    assert_trains(model)


@each_model
def test_after_shapes_alone_were_computed(name, options):
    model = small(name, options).train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        loss = model(mode.from_tensor(torch.randn(2, 3, *SIZE)), random_objects(2, 4, SIZE, 3))
    assert loss.total.fake_mode is mode
    assert type(model.anchors()) is torch.Tensor
    assert_trains(model)
