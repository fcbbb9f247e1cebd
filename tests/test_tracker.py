"""utils/tracker.py: ids that stay over crossings, gaps, births and deaths, against a tracker that tries everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.tracker import Tracker, _assign

pytestmark = pytest.mark.quick


def box(x, y, size=20.0):
    return [x, y, x + size, y + size]


def run(frames, max_age=5, every=1):
    """frames: for each frame a list of (box, label, score) -> ids of each frame."""
    tracker = Tracker(0.5, max_age)
    found = []
    for number, objects in enumerate(frames):
        boxes = np.array([o[0] for o in objects]).reshape(-1, 4)
        found.append(tracker.update(number * every, boxes, [o[1] for o in objects], [o[2] for o in objects]))
    return found


def test_an_object_keeps_its_id_while_it_moves_and_is_listed_anywhere():
    frames = [[(box(5 * t, 10), 1, 0.9), (box(200 - 5 * t, 100), 1, 0.9)][:: 1 if t % 2 else -1] for t in range(20)]
    for t, ids in enumerate(run(frames)):
        assert ids == ([1, 2] if t % 2 == 0 else [2, 1])  # the first frame lists the second one first


@pytest.mark.parametrize("every", [1, 4])
def test_objects_that_cross_keep_their_ids_because_they_go_on_as_before(every):
    """Where they meet, each is nearer to the other's last place than to its own."""

    def place(t):
        return [(box(101 + 4 * (t - 15), 50), 1, 0.9), (box(99 - 4 * (t - 15), 50), 1, 0.9)]

    for ids in run([place(t) for t in range(31)], every=every):
        assert ids == [1, 2]


@pytest.mark.parametrize("hidden", [1, 5, 6])
def test_a_hidden_object_is_known_again_until_its_age_ends(hidden):
    frames = [[(box(4 * t, 10), 1, 0.9)] if not 10 <= t < 10 + hidden else [] for t in range(25)]
    ids = run(frames, max_age=5)
    assert ids[9] == [1] and ids[10 + hidden] == ([1] if hidden <= 5 else [2])


def test_births_and_deaths_never_reuse_an_id():
    frames = [[(box(0, 0), 1, 0.9)]] * 3 + [[(box(300, 0), 1, 0.9)]] * 12 + [[(box(0, 0), 1, 0.9)]] * 2
    ids = [i for frame in run(frames) for i in frame]
    assert ids == [1] * 3 + [2] * 12 + [3] * 2


def test_a_low_score_continues_an_object_but_starts_none():
    low = [(box(0, 0), 1, 0.2)]
    assert run([low, low]) == [[None], [None]]
    assert run([[(box(0, 0), 1, 0.9)], *[low] * 20, [(box(0, 0), 1, 0.9)]]) == [[1]] * 22


def test_a_high_score_takes_an_object_before_a_low_one_that_fits_better():
    first = [(box(0, 0), 1, 0.9)]
    assert run([first, [(box(0, 0), 1, 0.2), (box(4, 0), 1, 0.9)]])[1] == [None, 1]


def test_classes_do_not_continue_each_other():
    assert run([[(box(0, 0), 1, 0.9)], [(box(0, 0), 2, 0.9)], [(box(0, 0), 1, 0.9)]]) == [[1], [2], [1]]


boxes = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(4, 20), st.integers(4, 20)), max_size=4
).map(lambda rows: np.array([[x, y, x + w, y + h] for x, y, w, h in rows], float).reshape(-1, 4))


@given(tracks=boxes, found=boxes, data=st.data())
def test_the_assignment_is_the_best_of_all(tracks, found, data):
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=16, max_size=16))).reshape(4, 4)
    allowed = allowed[: len(tracks), : len(found)]

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    value = np.array([[iou(a, b) for b in found] for a in tracks]).reshape(len(tracks), len(found))
    value = np.where(allowed & (value >= 0.3), value, 0)
    places = [*range(len(found)), *[-1] * len(tracks)]
    best = max(
        sum(value[t, c] for t, c in enumerate(p) if c >= 0) for p in set(itertools.permutations(places, len(tracks)))
    )
    pairs = _assign(tracks, found, allowed)
    assert all(value[t, c] > 0 for t, c in pairs)
    assert len({t for t, _ in pairs}) == len({c for _, c in pairs}) == len(pairs)
    assert sum(value[t, c] for t, c in pairs) == pytest.approx(best)
