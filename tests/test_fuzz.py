"""A few broken inputs of every kind end in a result or in one line; `make fuzz` tries thousands."""

from pathlib import Path

import pytest

from tests.fuzz.inputs import KINDS, make
from tests.fuzz.run import MEMORY, SECONDS, Worker, outcome, peak_memory, problems_of

BROKEN_BY_NATURE = ("images", "pickles", "settings", "weights")  # made from scratch: there is no sound one


@pytest.fixture(scope="module")
def worker():
    """A process of its own, for what other tests left in memory is no input's fault."""
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_broken_inputs_end_in_a_result_or_one_line(kind, worker):
    found = {number: worker.ask(f"{kind}:{number}")["problems"] for number in range(10_000, 10_006)}
    assert not any(found.values()), found


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in BROKEN_BY_NATURE])
def test_what_is_broken_was_sound_before(kind, tmp_path):
    """Else every input would be refused for the same reason, and nothing would be tried."""
    results = [call() for call in make(kind, 7, tmp_path, sound=True)]
    assert 0 in results or any(result not in (2, None) for result in results), results


def test_an_input_is_the_same_each_time(tmp_path):
    for kind in ("COCO", "weights", "pickles"):
        contents = []
        for turn in ("a", "b"):
            folder = tmp_path / f"{kind}-{turn}"
            folder.mkdir()
            make(kind, 3, folder)
            contents.append({p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()})
        assert contents[0] == contents[1]


def test_what_must_not_happen_is_noticed(tmp_path):
    assert "ZeroDivisionError" in outcome(lambda: 1 / 0)
    assert outcome(lambda: None) == ""
    file = tmp_path / "a.json"
    file.write_text("{}")
    calls = [lambda: file.write_text("[]"), lambda: 1 / 0]
    found = problems_of(calls, tmp_path, lambda: MEMORY + 1, lambda: SECONDS + 1)
    assert sorted(found) == ["file changed", "memory", "time", "traceback"]
    assert problems_of([file.read_text], tmp_path, lambda: 0, lambda: 0) == {}
    before = peak_memory()
    bytearray(300 * 2**20)
    assert peak_memory() > before - 2**20 and peak_memory() > 250 * 2**20
    assert Path(file).read_text() == "[]"
