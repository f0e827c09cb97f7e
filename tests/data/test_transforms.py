"""Placements move pixels and boxes alike; vanished boxes go; what comes back is where it was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from effdet_fast.data import HorizontalFlip, Letterbox, Placement, ScaleJitterCrop, VerticalFlip, apply
from effdet_fast.data.placement import TRAINING_GAP, blank_input, fit
from effdet_fast.data.transforms import place, place_boxes


def render(placement, picture, gap=2.0, fill=7):
    out = np.full((*placement.output, 3), fill, dtype=np.uint8)
    placement.render(picture, out, gap)
    return out


def white_box_on_black(size, box):
    picture = Image.new("RGB", (size[1], size[0]))
    ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 255, 255))
    return picture


def extent(pixels, least=128):
    bright = pixels.min(axis=2) >= least
    ys, xs = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (31, 97), (700, 50), (128, 128)])
@pytest.mark.parametrize("output", [(128, 128), (96, 160)])
@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_pixels(size, output, seed):
    box = np.array([size[1] // 5, size[0] // 4, size[1] * 4 // 5, size[0] * 3 // 5])
    picture = white_box_on_black(size, box.tolist())
    resize = Letterbox(output) if seed % 3 == 0 else ScaleJitterCrop(output, (0.6, 1.8))
    transforms = [HorizontalFlip(0.5), VerticalFlip(0.5), resize]
    placement = place(size, transforms, np.random.default_rng(seed))
    boxes, labels = place_boxes(placement, box[None].astype(float), np.array([3]))
    pixels = render(placement, picture, fill=0)
    if len(boxes) == 0:
        assert (pixels >= 200).sum() < 3 * output[0] * 2
        return
    assert labels.tolist() == [3] and boxes.dtype == np.float32
    np.testing.assert_allclose(extent(pixels), boxes[0], atol=1.01)


def test_letterbox_is_top_left_keeps_ratio_and_pads():
    picture = Image.new("RGB", (200, 100), (250, 250, 250))
    out = render(Placement.letterbox((100, 200), (64, 64)), picture)
    assert (out[:32] == 250).all() and (out[32:] == 7).all()
    out = render(Placement.letterbox((200, 100), (64, 64)), Image.new("RGB", (100, 200), (250, 250, 250)))
    assert (out[:, :32] == 250).all() and (out[:, 32:] == 7).all()
    assert fit((50, 50), (64, 128)) == (64, 64)


def test_picture_of_the_inputs_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(render(Placement.letterbox((32, 48), (32, 48)), Image.fromarray(pixels)), pixels)
    flipped = render(Placement.letterbox((32, 48), (32, 48)).mirrored(x=True), Image.fromarray(pixels))
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_sizes(size):
    placement = Placement.letterbox(size, (32, 32))
    out = render(placement, Image.new("RGB", (size[1], size[0]), (200, 200, 200)))
    assert (out[0, 0] == 200).all()
    np.testing.assert_allclose(
        placement.undo_boxes(placement.apply_boxes([[0, 0, size[1], size[0]]])), [[0, 0, size[1], size[0]]]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(16, 200), st.integers(16, 200), st.integers(0, 2**20))
def test_letterbox_and_back(height, width, out_h, out_w, seed):
    rng = np.random.default_rng(seed)
    corners = rng.random((5, 4)) * [width, height, width, height]
    boxes = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    placement = Placement.letterbox((height, width), (out_h, out_w))
    assert placement.scaled[0] <= out_h and placement.scaled[1] <= out_w
    np.testing.assert_allclose(placement.undo_boxes(placement.apply_boxes(boxes)), boxes, rtol=1e-5, atol=1e-3)


def test_mirrored_and_back():
    boxes = np.array([[10, 20, 50, 60], [0, 0, 90, 70]], dtype=float)
    plain = Placement.letterbox((70, 90), (64, 64))
    for x, y in ((True, False), (False, True), (True, True)):
        placement = plain.mirrored(x, y)
        assert not np.allclose(placement.apply_boxes(boxes[:1]), plain.apply_boxes(boxes[:1]))
        np.testing.assert_allclose(placement.undo_boxes(placement.apply_boxes(boxes)), boxes, atol=1e-4)
        np.testing.assert_allclose(placement.mirrored(x, y).apply_boxes(boxes), plain.apply_boxes(boxes))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**20), st.floats(0.05, 3))
def test_jitter_boxes_stay_inside_and_have_area(height, width, seed, scale):
    rng = np.random.default_rng(seed)
    placement = place((height, width), [HorizontalFlip(), ScaleJitterCrop((64, 48), (scale, scale))], rng)
    start = rng.random((20, 2)) * [width, height]
    boxes = np.concatenate([start, start + rng.random((20, 2)) * [width, height]], axis=1)
    kept, labels = place_boxes(placement, boxes, np.arange(20))
    assert len(kept) == len(labels)
    assert (kept[:, 2:] - kept[:, :2] >= 1).all() and (kept >= 0).all() and (kept <= [48, 64, 48, 64]).all()
    render(placement, Image.new("RGB", (width, height)))


def test_boxes_cut_to_less_than_a_pixel_vanish():
    placement = Placement((100, 100), (100, 100), (50, 50), offset=(25, 25))
    boxes = np.array([[0, 0, 25.5, 60], [0, 0, 24, 24], [30, 30, 40, 40], [74, 74, 90, 90]], dtype=float)
    kept, labels = place_boxes(placement, boxes, np.arange(4))
    assert kept.tolist() == [[5, 5, 15, 15], [49, 49, 50, 50]] and labels.tolist() == [2, 3]


def test_reduced_jpeg_looks_the_same(tmp_path):
    y, x = np.mgrid[:1203, :1601]
    pixels = np.stack(
        [127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 31), 127 + 100 * np.sin((x + y) / 57)], axis=2
    )
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    full = Image.open(path)
    for transforms in ([Letterbox((320, 320))], [HorizontalFlip(1.0), ScaleJitterCrop((320, 320), (0.3, 0.9))]):
        placement = place((1203, 1601), transforms, np.random.default_rng(3))
        reduced = Image.open(path)
        wanted = placement.decode_size(TRAINING_GAP)
        reduced.draft("", wanted[::-1])
        assert reduced.size[0] < 900 and reduced.height >= wanted[0] and reduced.width >= wanted[1]
        difference = np.abs(render(placement, reduced, TRAINING_GAP).astype(int) - render(placement, full))
        assert difference.mean() < 1.5 and np.percentile(difference, 99) < 10
    with pytest.raises(ValueError, match="is for a picture of"):
        render(placement, Image.new("RGB", (100, 100)))


def test_apply_on_a_sample():
    sample = {
        "image": np.full((40, 80, 3), 200, dtype=np.uint8),
        "boxes": np.array([[0, 0, 40, 20]], dtype=np.float32),
        "labels": np.array([2]),
        "crowd_boxes": np.array([[40, 0, 80, 40]], dtype=np.float32),
        "crowd_labels": np.array([1]),
        "image_id": 5,
    }
    out = apply(sample, [HorizontalFlip(1.0), Letterbox((40, 40))], np.random.default_rng(0), mean=(0.5, 0.0, 1.0))
    assert out["image"].shape == (40, 40, 3) and out["image_id"] == 5
    assert out["image"][30, 3].tolist() == [128, 0, 255] and out["image"][3, 3].tolist() == [200] * 3
    assert out["boxes"].tolist() == [[20, 0, 40, 10]] and out["crowd_boxes"].tolist() == [[0, 0, 20, 20]]
    assert sample["image"].shape == (40, 80, 3)


def test_bad_arguments():
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="p must be in"):
            HorizontalFlip(bad)
    for scale in ((0, 1), (2, 1), (-1, 1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="scale must be"):
            ScaleJitterCrop((32, 32), scale)
    for size in ((0, 3), (3,), (2.5, 4)):
        with pytest.raises(ValueError, match="image_size must be"):
            Letterbox(size)
    assert blank_input((2, 1), (0.485, 0.456, 0.406)).tolist() == [[[124, 116, 104]]] * 2
