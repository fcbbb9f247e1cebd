"""utils/mjpeg_avi.py: files that OpenCV reads, cut off anywhere and continued to the same bytes."""

import cv2
import numpy as np
import pytest

from common import UserError
from utils.mjpeg_avi import AviWriter, count_frames

pytestmark = pytest.mark.quick


def picture(n: int) -> bytes:
    pixels = np.full((48, 64, 3), 60, np.uint8)
    cv2.putText(pixels, str(n), (5, 40), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


PICTURES = [picture(n) for n in range(12)]


def write(path, count=12, keep=0, part_size=1 << 30, close=True, fps=12.5):
    writer = AviWriter(path, 64, 48, fps, keep, part_size)
    for n in range(keep, count):
        writer.add(PICTURES[n])
    if close:
        writer.close()


def read(path):
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while (got := capture.read())[0]:
        frames.append(got[1])
    return frames, capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)


@pytest.mark.parametrize("part_size", [1 << 30, 3000])  # 3000 bytes: two or three pictures in each part
@pytest.mark.parametrize("close", [True, False])
def test_opencv_reads_every_picture_of_a_file_also_without_its_end(tmp_path, part_size, close):
    write(tmp_path / "a.avi", part_size=part_size, close=close)
    frames, fps, count = read(tmp_path / "a.avi")
    assert len(frames) == 12 == count_frames(tmp_path / "a.avi") and fps == 12.5
    assert count == 12 or part_size == 3000
    for frame, jpeg in zip(frames, PICTURES):
        expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert np.abs(frame.astype(int) - expected).mean() < 3  # another decoder


def test_a_player_can_seek_by_the_index(tmp_path):
    write(tmp_path / "a.avi")
    capture = cv2.VideoCapture(str(tmp_path / "a.avi"), cv2.CAP_FFMPEG)
    capture.set(cv2.CAP_PROP_POS_FRAMES, 7)
    expected = cv2.imdecode(np.frombuffer(PICTURES[7], np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(capture.read()[1].astype(int) - expected).mean() < 3
    content = (tmp_path / "a.avi").read_bytes()
    assert content.count(b"idx1") == 1 and int.from_bytes(content[4:8], "little") == len(content) - 8


@pytest.mark.parametrize("part_size", [1 << 30, 3000])
def test_a_file_cut_off_at_any_byte_continues_to_the_same_bytes(tmp_path, part_size):
    write(tmp_path / "whole.avi", part_size=part_size)
    whole = (tmp_path / "whole.avi").read_bytes()
    path = tmp_path / "a.avi"
    counts = set()
    for length in [*range(0, len(whole), 97), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:length])
        keep = count_frames(path)
        counts.add(keep)
        write(path, keep=keep, part_size=part_size)
        assert path.read_bytes() == whole, length
    assert counts == set(range(13))


@pytest.mark.parametrize("part_size", [1 << 30, 3000])
@pytest.mark.parametrize("keep", [0, 1, 5, 11])
def test_pictures_after_those_that_stay_are_cut_off(tmp_path, keep, part_size):
    write(tmp_path / "whole.avi", part_size=part_size)
    whole = (tmp_path / "whole.avi").read_bytes()
    write(tmp_path / "whole.avi", keep=keep, part_size=part_size)
    assert (tmp_path / "whole.avi").read_bytes() == whole


def test_a_video_of_another_rate_is_not_continued(tmp_path):
    write(tmp_path / "a.avi")
    before = (tmp_path / "a.avi").read_bytes()
    with pytest.raises(UserError, match="another size or frame rate"):
        write(tmp_path / "a.avi", keep=3, fps=30)
    assert (tmp_path / "a.avi").read_bytes() == before and count_frames(tmp_path / "none.avi") == 0
