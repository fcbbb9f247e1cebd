"""utils/tiff_parts.py: parts of TIFF files of every kind that OpenCV writes, tiled ones, and damaged ones."""

import cv2
import numpy as np
import pytest

from benchmarks.tiles import write_tiled_tiff
from utils.tiff_parts import open_tiff

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return cv2.resize(noise, (300, 203), interpolation=cv2.INTER_CUBIC)


KINDS = {
    "plain": (cv2.IMWRITE_TIFF_COMPRESSION, 1),
    "lzw": (cv2.IMWRITE_TIFF_COMPRESSION, 5),
    "deflate": (cv2.IMWRITE_TIFF_COMPRESSION, 8),
    "packbits": (cv2.IMWRITE_TIFF_COMPRESSION, 32773),
    "jpeg": (cv2.IMWRITE_TIFF_COMPRESSION, 7, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 16),
    "one strip": (cv2.IMWRITE_TIFF_COMPRESSION, 1, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 203),
}


def same_in_every_part(path):
    tiff, whole = open_tiff(path), cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert (tiff.height, tiff.width) == whole.shape[:2]
    np.testing.assert_array_equal(tiff.read(0, 0, tiff.width, tiff.height), whole)
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y = int(rng.integers(tiff.width)), int(rng.integers(tiff.height))
        w, h = int(rng.integers(1, tiff.width - x + 1)), int(rng.integers(1, tiff.height - y + 1))
        np.testing.assert_array_equal(tiff.read(x, y, w, h), whole[y : y + h, x : x + w])
    return tiff


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_pixels_of_the_whole(tmp_path, picture, kind):
    path = tmp_path / "a.tif"
    assert cv2.imwrite(str(path), picture, list(KINDS[kind]))
    same_in_every_part(path)


@pytest.mark.parametrize("tile", [16, 64, 512])
def test_a_part_of_a_tiled_file_has_the_pixels_of_the_whole(tmp_path, picture, tile):
    write_tiled_tiff(tmp_path / "a.tif", 203, 300, (picture[y : y + 50] for y in range(0, 203, 50)), tile)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.tif")), picture)
    same_in_every_part(tmp_path / "a.tif")


def test_grey_deep_and_transparent_files_become_what_opencv_makes_of_them(tmp_path, picture):
    for name, pixels in {
        "grey": picture[..., 0], "deep": picture.astype(np.uint16) * 250 + 13,
        "grey16": picture[..., 0] * np.uint16(257), "alpha": np.dstack([picture, picture[..., :1]]),
    }.items():  # fmt: skip
        assert cv2.imwrite(str(tmp_path / f"{name}.tif"), pixels)
        same_in_every_part(tmp_path / f"{name}.tif")


def test_a_strip_without_compression_is_read_in_rows(tmp_path, picture, monkeypatch):
    monkeypatch.setattr("utils.tiff_parts._STRIP_PIXELS", 2400 * 100)
    path = tmp_path / "a.tif"
    big = np.tile(picture, (8, 8, 1))  # 1624 x 2400
    cv2.imwrite(str(path), big, [cv2.IMWRITE_TIFF_COMPRESSION, 1, cv2.IMWRITE_TIFF_ROWSPERSTRIP, len(big)])
    tiff = same_in_every_part(path)
    tiff._cache.clear()
    tiff.read(100, 1500, 50, 20)
    assert sum(p.nbytes for p in tiff._cache.values()) == 100 * 2400 * 3  # rows 1500 to 1600


def test_pieces_that_are_kept_have_a_limit(tmp_path, picture, monkeypatch):
    monkeypatch.setattr("utils.tiff_parts._CACHE", 3 * 16 * 16 * 3)
    write_tiled_tiff(tmp_path / "a.tif", 203, 300, [picture], 16)
    tiff = same_in_every_part(tmp_path / "a.tif")
    assert len(tiff._cache) == 3


def test_other_and_damaged_files_are_left_to_the_usual_reader(tmp_path, picture):
    write_tiled_tiff(tmp_path / "a.tif", 203, 300, [picture], 64)
    whole = (tmp_path / "a.tif").read_bytes()
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    assert open_tiff(tmp_path / "a.png") is None and open_tiff(tmp_path / "none.tif") is None
    rng = np.random.default_rng(2)
    path = tmp_path / "b.tif"
    for n in range(300):
        damaged = bytearray(whole[: rng.integers(len(whole))] if n % 3 == 0 else whole)
        for _ in range(3):
            if damaged:
                damaged[-int(rng.integers(1, min(len(damaged), 400) + 1))] = rng.integers(256)
        path.write_bytes(damaged)
        tiff = open_tiff(path)
        if tiff is None or tiff.height * tiff.width > 10**6:
            continue
        try:
            part = tiff.read(0, 0, tiff.width, tiff.height)
        except ValueError:  # the caller names the file
            continue
        assert part.shape == (tiff.height, tiff.width, 3)
