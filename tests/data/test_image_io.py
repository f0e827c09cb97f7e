"""Decoding: modes, orientation, reduced JPEGs, broken files."""

import os

import numpy as np
import pytest
from PIL import Image, features

from effdet_fast.data import open_image
from effdet_fast.data.image_io import as_picture, depth_of, largest_value, read_header

ORIENTATION = 0x0112


def gradient(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 4, 255 - x], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", ".png"),
        ("RGBA", ".png"),
        ("L", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("P", ".gif"),
        ("1", ".png"),
        ("CMYK", ".jpg"),
        ("L", ".jpg"),
        ("RGB", ".bmp"),
        ("RGB", ".webp"),
        ("RGB", ".tga"),
        pytest.param(
            "RGB", ".jp2", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="not in this Pillow")
        ),
        ("CMYK", ".tif"),
        ("I;16", ".png"),
        ("I;16", ".tif"),
        ("I", ".tif"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    picture = Image.fromarray(gradient())
    if mode.startswith("I"):
        gray = np.asarray(picture.convert("L"))
        picture = Image.fromarray(gray.astype(np.uint16) * 257 if mode == "I;16" else gray.astype(np.int32) * 257)
    else:
        picture = picture.convert(mode)
    path = tmp_path / f"picture{suffix}"
    picture.save(path)
    opened, size = open_image(path, (48, 64))
    assert opened.mode == "RGB" and size == (48, 64) and opened.size == (64, 48)
    if mode == "RGB" and suffix != ".webp":
        np.testing.assert_array_equal(np.asarray(opened), gradient())
    elif mode not in ("P", "1", "RGB"):
        reference = np.asarray(Image.fromarray(gradient()).convert("L"), dtype=float)
        assert abs(np.asarray(opened.convert("L"), dtype=float) - reference).mean() < 6


def test_palette_with_transparency_and_sixteen_bit_are_not_blank(tmp_path):
    palette = Image.fromarray(gradient()).convert("P")
    palette.info["transparency"] = bytes([0] * 128 + [255] * 128)
    palette.save(tmp_path / "p.png", transparency=palette.info["transparency"])
    assert np.asarray(open_image(tmp_path / "p.png")[0]).std() > 30
    Image.fromarray(np.full((4, 4), 25700, dtype=np.uint16)).save(tmp_path / "i.png")
    assert np.asarray(open_image(tmp_path / "i.png")[0]).tolist()[0][0] == [100] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_orientation_makes_pictures_upright(tmp_path, orientation, suffix):
    upright = Image.fromarray(gradient())
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"picture{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix in (".jpg", ".webp") else {}))
    picture, size = open_image(path)
    assert (
        size == (48, 64) and read_header(path) == ((48, 64), False) and read_header(path, (48, 64)) == ((48, 64), False)
    )
    assert abs(np.asarray(picture, dtype=int) - gradient()).max() <= (16 if suffix in (".jpg", ".webp") else 0)
    np.testing.assert_array_equal(np.asarray(as_picture(picture)), np.asarray(picture))
    if orientation >= 5 and suffix != ".tif":
        # Boxes drawn on the stored pixels: the file's size says so.
        stored, _ = open_image(path, (64, 48))
        assert stored.size == (48, 64) and read_header(path, (64, 48)) == ((64, 48), False)
        assert as_picture(stored).size == (48, 64)
        if suffix == ".jpg":
            reduced, size = open_image(path, (48, 64), (24, 32))
            assert reduced.size == (32, 24) and size == (48, 64)
    np.testing.assert_array_equal(np.asarray(as_picture(Image.open(path))), np.asarray(picture))


def test_broken_exif_is_no_orientation(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert open_image(tmp_path / "a.jpg")[1] == (48, 64)


@pytest.mark.parametrize(
    "wanted, expected", [((300, 400), (300, 400)), ((299, 399), (300, 400)), ((150, 200), (150, 200))]
)
def test_jpeg_is_never_reduced_below_what_is_wanted(tmp_path, wanted, expected):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(300, 400)).save(path)
    picture, size = open_image(path, (300, 400), wanted)
    assert (picture.height, picture.width) == expected and size == (300, 400)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM" + b"\0" * 60, b"II*\0" * 9]
)
def test_broken_files_name_themselves(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be decoded"):
        open_image(path)
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be decoded"):
        read_header(path)
    with pytest.raises(ValueError, match="cannot be decoded"):
        open_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.jpg: no such image file"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="none.jpg: no such image file"):
        read_header(tmp_path / "none.jpg")


def test_float_pictures_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif: .*floating-point"):
        open_image(tmp_path / "f.tif")


def test_pictures_from_memory():
    rgb = gradient()
    np.testing.assert_array_equal(np.asarray(as_picture(rgb)), rgb)
    np.testing.assert_array_equal(np.asarray(as_picture(rgb[:, ::-2])), rgb[:, ::-2])
    assert as_picture(rgb[..., 0]).mode == "RGB"
    with pytest.raises(TypeError, match="got str"):
        as_picture("a.png")
    with pytest.raises(TypeError, match="must be uint8, got float32"):
        as_picture(rgb.astype(np.float32))
    for shape in ((3, 48, 64), (48, 64, 4), (0, 4, 3), (5,)):
        with pytest.raises(ValueError, match="shape"):
            as_picture(np.zeros(shape, dtype=np.uint8))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\n(a program) =\n%%EOF\n"


@pytest.mark.parametrize("name", ["picture.jpg", "picture.png", "picture.eps"])
def test_no_program_is_run_on_postscript(tmp_path, monkeypatch, name):
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for read in (open_image, read_header):
        with pytest.raises(ValueError, match=f"{name}: cannot be decoded"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for read in (open_image, read_header):
        for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
            with pytest.raises(ValueError, match="cannot be decoded: it is not a regular file"):
                read(path)


def deep(path, values):
    Image.fromarray(np.asarray(values, np.uint16).reshape(1, -1)).save(path)
    return path


def gray(path, depth):
    return np.asarray(open_image(path, depth=depth)[0])[0, :, 0].tolist()


def test_the_upper_bits_of_deep_pictures_are_kept(tmp_path):
    path = deep(tmp_path / "a.png", [0, 16, 1000, 2000, 4095, 65535])
    assert gray(path, 12) == [0, 1, 62, 125, 255, 255]
    assert gray(path, 16) == gray(path, None) == [0, 0, 3, 7, 15, 255]
    assert gray(path, 8) == [0, 16, 255, 255, 255, 255]
    assert np.asarray(as_picture(Image.open(path), 12))[0, :, 0].tolist() == gray(path, 12)
    Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "b.png")
    assert gray(tmp_path / "b.png", 12) == [7, 200]
    assert largest_value(path) == 65535 and read_header(path) == ((1, 6), True)
    assert [depth_of(value) for value in (0, 255, 256, 1023, 4095, 16383, 16384, 70000)] == [
        8,
        8,
        10,
        10,
        12,
        14,
        16,
        16,
    ]
