"""predict_video.py: json lines and annotated videos of small drawn videos, killed and continued, with ids and views."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_videos
from small_videos import SIDE, STEP, RedSquares, frame, read_video, write_video

import command_line
import predict_video
import train
from common import UserError
from predict_video import Views, predict_videos
from utils.mjpeg_avi import AviWriter
from utils.polygons import decode_rle
from utils.stopping import Stopped
from video_options import VideoOptions
from video_source import Frame, find_sources
from video_views import LivePage
from viz import Style

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent


def run(path, out, *settings, watch=lambda seen: None, views=Views(), style=Style(), frames=False, **options):  # noqa: B008
    _, sources = find_sources([str(path)], frames)
    return predict_videos(
        RedSquares(watch, *settings), sources, str(out), VideoOptions(**options), style, views, "weights"
    )


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(out):
    return {p.name: p.read_bytes() for p in Path(out).iterdir()}


# ------------------------------------------------------------------------------------------ what is written
def test_every_frame_is_a_line_with_what_is_in_it_and_a_picture_of_the_video(tmp_path):
    video = write_video(tmp_path / "walk.avi", 24, fps=10)
    assert run(video, tmp_path / "out", track=True) == 0
    entries = lines(tmp_path / "out/walk.jsonl")
    assert [e["frame"] for e in entries] == list(range(24))
    for n, e in enumerate(entries):
        assert e["time"] == pytest.approx(n / 10) and (e["height"], e["width"]) == (96, 128)
        (found,) = e["detections"]
        assert (found["class"], found["category_id"], found["track"]) == ("dog", 8, 1)
        left = 4 + STEP * n
        assert found["box"] == pytest.approx([left, 30, left + SIDE, 30 + SIDE], abs=2)
        mask = decode_rle(found["mask"], 96, 128)
        assert abs(int(mask.sum()) - SIDE**2) < 150 and mask[40, left + 10]
    pictures = read_video(tmp_path / "out/walk.avi")
    assert len(pictures) == 24
    for n in (0, 11, 23):  # the square is there, covered by half with the colour of its class
        assert np.abs(pictures[n][70:].astype(int) - frame(n)[70:]).mean() < 4
        assert np.abs(pictures[n][36:50, 10 + STEP * n : 20 + STEP * n].astype(int) - (0, 0, 255)).mean() > 25
    about = json.loads((tmp_path / "out/walk.video.json").read_text())
    assert about["complete"] and about["frames"] == 24 and about["class_names"] == ["cat", "dog", "owl"]
    assert sorted(content(tmp_path / "out")) == ["walk.avi", "walk.jsonl", "walk.video.json"]


def test_every_kth_frame_and_lines_alone(tmp_path):
    video = write_video(tmp_path / "walk.mp4", 20, fps=10, codec="mp4v")
    run(video, tmp_path / "out", every=6, style=Style(smallest=320))
    assert [e["frame"] for e in lines(tmp_path / "out/walk.jsonl")] == [0, 6, 12, 18]
    capture = cv2.VideoCapture(str(tmp_path / "out/walk.avi"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10 / 6, abs=0.01)  # it lasts as long as the source
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 3 * 128  # small pictures are enlarged
    run(video, tmp_path / "lines", video=False)
    assert sorted(content(tmp_path / "lines")) == ["walk.jsonl", "walk.video.json"]
    assert "track" not in lines(tmp_path / "lines/walk.jsonl")[0]["detections"][0]


def test_a_folder_of_frames_of_several_sizes_one_of_them_damaged(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for n in range(6):
        pixels = frame(n)
        cv2.imwrite(str(folder / f"{n}.png"), pixels[:60, :100] if n == 3 else pixels)
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 frames of .*frames could not be read and were left out, e.g. .*4.png"):
        run(folder, tmp_path / "out", frames=True, fps=2)
    entries = lines(tmp_path / "out/frames.jsonl")
    assert [(e["frame"], e["time"], e["height"]) for e in entries] == [
        (0, 0, 96), (1, 0.5, 96), (2, 1, 96), (3, 1.5, 60), (5, 2.5, 96),
    ]  # fmt: skip
    pictures = read_video(tmp_path / "out/frames.avi")
    assert len(pictures) == 5 and {p.shape for p in pictures} == {(96, 128, 3)}
    assert pictures[3][:8].max() < 30 and pictures[2][:8].mean() > 50  # the smaller one in the middle of black
    with pytest.raises(UserError, match="could not be read"):  # complete, but still with the same fault
        run(folder, tmp_path / "out", frames=True, fps=2)
    about = tmp_path / "out/frames.video.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "complete": False}))
    with pytest.raises(UserError, match=r"1 frames of .*e.g. .*4.png"):  # killed behind it
        run(folder, tmp_path / "out", frames=True, fps=2)


# ------------------------------------------------------------------------------------------ killed and continued
def kill_at(number, video, out):
    command = [sys.executable, "-m", "tests.small_videos", str(video), str(out), str(number)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_killed_again_and_again_gives_the_bytes_of_an_uninterrupted_one(tmp_path, capfd):
    video = write_video(tmp_path / "walk.avi", 30, jump=5)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert small_videos.main(str(video), str(whole), "-1") == 0
    for number in (9, 13):  # of each process, in which frames that are written are not predicted again
        assert kill_at(number, video, out).returncode == -signal.SIGKILL
        known = len(lines(out / "walk.jsonl"))  # every line is whole
        assert known and len(read_video(out / "walk.avi")) >= known  # and the video can be watched
        assert not json.loads((out / "walk.video.json").read_text())["complete"]
    assert small_videos.main(str(video), str(out), "-1") == 0 and "frames are in" in capfd.readouterr().err
    assert content(out) == content(whole) and len(lines(out / "walk.jsonl")) == 30
    assert [e["detections"][0]["track"] for e in lines(out / "walk.jsonl")] == [1] * 5 + [2] * 25


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"video": False}])
def test_files_cut_off_anywhere_continue_to_the_same_bytes(tmp_path, options):
    """As a power cut may leave them: a line without its end, a picture without its end, one file behind the other."""
    video = write_video(tmp_path / "walk.avi", 24, jump=3)
    run(video, tmp_path / "whole", track=True, **options)
    whole = content(tmp_path / "whole")
    rng = np.random.default_rng(0)
    for _ in range(4):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        for name, bytes_ in whole.items():
            if name.endswith(".video.json"):
                (out / name).write_text(json.dumps({**json.loads(bytes_), "complete": False}))
            else:
                (out / name).write_bytes(bytes_[: rng.integers(len(bytes_))])
        run(video, out, track=True, **options)
        assert content(out) == whole


def test_a_signal_stops_at_a_whole_frame_and_says_how_to_go_on(tmp_path, capfd):
    video = write_video(tmp_path / "walk.avi", 24)
    run(video, tmp_path / "whole")

    def stop(seen):
        if seen == 12:
            raise Stopped(signal.SIGTERM)

    assert run(video, tmp_path / "out", watch=stop) == 143
    assert "the same command goes on behind the last frame" in capfd.readouterr().err
    assert len(lines(tmp_path / "out/walk.jsonl")) == 12 == len(read_video(tmp_path / "out/walk.avi"))
    seen = []
    assert run(video, tmp_path / "out", watch=seen.append) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole") and len(seen) == 3  # batches of 4 of 12 frames


def test_batches_begin_at_the_same_frames_after_a_kill(tmp_path):
    """In another batch the same frame may give scores that differ in the last digit."""
    video = write_video(tmp_path / "walk.avi", 24)
    run(video, tmp_path / "out", video=False)
    path, about = tmp_path / "out/walk.jsonl", tmp_path / "out/walk.video.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    about.write_text(json.dumps({**json.loads(about.read_text()), "complete": False}))
    seen = []
    run(video, tmp_path / "out", video=False, watch=seen.append)
    assert seen == [0, 4, 8, 12] and len(lines(path)) == 24  # batches of 4 from frame 8 on


def test_what_is_complete_stays_and_other_settings_are_refused(tmp_path, capfd):
    video = write_video(tmp_path / "walk.avi", 6)
    run(video, tmp_path / "out", "TEST.BATCH_SIZE=2")
    before = content(tmp_path / "out")
    assert run(video, tmp_path / "out") == 0  # another batch size finds the same
    assert "is complete" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"walk.video.json is of a command with another every"):
        run(video, tmp_path / "out", every=2)
    with pytest.raises(UserError, match=r"another TEST.RESULT_SCORE_THRESH; remove it"):
        run(video, tmp_path / "out", "TEST.RESULT_SCORE_THRESH=0.3")
    assert content(tmp_path / "out") == before
    other = tmp_path / "other"
    other.mkdir()
    run(write_video(other / "walk.avi", 4), tmp_path / "out")  # another video of that name
    assert len(lines(tmp_path / "out/other_walk.jsonl")) == 4
    assert {n: b for n, b in content(tmp_path / "out").items() if n in before} == before
    run(write_video(other / "walk2.avi", 4), other)  # the output beside the source does not replace it
    assert {"walk2.avi", "other_walk2.avi", "other_walk2.jsonl"} <= set(content(other))


def test_an_error_of_the_model_leaves_what_was_written(tmp_path):
    def fail(seen):
        if seen == 8:
            raise ValueError("out of memory")

    video = write_video(tmp_path / "walk.avi", 24)
    with pytest.raises(ValueError, match="out of memory"):
        run(video, tmp_path / "out", watch=fail)
    assert len(lines(tmp_path / "out/walk.jsonl")) == 8
    assert run(video, tmp_path / "out") == 0 and len(lines(tmp_path / "out/walk.jsonl")) == 24


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    video = write_video(tmp_path / "walk.avi", 24)
    run(video, tmp_path / "whole")
    add, count = AviWriter.add, []

    def full(self, jpeg):
        count.append(1)
        if len(count) == 10:
            raise OSError(28, "No space left on device")
        add(self, jpeg)

    monkeypatch.setattr(AviWriter, "add", full)
    with pytest.raises(UserError, match="walk.jsonl: No space left on device; when that is put right"):
        run(video, tmp_path / "out")
    monkeypatch.undo()
    assert run(video, tmp_path / "out") == 0 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_frames_are_read_and_written_while_the_graph_runs(tmp_path):
    out, seen = tmp_path / "out", []

    def look(done):
        """The graph works on frames 8 to 11: meanwhile 8 frames are written and further ones are read."""
        if done == 8:
            for _ in range(400):
                seen[:] = [len(lines(out / "walk.jsonl")), *numbers]
                if seen[0] == 8 and max(numbers) > 15:
                    break
                time.sleep(0.05)

    numbers = []

    video = write_video(tmp_path / "walk.avi", 24)
    _, sources = find_sources([str(video)], False)
    read = predict_video.read_ahead

    def counted(frames, ahead):
        def each():
            for f in frames:
                numbers.append(f.number)
                yield f

        return read(each(), ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_video, "read_ahead", counted)
        predict_videos(RedSquares(look), sources, str(out))
    assert seen[0] == 8 and max(seen[1:]) > 15


def test_a_video_of_large_frames_is_seen_in_tiles(tmp_path):
    video = write_video(tmp_path / "walk.avi", 5)
    run(video, tmp_path / "out", "TEST.TILE=64", "TEST.TILE_WHOLE=False", track=True)
    for n, e in enumerate(lines(tmp_path / "out/walk.jsonl")):
        (found,) = e["detections"]
        assert found["box"] == pytest.approx([4 + STEP * n, 30, 4 + STEP * n + SIDE, 30 + SIDE], abs=2)
        assert found["track"] == 1 and found["mask"]["size"] == [96, 128]


@pytest.mark.parametrize("options", [[], ["TEST.TILE=64"], "live"])
def test_all_devices_share_the_frames_of_a_recording_and_the_tiles_of_a_frame(options, tmp_path):
    """The files are those of one device, to the byte. The frames of a live source are predicted as they come."""
    settings = [] if options == "live" else options
    video = write_video(tmp_path / "walk.avi", 22)
    path = f"camera:{video}" if options == "live" else video
    predictor, other = RedSquares(lambda seen: None, *settings), RedSquares(lambda seen: None, *settings)
    predictor.predictors += other.predictors
    _, sources = find_sources([str(path)], False)
    predict_videos(predictor, sources, str(tmp_path / "two"), VideoOptions(), Style(), Views(), "weights")
    if options == "live":
        assert other.seen == 0 < predictor.seen
        return
    assert min(predictor.seen, other.seen) >= 10
    run(path, tmp_path / "one", *settings)
    assert content(tmp_path / "two") == content(tmp_path / "one") and len(lines(tmp_path / "one/walk.jsonl")) == 22


def test_a_truncated_video_is_predicted_as_far_as_it_goes_and_named(tmp_path):
    video = write_video(tmp_path / "walk.avi", 24)
    content_ = video.read_bytes()
    video.write_bytes(content_[: len(content_) // 2])
    with pytest.raises(UserError, match=r"walk.avi is truncated or damaged: 8 of its 24 frames could be read"):
        run(video, tmp_path / "out")
    assert len(lines(tmp_path / "out/walk.jsonl")) == 8


# ------------------------------------------------------------------------------------------ live
def test_a_camera_goes_on_with_the_next_number_and_the_time_since_its_first_frame(tmp_path, monkeypatch):
    video = write_video(tmp_path / "walk.avi", 5)
    monkeypatch.setattr(predict_video, "newest_only", lambda frames, dropped: iter_closing(frames))
    for _ in range(2):
        assert run(f"camera:{video}", tmp_path / "out", track=True) == 0
    (path,) = (tmp_path / "out").glob("*.jsonl")
    entries = lines(path)
    assert [e["frame"] for e in entries] == list(range(10))
    assert entries[0]["time"] == 0 and all(a["clock"] <= b["clock"] for a, b in zip(entries, entries[1:]))
    for e in entries:
        assert e["time"] == pytest.approx(e["clock"] - entries[0]["clock"], abs=0.002)
    assert len(read_video(path.with_suffix(".avi"))) == 10
    ids = [e["detections"][0]["track"] for e in entries]
    assert ids[:5] == [1] * 5 and len(set(ids[5:])) == 1


def iter_closing(frames):
    yield from frames


def test_frames_that_come_too_fast_are_dropped_and_counted(tmp_path, monkeypatch, capfd):
    def newest(frames, dropped):
        for f in frames:
            if f.number % 3:
                dropped(f)
            else:
                yield f

    monkeypatch.setattr(predict_video, "newest_only", newest)
    monkeypatch.setattr(predict_video, "paced", lambda frames, clock, sleep: frames)
    run(write_video(tmp_path / "walk.avi", 12), tmp_path / "out", realtime=True)
    assert [e["frame"] for e in lines(tmp_path / "out/walk.jsonl")] == [0, 3, 6, 9]
    assert "8 of 12 frames were dropped (67%)" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/walk.video.json").read_text())["dropped"] == 8


def test_the_page_shows_the_frame_that_was_written_last(tmp_path):
    page, shown = LivePage(0), []

    def look(seen):
        if seen >= 12:  # the writer is at most two batches behind
            shown.append(urllib.request.urlopen(page.address + "frame.jpg", timeout=10).read())

    try:
        run(write_video(tmp_path / "walk.avi", 24), tmp_path / "out", watch=look, views=Views(page), video=False)
        last = urllib.request.urlopen(page.address + "frame.jpg", timeout=10).read()
    finally:
        page.close()
    assert len(shown) == 3 and len({*shown, last}) > 1
    picture = cv2.imdecode(np.frombuffer(last, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(picture[70:].astype(int) - frame(23)[70:]).mean() < 4
    assert not (tmp_path / "out/walk.avi").exists()


def test_a_stream_that_changes_its_size_is_batched_by_size():
    sizes = [10, 10, 10, 20, 20, 10]
    frames = [Frame(n, n, None, np.zeros((s, s, 3), np.uint8)) for n, s in enumerate(sizes)]
    batches = [[f.number for f in batch] for batch in predict_video._batches(iter(frames), 2)]
    assert batches == [[0, 1], [2], [3, 4], [5]]


# ------------------------------------------------------------------------------------------ from the command line
def test_bad_sources_and_options_end_the_command_before_the_model_is_read(tmp_path, capfd):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = write_video(tmp_path / "good.avi", 2)
    out = ["--load", "/nowhere/model", "--output", str(tmp_path / "out")]
    for words, message in (
        ([tmp_path / "bad.mp4"], "bad.mp4 cannot be read"),
        ([97], "camera 97 cannot be opened"),
        ([good, tmp_path / "bad.mp4"], "bad.mp4 cannot be read"),
        ([tmp_path, "--frames"], "has no frame"),
        ([good], "/nowhere/model"),  # the video is good, so the model is next
    ):
        assert train.main(["--predict", *map(str, words), *out]) == 2
        error = capfd.readouterr().err
        assert message in error and "Traceback" not in error
    for words in (["--every", "0"], ["--fps", "fast"], ["--page", "70000"], ["--track-age", "x"]):
        with pytest.raises(SystemExit) as e:
            train.main(["--predict", str(good), *out, *words])
        assert e.value.code == 2 and f"argument {words[0]}: {words[1]} is not a" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_videos_have_no_effect_on_images(tmp_path, capfd):
    cv2.imwrite(str(tmp_path / "a.png"), frame(0))
    words = ["--predict", str(tmp_path / "a.png"), "--load", "/nowhere/model", "--output", str(tmp_path)]
    assert train.main([*words, "--page", "0", "--no-video", "--track-age", "5"]) == 2
    assert "without effect on images: --track, --track-age, --no-video, --page" in capfd.readouterr().err
    assert train.main(words) == 2 and "without effect" not in capfd.readouterr().err


def test_options_of_images_have_no_effect_on_videos(tmp_path, capfd):
    folder = tmp_path / "frames"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), frame(0))
    words = ["--predict", str(folder), "--frames", "--load", "/nowhere/model", "--output", str(tmp_path / "out")]
    assert train.main([*words, "--cut-outs", "--truth", "/nowhere/truth.json"]) == 2
    assert "without effect on videos: --truth, --cut-outs" in capfd.readouterr().err
    assert train.main(words) == 2 and "without effect" not in capfd.readouterr().err
    assert train.main([*words, "--raw"]) == 2
    assert "--raw takes images and folders of them, not videos" in capfd.readouterr().err


def test_options_of_videos_have_no_effect_without_predict(capfd):
    args = command_line.parse_args(["--evaluate", "o.json", "--load", "x", "--track", "--every", "2"])
    command_line.warn_without_effect(args)
    assert "without effect with --evaluate: --every, --track" in capfd.readouterr().err
