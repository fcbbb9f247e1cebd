"""Sizes of image files from their headers, decoding whatever their name and size, and hints for wrong names."""

import os

import cv2
import numpy as np
import pytest

from common import UserError
from data import list_images, read_image
from data_check import look_at_image
from utils.image_header import decode_image, image_header_size


@pytest.mark.quick
def test_header_sizes_equal_decoding(tmp_path):
    image = np.zeros((31, 47, 3), np.uint8)
    files = []
    for name, options in {
        "a.jpg": [],
        "b.jpg": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        "c.png": [],
        "d.bmp": [],
    }.items():
        files.append(tmp_path / name)
        cv2.imwrite(str(files[-1]), image, options)
    assert [image_header_size(f) for f in files] == [(31, 47)] * 4
    (tmp_path / "e.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(UserError, match="e.jpg is not an image that OpenCV can read"):
        image_header_size(tmp_path / "e.jpg")


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_larger_than_opencv_reads_are_one_line(tmp_path, kind):
    """Only the header is there: what is declared counts, before anything is allocated."""
    ok, content = cv2.imencode(f".{kind}", np.zeros((8, 9, 3), np.uint8))
    data = bytearray(content.tobytes())
    if kind == "png":
        data[16:24] = (50000).to_bytes(4, "big") + (40000).to_bytes(4, "big")
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = (40000).to_bytes(2, "big") + (50000).to_bytes(2, "big")
    (tmp_path / f"big.{kind}").write_bytes(data)
    assert image_header_size(tmp_path / f"big.{kind}") == (40000, 50000)
    with pytest.raises(UserError, match="big.* has 50000x40000 pixels; at most 1073741824 can be read"):
        decode_image(tmp_path / f"big.{kind}", cv2.IMREAD_COLOR)
    facts = look_at_image(str(tmp_path / f"big.{kind}"), (40000, 50000))
    assert facts.problem == "image unreadable" and "50000x40000 pixels" in facts.detail


@pytest.mark.quick
def test_images_are_decoded_whatever_their_name(tmp_path):
    name = os.fsdecode(b"caf\xe9 [1]*.png")
    (tmp_path / name).write_bytes(cv2.imencode(".png", np.full((8, 9, 3), 7, np.uint8))[1].tobytes())
    assert decode_image(tmp_path / name, cv2.IMREAD_COLOR).tolist() == np.full((8, 9, 3), 7).tolist()
    assert list_images([tmp_path]) == [str(tmp_path / name)] and read_image(tmp_path / name).shape == (8, 9, 3)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_images_that_use_few_of_their_16_bits_are_warned_of(tmp_path, bits):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "a.png"), rng.integers(0, 1 << bits, (30, 40), np.uint16))
    facts = look_at_image(str(tmp_path / "a.png"), (30, 40))
    assert facts.problem == "image uses few of its bits" and f"its values use {bits}" in facts.detail
    cv2.imwrite(str(tmp_path / "b.png"), rng.integers(0, 1 << 16, (30, 40), np.uint16))
    cv2.imwrite(str(tmp_path / "c.png"), rng.integers(0, 9, (30, 40), np.uint8))
    assert not look_at_image(str(tmp_path / "b.png"), (30, 40)).problem
    assert not look_at_image(str(tmp_path / "c.png"), (30, 40)).problem


@pytest.mark.quick
def test_a_header_that_promises_more_than_the_file_can_hold_takes_no_memory(tmp_path):
    content = bytearray(cv2.imencode(".png", np.zeros((8, 9, 3), np.uint8))[1].tobytes())
    content[16:24] = (32768).to_bytes(4, "big") * 2
    (tmp_path / "small.png").write_bytes(content)
    with pytest.raises(UserError, match=r"small.png is damaged: its \d+ bytes cannot hold 32768x32768 pixels"):
        decode_image(tmp_path / "small.png", cv2.IMREAD_COLOR)
    # What compresses best is read.
    flat = cv2.imencode(".png", np.zeros((3000, 4000), np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    (tmp_path / "flat.png").write_bytes(flat)
    assert decode_image(tmp_path / "flat.png", cv2.IMREAD_COLOR).shape == (3000, 4000, 3) and len(flat) < 7000


@pytest.mark.quick
def test_a_png_whose_chunk_claims_gigabytes_takes_no_memory(tmp_path):
    content = bytearray(cv2.imencode(".png", np.zeros((8, 9, 3), np.uint8))[1].tobytes())
    at = content.index(b"IDAT") - 4
    content[at : at + 4] = (2**31 - 9).to_bytes(4, "big")
    (tmp_path / "chunk.png").write_bytes(content)
    with pytest.raises(UserError, match="chunk.png is damaged: a part of it claims to be longer than the file"):
        decode_image(tmp_path / "chunk.png", cv2.IMREAD_COLOR)
