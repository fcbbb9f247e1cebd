"""Watching a video while it is predicted: a page in the browser on this machine, or a window."""

import importlib.util
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import UserError, logger

__all__ = ["LivePage", "LiveWindow"]

_PAGE = b"""<!doctype html><meta charset="utf-8"><title>PackRCNN</title>
<style>body{margin:0;background:#222;display:grid;place-items:center;min-height:100vh}
img{max-width:100%;max-height:100vh}</style><img src="stream" alt="the newest frame with its detections">"""
_IDLE = 15.0  # seconds without a new picture after which the last one is sent again, so that dead viewers are noticed


class LivePage:
    """Serves the newest picture to any number of viewers at http://127.0.0.1:PORT/, and to this machine only.

    /stream is multipart Motion JPEG, /frame.jpg the newest picture. A slow viewer gets fewer pictures; nobody waits for
    it.
    """

    def __init__(self, port: int):
        """port 0: any that is free."""
        self._changed = threading.Condition()
        self._picture, self._number, self._open = b"", 0, True
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_GET(self) -> None:
                page._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:  # viewers that left
                pass

        try:
            self._server = Server(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"--page {port}: no page can be served there ({reason}); give another port") from None
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="page", daemon=True).start()
        logger.info(f"watch it at {self.address}")

    def show(self, jpeg: bytes) -> None:
        with self._changed:
            self._picture, self._number = jpeg, self._number + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        # Other names in the Host header are pages of other sites that were made to point here (DNS rebinding).
        host = (request.headers.get("Host") or "").rpartition(":")[0] or request.headers.get("Host")
        path = request.path.partition("?")[0]
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            request.send_error(403)
        elif path == "/":
            self._send(request, "text/html; charset=utf-8", _PAGE)
        elif path == "/frame.jpg" and self._picture:
            self._send(request, "image/jpeg", self._picture)
        elif path == "/stream":
            self._stream(request)
        else:
            request.send_error(404)

    def _send(self, request: BaseHTTPRequestHandler, kind: str, content: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Cache-Control", "no-store")
        request.end_headers()
        request.wfile.write(content)

    def _stream(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        request.send_header("Cache-Control", "no-store")
        request.end_headers()
        seen = 0
        while True:
            with self._changed:
                if self._open and self._number == seen:
                    self._changed.wait(_IDLE)
                if not self._open:
                    return
                seen, picture = self._number, self._picture
            if picture:
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                request.wfile.write(head.encode() + picture + b"\r\n")


# Shows pictures from stdin, each a length and a PNM file, scaled down to the screen by whole numbers.
_WINDOW = """
import struct, sys, threading, tkinter
root = tkinter.Tk()
root.title(sys.argv[1])
label = tkinter.Label(root)
label.pack()
newest, lock, source = [None], threading.Lock(), sys.stdin.buffer
def read():
    while len(head := source.read(4)) == 4:
        content = source.read(struct.unpack("<I", head)[0])
        with lock:
            newest[0] = content
    newest[0] = b""
def draw():
    with lock:
        content, newest[0] = newest[0], None
    if content == b"":
        return root.destroy()
    if content:
        picture = tkinter.PhotoImage(data=content)
        wide = -(-picture.width() // max(1, int(root.winfo_screenwidth() * 0.95)))
        high = -(-picture.height() // max(1, int(root.winfo_screenheight() * 0.88)))
        label.picture = picture.subsample(max(wide, high, 1))
        label.configure(image=label.picture)
    root.after(15, draw)
threading.Thread(target=read, daemon=True).start()
print("ready", flush=True)
draw()
root.mainloop()
"""


class LiveWindow:
    """A window with the newest picture, in a process of its own. Closing it does not end the prediction."""

    def __init__(self, title: str):
        if importlib.util.find_spec("_tkinter") is None:
            raise UserError("--show: this Python has no Tk for windows; use --page PORT and a browser")
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--show: there is no display here; use --page PORT and a browser")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WINDOW, title], start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self._process.stdout.readline() != b"ready\n":
            self._process.wait()
            raise UserError("--show: no window can be opened on this display; use --page PORT and a browser")

    @property
    def open(self) -> bool:
        return self._process.poll() is None

    def show(self, pnm: bytes) -> None:
        try:
            self._process.stdin.write(struct.pack("<I", len(pnm)) + pnm)
            self._process.stdin.flush()
        except (BrokenPipeError, OSError, ValueError):  # it was closed
            pass

    def close(self) -> None:
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
