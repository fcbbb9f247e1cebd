"""video_views.py: the page on this machine for several viewers, and the window."""

import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest

from common import UserError
from video_views import LivePage, LiveWindow

pytestmark = pytest.mark.quick


@pytest.fixture
def page():
    page = LivePage(0)
    yield page
    page.close()


def get(page, path, **headers):
    request = urllib.request.Request(page.address + path, headers=headers)
    return urllib.request.urlopen(request, timeout=10)


def next_picture(stream):
    assert stream.readline() == b"--frame\r\n" and stream.readline() == b"Content-Type: image/jpeg\r\n"
    length = int(stream.readline().split(b":")[1])
    assert stream.readline() == b"\r\n"
    content = stream.read(length)
    assert stream.readline() == b"\r\n"
    return content


def test_several_viewers_see_the_newest_picture_and_a_slow_one_delays_nobody(page):
    html = get(page, "")
    assert html.headers["Content-Type"].startswith("text/html") and b'src="stream"' in html.read()
    with pytest.raises(urllib.error.HTTPError, match="404"):  # no picture yet
        get(page, "frame.jpg")
    page.show(b"first")
    viewers = [get(page, "stream") for _ in range(3)]
    assert viewers[0].headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    assert [next_picture(v) for v in viewers] == [b"first"] * 3
    for n in range(200):  # viewer 2 reads none of them
        page.show(b"x" * 100_000 + b"%d" % n)
    page.show(b"last")
    assert get(page, "frame.jpg").read() == b"last"
    for viewer in viewers[:2]:
        while next_picture(viewer) != b"last":
            pass
    viewers[1].close()
    page.show(b"more")
    assert next_picture(viewers[0]) == b"more"
    for viewer in viewers:
        viewer.close()


def test_only_this_machine_is_answered(page):
    assert page._server.server_address[0] == "127.0.0.1"
    page.show(b"picture")
    port = page._server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}"):  # a page of another site that points here
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(page, "frame.jpg", Host=host)
    assert get(page, "frame.jpg", Host=f"localhost:{port}").read() == b"picture"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(page, "../train.py")


def test_a_port_in_use_is_one_line_and_a_closed_page_ends_its_viewers(page):
    port = page._server.server_address[1]
    with pytest.raises(UserError, match=f"--page {port}: .*in use"):
        LivePage(port)
    page.show(b"picture")
    viewer = get(page, "stream")
    next_picture(viewer)
    other = LivePage(0)
    other.close()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", other._server.server_address[1]), 5):
        pass
    with page._changed:
        page._open = False
        page._changed.notify_all()
    assert viewer.read() == b""  # the end
    assert threading.active_count() < 50


def test_without_a_display_there_is_no_window(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="--show: .*--page PORT"):
        LiveWindow("x")
    monkeypatch.setenv("DISPLAY", ":987")  # no server
    with pytest.raises(UserError, match="--show: .*--page PORT"):
        LiveWindow("x")


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="needs Xvfb, a display without a screen")
def test_a_window_shows_pictures_until_it_is_closed(monkeypatch, tmp_path):
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24", "-fbdir", str(tmp_path)],
        pass_fds=[write], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        os.close(write)
        monkeypatch.setenv("DISPLAY", f":{os.read(read, 20).decode().strip()}")
        window = LiveWindow("test")
        red = cv2.imencode(".ppm", np.full((200, 300, 3), (0, 0, 255), np.uint8))[1].tobytes()
        seen = 0
        for _ in range(300):
            window.show(red)
            screen = np.fromfile(next(tmp_path.iterdir()), np.uint8)[-640 * 480 * 4 :].reshape(480, 640, 4)
            seen = int((screen[..., :3] == (0, 0, 255)).all(-1).sum())
            if seen:
                break
            window._process.poll()
            threading.Event().wait(0.05)
        assert seen == 200 * 300 and window.open
        window.close()
        assert not window.open
        window.show(red)  # nothing happens
    finally:
        os.close(read)
        server.terminate()
        server.wait()
