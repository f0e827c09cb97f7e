"""Damage to the kernels that choose, match and decode boxes is noticed; see test_negative_controls.py."""

import pytest

from tests.emulation.damage import assert_noticed, parameters

# (op, self-test, file, the text to damage, what it becomes)
DAMAGES = [
    ("nms", "batched_nms_padded", "nms_tile.cuh", "lane > i && lane < count", "lane > i + 1 && lane < count"),
    ("nms", "batched_nms_padded", "nms_kernel.cuh", "earlier < number", "earlier + 1 < number"),
    ("nms", "batched_nms_padded", "nms_kernel.cuh", "kept_before >= in.max_kept", "kept_before + 64 >= in.max_kept"),
    ("nms", "batched_nms_padded", "nms_block_kernel.cuh", "k < found && alive", "k < found / 2 && alive"),
    ("nms", "batched_nms_padded", "nms_block_kernel.cuh", "own_tile > tile)", "own_tile > tile + 1)"),
    ("soft_nms", "soft_nms", "soft_nms_kernel.cuh", "i == best.index", "i + 1 == best.index"),
    ("soft_nms", "soft_nms", "soft_nms_kernel.cuh", "if (labels[i] == label)", "if (labels[i] <= label)"),
    (
        "anchor_matching",
        "match_anchors",
        "anchor_matching_kernel.cuh",
        "own.warp_first + __ffs",
        "own.warp_first + 1 + __ffs",
    ),
    ("anchor_matching", "match_anchors", "anchor_matching_kernel.cuh", "mask = kWarpSize / 2", "mask = kWarpSize / 4"),
    (
        "decode_detections",
        "decode_detections",
        "decode_detections_kernel.cuh",
        "last_place - index <",
        "last_place - index <=",
    ),
    (
        "decode_detections",
        "decode_detections",
        "decode_detections_kernel.cuh",
        "missing -= sums[group]",
        "missing -= 0",
    ),
]


@pytest.mark.parametrize("damage", parameters(DAMAGES))
def test_a_damaged_kernel_is_noticed(tmp_path, damage):
    assert_noticed(tmp_path, *damage)
