"""download_files.py and tools/download.py against a server of its own that cuts, lies and fails."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import download_files
from common import UserError
from download_files import Remote, check_space, download, download_many, sum_of
from tools import download as tool

pytestmark = pytest.mark.quick
CONTENT = bytes(range(256)) * 4000  # 1 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """files: {path: content}; the attributes below make it behave badly."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {"/a.bin": CONTENT}, []
        self.cuts = []  # bytes after which the connections end, one for each request
        self.fails = []  # (code, headers) of the first requests
        self.ranges, self.etag, self.length = True, '"1"', True
        self.shifted = False  # answers with another part than was asked for
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers.get("Range")))
        if s.fails:
            code, headers = s.fails.pop(0)
            return self.reply(code, headers, b"")
        if self.path == "/moved":
            return self.reply(302, {"Location": "/a.bin"}, b"")
        if self.path not in s.files:
            return self.reply(404, {}, b"no such file")
        body, headers, code = s.files[self.path], {}, 200
        if s.etag:
            headers["ETag"] = s.etag
        asked = self.headers.get("Range")
        if asked and s.ranges and self.headers.get("If-Range") == s.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.reply(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            start += 7 * s.shifted
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, code = body[start:], 206
        self.reply(code, headers, body, s.cuts.pop(0) if s.cuts else None)

    def reply(self, code, headers, body, cut=None):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None or not self.server.length:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_files.time, "sleep", lambda seconds: None)
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


def fetch(server, folder, digest="", path="/a.bin"):
    return download(Remote(server.url + path, "sub/a.bin", 0, digest), folder, progress=False)


def test_a_file_is_downloaded_once(server, tmp_path):
    target = fetch(server, tmp_path, MD5)
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == ["a.bin"]
    assert fetch(server, tmp_path, MD5) == target and len(server.asked) == 1


def test_a_cut_connection_is_continued_where_it_ended(server, tmp_path):
    server.cuts = [300_000, 400_000]
    assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
    assert [r for _, r in server.asked] == [None, "bytes=300000-", "bytes=700000-"]


def test_a_stopped_program_continues_later(server, tmp_path, monkeypatch):
    server.cuts = [500_000]
    monkeypatch.setattr(download_files.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path)
    assert not (tmp_path / "sub/a.bin").exists() and (tmp_path / "sub/a.bin.part").stat().st_size == 500_000
    assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
    assert server.asked[1][1] == "bytes=500000-"


def test_a_complete_part_gets_its_name_and_a_changed_file_begins_again(server, tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    note = {"url": f"{server.url}/a.bin", "validator": '"1"', "size": len(CONTENT)}
    (folder / "a.bin.part").write_bytes(CONTENT)
    (folder / "a.bin.part.json").write_text(json.dumps(note))
    assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
    (folder / "a.bin").unlink()
    (folder / "a.bin.part").write_bytes(b"other" * 1000)  # of a file that was there before
    (folder / "a.bin.part.json").write_text(json.dumps({**note, "validator": '"0"'}))
    assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
    for broken in ("", "[]", "{", json.dumps({**note, "url": "http://elsewhere"})):
        (folder / "a.bin").unlink()
        (folder / "a.bin.part").write_bytes(b"other" * 1000)
        (folder / "a.bin.part.json").write_text(broken)
        assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["no ranges", "no validator", "another part", "no length"])
def test_servers_that_cannot_continue_start_over(how, server, tmp_path):
    server.cuts = [300_000]
    server.ranges = how != "no ranges"
    server.etag = "" if how == "no validator" else '"1"'
    server.length = how != "no length"
    if how == "another part":
        server.shifted = True
        server.fails = []
    if how == "no length":
        server.cuts = []
    if how == "another part":
        # The wrong answer is thrown away, and the next request asks for everything.
        assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
        assert [r for _, r in server.asked] == [None, "bytes=300000-", None]
    else:
        assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT


def test_wrong_sums_are_tried_twice_and_leave_nothing(server, tmp_path):
    wrong = hashlib.md5(b"x").hexdigest()
    with pytest.raises(UserError, match=rf"sum of what came is {MD5}, published is {wrong}; it was downloaded twice"):
        fetch(server, tmp_path, wrong)
    assert len(server.asked) == 2 and os.listdir(tmp_path / "sub") == []


