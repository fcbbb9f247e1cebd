"""Splitting an annotation file: whole images, nothing lost, nothing overwritten."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from tools.split import main, split

pytestmark = pytest.mark.quick


def content(images: int) -> dict:
    return {
        "info": {"year": 2026},
        "images": [{"id": f"a{i}", "file_name": f"{i}.jpg"} for i in range(images)],
        "annotations": [{"id": i, "image_id": f"a{i % images}", "category_id": 7} for i in range(3 * images)],
        "categories": [{"id": 7, "name": "fig"}],
    }


@given(images=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_every_image_is_in_exactly_one_part_with_all_of_its_annotations(images, share, seed):
    whole = content(images)
    train, val = split(whole, share, seed)
    ids = [[image["id"] for image in part["images"]] for part in (train, val)]
    assert sorted(ids[0] + ids[1]) == sorted(image["id"] for image in whole["images"])
    assert not set(ids[0]) & set(ids[1]) and min(map(len, ids)) >= 1
    assert abs(len(ids[1]) - share * images) <= 1
    for part, own in zip((train, val), ids):
        assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in own]
        assert part["categories"] == whole["categories"] and part["info"] == whole["info"]
    assert split(whole, share, seed) == (train, val)


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="1 images"):
        split(content(1), 0.2, 1)


def test_the_program_writes_both_files_and_never_overwrites_them(tmp_path, capsys):
    source = tmp_path / "labels.json"
    source.write_text(json.dumps(content(10)))
    assert main([str(source), "--val", "0.3"]) == 0
    assert len(json.loads((tmp_path / "val.json").read_text())["images"]) == 3
    before = (tmp_path / "train.json").read_bytes()
    assert main([str(source), "--seed", "9"]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "train.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[]", "not COCO's format"),
        ('{"images": [], "annotations": []}', "not COCO's format"),
        ('{"images": [{}, {}], "annotations": [], "categories": []}', "malformed"),
        ('{"images": [1, 2], "annotations": [], "categories": []}', "malformed"),
        ("{", "JSON"),
    ],
)
def test_a_file_that_is_not_cocos_is_named_in_one_line(tmp_path, capsys, text, wanted):
    (tmp_path / "labels.json").write_text(text)
    assert main([str(tmp_path / "labels.json")]) == 2
    message = capsys.readouterr().err
    assert wanted in message and "labels.json" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "train.json").exists()


def test_a_share_outside_of_0_to_1_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "labels.json"), "--val", "20"]) == 2
    assert "--val 20" in capsys.readouterr().err
