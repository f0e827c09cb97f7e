"""CocoDetection: what it gives, and what it says about broken files."""

import json
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from effdet_fast.data import CocoDetection
from effdet_fast.data.string_array import StringArray
from effdet_fast.evaluation import coco_metrics
from tests.generated_data import make_dataset

BOX = {"id": 17, "image_id": 4, "category_id": 30, "bbox": [10, 5, 20, 10], "iscrowd": 0}


@pytest.fixture
def write(tmp_path):
    """Writes two 60 x 40 pictures and a file with the given annotations; returns CocoDetection's arguments."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), (9, 8, 7)).save(tmp_path / name)

    def write(*annotations, **changes):
        content = {
            "images": [
                {"id": 4, "file_name": "a.png", "width": 60, "height": 40},
                {"id": 2, "file_name": "b.png", "width": 60, "height": 40},
            ],
            "categories": [{"id": 30, "name": "dog"}, {"id": 5, "name": "cat"}],
            "annotations": [{**BOX, "id": 17 + i, **row} for i, row in enumerate(annotations)],
            **changes,
        }
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return tmp_path, file

    return write


def quietly(arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return CocoDetection(*arguments, **options)


def test_samples(write):
    crowd = {"category_id": 5, "iscrowd": 1, "bbox": [0, 0, 60, 40]}
    dataset = quietly(write({}, crowd, {"image_id": 4, "category_id": 5, "bbox": [1.5, 2, 3, 4]}))
    assert dataset.category_ids == [5, 30] and dataset.class_names == ["cat", "dog"]
    assert dataset.image_ids == [4, 2] and dataset.file_names == ["a.png", "b.png"]
    sample = dataset[0]
    assert sample["image"].shape == (40, 60, 3) and sample["image"].dtype == np.uint8
    assert sample["image"][3, 3].tolist() == [9, 8, 7]
    assert sample["boxes"].dtype == np.float32 and sample["labels"].dtype == np.int64
    assert sample["boxes"].tolist() == [[10, 5, 30, 15], [1.5, 2, 4.5, 6]] and sample["labels"].tolist() == [1, 0]
    assert sample["crowd_boxes"].tolist() == [[0, 0, 60, 40]] and sample["crowd_labels"].tolist() == [0]
    assert (sample["image_id"], sample["size"], sample["file_name"]) == (4, (40, 60), "a.png")
    assert dataset[-1]["boxes"].shape == (0, 4) and dataset[1]["image_id"] == 2
    with pytest.raises(IndexError):
        dataset[2]


def test_labels_follow_given_category_ids(write):
    arguments = write({}, {"category_id": 5})
    dataset = quietly(arguments, category_ids=[1, 30, 5])
    assert dataset[0]["labels"].tolist() == [1, 2] and dataset.class_names == ["1", "dog", "cat"]
    with pytest.raises(ValueError, match=r"annotation id 18.*category 5 \('cat'\).*not among the model's ids: \[30\]"):
        quietly(arguments, category_ids=[30])
    with pytest.raises(ValueError, match="more than once"):
        quietly(arguments, category_ids=[30, 5, 30])


def test_generated_data_set_raises_no_warning(tmp_path):
    dataset = quietly(make_dataset(tmp_path, images=5, suffix=".jpg"))
    assert sum(len(dataset[i]["labels"]) for i in range(5)) > 4 and len(dataset[4]["labels"]) == 0


BAD_BOXES = [
    ([float("nan"), 5, 20, 10], "not finite"),
    ([1, float("inf"), 20, 10], "not finite"),
    ([10**400, 5, 20, 10], "not finite"),
    ([10, 5, 0, 10], "without width or height"),
    ([10, 5, 20, -10], "without width or height"),
    ([70, 5, 20, 10], "outside the image, left out"),
    ([-30, -30, 20, 10], "outside the image, left out"),
    ([60, 5, 20, 10], "outside the image, left out"),
]


@pytest.mark.parametrize("bbox, what", BAD_BOXES)
def test_box_that_cannot_be_trained_on_is_left_out_with_its_name(write, bbox, what):
    with pytest.warns(UserWarning, match=rf"annotations\.json: annotations 1 .*{what}.*annotation id 18 of a\.png"):
        dataset = CocoDetection(*write({}, {"bbox": bbox}))
    assert dataset[0]["boxes"].tolist() == [[10, 5, 30, 15]]


def test_box_across_the_border_is_clipped_and_counted(write):
    with pytest.warns(UserWarning, match="3 with a box partly outside the image, clipped.*id 17 .*id 18 .*id 19 "):
        dataset = CocoDetection(*write(*({"bbox": b} for b in ([-5, 5, 20, 10], [50, 5, 20, 10], [0, -3, 60, 50]))))
    assert dataset[0]["boxes"].tolist() == [[0, 5, 15, 15], [50, 5, 60, 15], [0, 0, 60, 40]]
    # Rounding at the border is no news.
    assert quietly(write({"bbox": [40.01, 5, 20, 10]}))[0]["boxes"][0, 2] == 60


def test_warning_names_only_the_first_few(write):
    with pytest.warns(UserWarning) as record:
        CocoDetection(*write(*[{"bbox": [0, 0, 0, 0]}] * 30))
    assert len(record) == 1
    text = str(record[0].message)
    assert "30 with a box without" in text and "id 21" in text and "id 22" not in text and ", ...)" in text


BAD_ROWS = [
    ({"image_id": 9}, "annotation id 17 belongs to an unknown image: image_id 9"),
    ({"image_id": None}, "annotation id 17 belongs to an unknown image: image_id None"),
    ({"image_id": [4]}, "unknown image"),
    ({"category_id": 6}, r"annotation id 17 \(image_id 4\) has an unknown category: category_id 6.*\[5, 30\]"),
    ({"category_id": "dog"}, "annotation id 17.*unknown category: category_id 'dog'"),
    ({"category_id": float("nan")}, "annotation id 17.*unknown category: category_id nan"),
    ({"bbox": [1, 2, 3]}, "annotation id 17: bbox must be four numbers"),
    ({"bbox": None}, "annotation id 17: bbox must be four numbers"),
    ({"bbox": ["1", 2, 3, 4]}, "annotation id 17: bbox must be four numbers"),
    ({"bbox": {"x": 1}}, "annotation id 17: bbox must be four numbers"),
    ({"iscrowd": "yes"}, "annotation id 17: iscrowd must be 0 or 1, got 'yes'"),
    ({"area": "large"}, "annotation id 17: area must be a number"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_malformed_annotation_is_an_error_with_its_name(write, row, message):
    with pytest.raises(ValueError, match=rf"annotations\.json: .*{message}"):
        CocoDetection(*write(row))


def test_repeated_ids(write, tmp_path):
    with pytest.warns(UserWarning, match=r"1 annotation ids used more than once \(17\)"):
        assert len(CocoDetection(*write({}, {"id": 17}))[0]["boxes"]) == 2
    twice = [{"id": 1, "file_name": n, "width": 60, "height": 40} for n in ("a.png", "b.png")]
    with pytest.raises(ValueError, match="image id 1 is used twice, by a.png and b.png"):
        CocoDetection(*write(images=twice))
    twice = [{"id": i, "file_name": "a.png", "width": 60, "height": 40} for i in (1, 2)]
    with pytest.warns(UserWarning, match="1 file names listed more than once"):
        CocoDetection(*write(images=twice))
    with pytest.raises(ValueError, match="category id 3 is used twice, by 'x' and 'y'"):
        CocoDetection(*write(categories=[{"id": 3, "name": "x"}, {"id": 3, "name": "y"}]))


def test_ids_that_went_through_floats_and_missing_ids(write):
    row = {"id": None, "image_id": 4.0, "category_id": 30.0}
    assert quietly(write(row, row))[0]["labels"].tolist() == [1, 1]


BAD_FILES = [
    ("{", "is not valid JSON"),
    ("[]", "a list is a results file"),
    ("3", "must hold an object"),
    ("{}", "'images' must be a list"),
    ('{"images": [], "categories": []}', "holds no images"),
    ('{"images": [3], "categories": []}', r"images\[0\] must be an object"),
    ('{"images": [{"id": 1}], "categories": []}', "needs a file_name"),
    (
        '{"images": [{"id": "", "file_name": "a.png"}], "categories": []}',
        "a.png needs an id, an integer or a string, got ''",
    ),
    (
        '{"images": [{"id": "x", "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}], "categories": []}',
        "image ids must be all integers or all strings, got 'x' and 3",
    ),
    ('{"images": [{"id": 1e30, "file_name": "a.png"}], "categories": []}', "a.png needs an id, an integer"),
    ('{"images": [{"id": true, "file_name": "a.png"}], "categories": []}', "a.png needs an id, an integer"),
    ('{"images": [{"id": 1, "file_name": "a.png", "width": -3}], "categories": []}', "a.png .* has width -3"),
    ('{"images": [{"id": 1, "file_name": "a.png", "height": "4"}], "categories": []}', "has height '4'"),
    ('{"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"name": "x"}]}', r"categories\[0\] needs an"),
    ('{"images": [{"id": 1, "file_name": "a.png"}]}', "'categories' must be a list"),
    ("[" * 100000, "is not valid JSON"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_malformed_file(write, tmp_path, text, message):
    images, file = write()
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"annotations\.json: .*{message}"):
        CocoDetection(images, file)


def test_binary_file_and_missing_paths(write, tmp_path):
    images, file = write({})
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not valid JSON"):
        CocoDetection(images, file)
    with pytest.raises(FileNotFoundError, match="none.json: no such annotations file"):
        CocoDetection(images, tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="nowhere: no such images folder"):
        CocoDetection(tmp_path / "nowhere", file)
    with pytest.raises(ValueError, match="is a folder"):
        CocoDetection(images, images)


def test_pictures_are_checked_before_use(write, tmp_path):
    arguments = write({})
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="(?s)2 pictures cannot be used:.*a.png: no such image.*b.png: cannot be dec"):
        CocoDetection(*arguments)
    dataset = CocoDetection(*arguments, check_images=False)
    with pytest.raises(FileNotFoundError, match="a.png"):
        dataset[0]


def test_picture_of_another_size_is_refused(write, tmp_path):
    arguments = write({})
    Image.new("RGB", (61, 40)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: is 61 x 40 pixels, but its annotations say 60 x 40"):
        CocoDetection(*arguments)


def test_missing_sizes_come_from_the_pictures(write):
    images = [{"id": 4, "file_name": "a.png"}, {"id": 2, "file_name": "b.png", "width": 60}]
    for check in (True, False):
        assert CocoDetection(*write({}, images=images), check_images=check).size(1) == (40, 60)


def test_truncated_picture_names_the_file_when_it_is_loaded(write, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    dataset = CocoDetection(*write({}))
    with pytest.raises(ValueError, match="a.png: cannot be decoded"):
        dataset[0]


def test_annotations_may_be_missing_and_file_names_may_have_folders(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub" / "ä b.png")
    images = [{"id": 1, "file_name": "sub/ä b.png"}]
    dataset = quietly(write(annotations=None, images=images))
    assert len(dataset) == 1 and len(dataset[0]["boxes"]) == 0 and dataset.file_names == ["sub/ä b.png"]


def test_holds_no_python_object_per_annotation(write):
    dataset = quietly(write(*[{}] * 2000))
    assert sum(len(pickle.dumps(getattr(dataset.annotations, n))) for n in ("bbox", "labels", "crowd")) < 2000 * 60
    for name, value in vars(dataset.annotations).items():
        assert isinstance(value, np.ndarray | StringArray | str) or len(value) <= 2, name


def test_string_array():
    strings = ["a", "", "ü\u4e2d", "x" * 1000, "\udcff"]
    array = StringArray(strings)
    assert list(array) == strings and array[-1] == strings[-1] and len(array) == 5
    assert len(StringArray([])) == 0
    with pytest.raises(IndexError):
        array[5]


def test_string_ids_of_images(write):
    images = [
        {"id": f"0000{i}_d", "file_name": name, "width": 60, "height": 40} for i, name in enumerate(("a.png", "b.png"))
    ]
    dataset = quietly(write({"image_id": "00001_d"}, images=images))
    assert dataset.image_ids == ["00000_d", "00001_d"] and dataset.annotations.image_ids.tolist() == [1, 2]
    assert [dataset[i]["image_id"] for i in (0, 1)] == dataset.image_ids
    assert [len(dataset[i]["boxes"]) for i in (0, 1)] == [0, 1]
    found = [{"image_id": "00001_d", "category_id": 30, "bbox": [10, 5, 20, 10], "score": 0.5}]
    assert coco_metrics(dataset.annotations, found)["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="has no image with id '2'"):
        coco_metrics(dataset.annotations, [{**found[0], "image_id": "2"}])
    with pytest.raises(ValueError, match="belongs to an unknown image: image_id 1"):
        quietly(write({"image_id": 1}, images=images))


def test_file_names_made_on_windows(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub" / "a.png")
    (tmp_path / "b.png").rename(tmp_path / "sub\\b.png")
    images = [
        {"id": i, "file_name": name, "width": 60, "height": 40} for i, name in ((4, "sub\\a.png"), (2, "sub\\b.png"))
    ]
    dataset = quietly(write(images=images))
    assert dataset.file_names == ["sub/a.png", "sub\\b.png"] and dataset[0]["file_name"] == "sub/a.png"


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "sub/../../a.png", "sub\\..\\..\\a.png", "C:\\a.png", "\\\\host\\a.png"]
)
def test_file_names_that_lead_out_of_the_folder(write, name):
    with pytest.raises(ValueError, match="is absolute or leads out of the images folder"):
        CocoDetection(*write(images=[{"id": 4, "file_name": name, "width": 60, "height": 40}]))


def test_the_category_that_only_groups_others(write):
    named = ((0, "fish", "none"), (1, "carp", "fish"), (2, "pike", "fish"))
    group, carp, pike = ({"id": i, "name": name, "supercategory": above} for i, name, above in named)
    row = {"category_id": 1}
    with pytest.warns(UserWarning, match=r"category 0 \('fish'\) groups the others and has no box; it is left out"):
        dataset = CocoDetection(*write(row, categories=[group, carp, pike]))
    assert dataset.class_names == ["carp", "pike"] and dataset.category_ids == [1, 2]
    assert quietly(write(row, {"category_id": 0}, categories=[group, carp, pike])).category_ids == [0, 1, 2]
    assert quietly(write(row, categories=[group, carp, {**pike, "supercategory": "none"}])).category_ids == [0, 1, 2]
    assert quietly(write({"category_id": 0}, categories=[group])).category_ids == [0]
    assert quietly(write(row, categories=[{"id": 0}, {"id": 1}])).category_ids == [0, 1]
    assert quietly(write(row, categories=[group, carp, pike]), category_ids=[0, 1, 2]).class_names == [
        "fish",
        "carp",
        "pike",
    ]


def test_boxes_that_are_not_in_pixels(write):
    with pytest.raises(ValueError, match="all 2 boxes lie between 0 and 1, as if they were shares of the picture"):
        CocoDetection(*write({"bbox": [0.1, 0.2, 0.5, 0.5]}, {"bbox": [0, 0, 1, 1]}))
    assert len(quietly(write({"bbox": [0.1, 0.2, 0.5, 0.5]}, {}))[0]["boxes"]) == 2
    assert len(quietly(write({"bbox": [0, 0, 1, 1]}))[0]["boxes"]) == 1  # a pixel


def test_one_depth_for_all_pictures(write, tmp_path):
    for name, brightest in (("a.png", 255), ("b.png", 1000)):
        Image.fromarray(np.full((40, 60), brightest, np.uint16)).save(tmp_path / name)
    arguments = write()
    found = quietly(arguments, depth="auto")
    assert (found.depth, found.deepest) == (10, 1000)
    assert [found[i]["image"][0, 0, 0] for i in (0, 1)] == [255 >> 2, 1000 >> 2]
    assert [quietly(arguments, depth=16)[i]["image"][0, 0, 0] for i in (0, 1)] == [0, 1000 >> 8]
    with pytest.raises(ValueError, match=r"depth must be 'auto', None or one of \[8, 10, 12, 14, 16\], got 9"):
        CocoDetection(*arguments, depth=9)


def test_no_depth_where_no_picture_is_deep(write):
    dataset = quietly(write({}), depth="auto")
    assert dataset.depth is None and dataset.deepest is None