def test_sums_of_every_length(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    for kind in ("md5", "sha1", "sha256"):
        digest = hashlib.new(kind, CONTENT).hexdigest()
        assert sum_of(tmp_path / "a", digest) == digest
    assert sum_of(tmp_path / "a", "01234567") == hashlib.sha256(CONTENT).hexdigest()[:8]


def test_errors_of_servers(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the server says 404 Not Found; look at the address") as e:
        fetch(server, tmp_path, path="/missing")
    assert "\n" not in str(e.value) and len(server.asked) == 1
    assert fetch(server, tmp_path, MD5, "/moved").read_bytes() == CONTENT  # a redirect
    (tmp_path / "sub/a.bin").unlink()
    waited = []
    monkeypatch.setattr(download_files.time, "sleep", waited.append)
    server.fails = [(503, {"Retry-After": "7"}), (500, {}), (429, {"Retry-After": "x"})]
    assert fetch(server, tmp_path, MD5).read_bytes() == CONTENT
    assert waited[0] == 7 and 2 <= waited[1] <= 4 and 4 <= waited[2] <= 8
    (tmp_path / "sub/a.bin").unlink()
    server.fails = [(503, {})] * 100
    with pytest.raises(UserError, match="the server says 503 Service Unavailable, 8 times in a row; nothing came"):
        fetch(server, tmp_path)


def test_no_server_and_no_room(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no answer \(.*efused\), 8 times in a row"):
        download(Remote("http://127.0.0.1:9/a", "a"), tmp_path, progress=False)
    with pytest.raises(UserError, match="x needs about 1e\\+03 TB|x needs about 1000 TB"):
        check_space(tmp_path / "new", 10**15, "x")
    monkeypatch.setattr(download_files.shutil, "disk_usage", lambda p: type("D", (), {"free": 1000})())
    with pytest.raises(UserError, match="has 1 kB left: make room"):
        fetch(server, tmp_path)


def test_many_files_at_once_name_what_is_missing(server, tmp_path):
    server.files = {f"/{i}.jpg": b"%d" % i for i in range(40)}
    remotes = [Remote(f"{server.url}/{i}.jpg", f"{i}.jpg") for i in range(43)]
    (tmp_path / "3.jpg").write_bytes(b"there")
    missing = download_many(remotes, tmp_path, workers=8)
    assert sorted(missing) == ["40.jpg", "41.jpg", "42.jpg"]
    assert (tmp_path / "39.jpg").read_bytes() == b"39" and (tmp_path / "3.jpg").read_bytes() == b"there"
    assert "/3.jpg" not in {p for p, _ in server.asked} and len(os.listdir(tmp_path)) == 40


# ------------------------------------------------------------------------------------------------ unpacking
def zip_of(files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return buffer.getvalue()


def tgz_of(files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as t:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            t.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("make", [zip_of, tgz_of])
@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt"])
def test_members_that_lead_out_of_the_folder_are_refused(make, name, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.bin").write_bytes(make({"good.txt": b"x", name: b"y"}))
    with pytest.raises(UserError, match="would be written outside of the folder"):
        tool.unpack(tmp_path / "a.bin", tmp_path / "in")
    assert os.listdir(tmp_path / "in") == [] and sorted(os.listdir(tmp_path)) == ["a.bin", "in"]


def test_unpacking_is_all_or_nothing_and_replaces_nothing(tmp_path):
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    (out / "old" / "mine.txt").write_text("mine")
    (tmp_path / "a.zip").write_bytes(zip_of({"old/b.txt": b"b", "new/c.txt": b"c", "new/d/e.txt": b"e"}))
    assert tool.unpack(tmp_path / "a.zip", out) == [out / "new"]
    assert sorted(os.listdir(out)) == ["new", "old"] and os.listdir(out / "old") == ["mine.txt"]
    assert (out / "new/d/e.txt").read_bytes() == b"e"
    broken = bytearray(zip_of({"later/a.txt": b"a" * 1000, "later/b.txt": b"b" * 1000}))
    broken[broken.index(b"b" * 100) + 5] ^= 1
    (tmp_path / "b.zip").write_bytes(broken)
    with pytest.raises(UserError, match=r"b\.zip cannot be unpacked: Bad CRC-32"):
        tool.unpack(tmp_path / "b.zip", out)
    assert sorted(os.listdir(out)) == ["new", "old"]


def test_links_in_a_tar_are_not_followed(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as t:
        link = tarfile.TarInfo("d/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
        t.addfile(tarfile.TarInfo("d/a.txt"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    tool.unpack(tmp_path / "a.tar", tmp_path / ".")
    assert os.listdir(tmp_path / "d") == ["a.txt"]


# ------------------------------------------------------------------------------------------------ the program
def run(server, folder, *words) -> int:
    return tool.main([*words, "--output", str(folder), "--mirror", server.url])


def without_sums(monkeypatch, which):
    files = {part: r._replace(digest="", size=0) for part, r in tool.COCO[which].items()}
    monkeypatch.setitem(tool.COCO, which, files)


def test_coco_with_minival(server, tmp_path, monkeypatch, capsys):
    without_sums(monkeypatch, "coco2014")
    server.files = {
        "/annotations/annotations_trainval2014.zip": zip_of({"annotations/instances_val2014.json": b"{}"}),
        "/detectron/coco/coco_annotations_minival.tgz": tgz_of({
            "annotations/instances_minival2014.json": b"{}", "annotations/instances_valminusminival2014.json": b"{}"
        }),
        "/zips/train2014.zip": zip_of({"train2014/a.jpg": b"a"}), "/zips/val2014.zip": zip_of({"val2014/b.jpg": b"b"}),
    }  # fmt: skip
    assert run(server, tmp_path, "coco2014") == 0
    assert sorted(os.listdir(tmp_path)) == ["annotations", "train2014", "val2014"]
    assert len(os.listdir(tmp_path / "annotations")) == 3 and (tmp_path / "val2014/b.jpg").read_bytes() == b"b"
    assert 'DATA.TRAIN=\'["coco_train2014","coco_valminusminival2014"]\'' in capsys.readouterr().err
    asked = len(server.asked)
    assert run(server, tmp_path, "coco2014") == 0 and len(server.asked) == asked  # everything is there
    assert run(server, tmp_path, "coco2014", "--parts", "tset") == 2


def test_coco_that_stays_packed_and_a_wrong_sum(server, tmp_path, monkeypatch, capsys):
    server.files = {"/zips/val2017.zip": zip_of({"val2017/b.jpg": b"b"})}
    assert run(server, tmp_path, "coco2017", "--parts", "val", "--no-unpack") == 2
    assert "published is 442b8da7639aecaf257c1dceb8ba8c80" in capsys.readouterr().err
    without_sums(monkeypatch, "coco2017")
    assert run(server, tmp_path, "coco2017", "--parts", "val", "--no-unpack") == 0
    assert os.listdir(tmp_path) == ["val2017.zip"]


def test_open_images_by_class(server, tmp_path, capsys):
    boxes = "ImageID,Source,LabelName\n0002,x,/m/cat\n0001,x,/m/cat\n0003,x,/m/dog\n../x,x,/m/cat\n0005,x,/m/cat\n"
    server.files = {
        "/openimages/v7/oidv7-class-descriptions-boxable.csv": b"LabelName,DisplayName\n/m/cat,Cat\n/m/dog,Dog\n",
        "/openimages/2018_04/bbox_labels_600_hierarchy.json": b"{}",
        "/openimages/v5/test-annotations-bbox.csv": boxes.encode(),
        "/openimages/v5/test-annotations-human-imagelabels-boxable.csv": b"ImageID,LabelName\n",
        "/openimages/v5/test-annotations-object-segmentation.csv": b"MaskPath\n",
        **{f"/openimages/v5/test-masks/test-masks-{d}.zip": zip_of({f"{d}.png": b"m"}) for d in "0123456789abcdef"},
        "/open-images-dataset/test/0001.jpg": b"1", "/open-images-dataset/test/0003.jpg": b"3",
    }  # fmt: skip
    words = ["openimages", "--split", "test", "--masks", "--workers", "4", "--classes", "Cat"]
    assert run(server, tmp_path, *words, "--limit", "2") == 0
    said = capsys.readouterr().err
    assert "2 images of test have an object of Cat" in said and "1 images are not there any more, e.g. 0002.jpg" in said
    assert "DATA.CLASS_NAMES='['Cat']'" in said or "DATA.CLASS_NAMES" in said
    assert os.listdir(tmp_path / "test") == ["0001.jpg"] and len(os.listdir(tmp_path / "test-masks")) == 16
    asked = len(server.asked)
    assert run(server, tmp_path, *words, "--limit", "2") == 0
    assert [p for p, _ in server.asked[asked:]] == ["/open-images-dataset/test/0002.jpg"]
    assert run(server, tmp_path, "openimages", "--split", "test", "--classes", "Unicorn") == 2


def test_backbones_and_balloons(server, tmp_path, capsys):
    content = b"weights"
    server.files = {"/FasterRCNN/ImageNet-R50-AlignPadding.npz": content, "/models/resnet50-0676ba61.pth": content,
                    "/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl":
                        content,
                    "/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip":
                        zip_of({"balloon/train/via_region_data.json": b"{}", "__MACOSX/x": b""})}  # fmt: skip
    assert run(server, tmp_path, "backbone", "--name", "R50-AlignPadding") == 0
    assert "BACKBONE.WEIGHTS=" in capsys.readouterr().err
    assert run(server, tmp_path, "backbone", "--name", "torchvision-resnet50") == 2  # its name has its sum
    assert "published is 0676ba61" in capsys.readouterr().err
    assert run(server, tmp_path, "backbone", "--name", "R5") == 2
    assert run(server, tmp_path, "detector", "--name", "detectron2-mask-R50-3x") == 0
    assert f"tools/convert.py {tmp_path}/model_final_f10217.pkl" in capsys.readouterr().err
    (tmp_path / "model_final_f10217.pkl").unlink()
    assert run(server, tmp_path, "detector", "--name", "R50-AlignPadding") == 2  # a backbone's
    assert run(server, tmp_path / "packed", "balloon", "--no-unpack") == 0
    assert os.listdir(tmp_path / "packed") == ["balloon_dataset.zip"]
    shutil.rmtree(tmp_path / "packed")
    assert run(server, tmp_path, "balloon") == 0
    assert sorted(os.listdir(tmp_path)) == ["ImageNet-R50-AlignPadding.npz", "balloon"]
    assert "DATA.TRAIN=balloon_train" in capsys.readouterr().err


def test_a_stopped_program_says_how_it_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "_get_balloon", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tool.main(["balloon", "--output", str(tmp_path)]) == 130
    assert f"this continues: python tools/download.py balloon --output {tmp_path}" in capsys.readouterr().err
