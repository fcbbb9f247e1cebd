"""Which images make up a step: every one once an epoch, rare classes more often where asked."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from format_sets import DATA
from hypothesis import given
from hypothesis import strategies as st

from data_sampling import StepPlan, class_aware_images, repeat_factors
from dataset_openimages import load_openimages

plans = st.tuples(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 5))


@pytest.fixture
def open_images(tmp_path) -> Path:
    return shutil.copytree(DATA / "golden_oid", tmp_path / "oid")


@pytest.mark.quick
def test_repeat_factors_equal_the_formula(open_images):
    split = load_openimages("oid", open_images, "validation", group_of="object")
    threshold = 0.5
    shown = [set(split.annotations(i)["labels"].tolist()) for i in range(len(split))]
    for i, factor in enumerate(repeat_factors(split, threshold)):
        fractions = [sum(c in s for s in shown) / len(shown) for c in shown[i]]
        assert factor == pytest.approx(max([max(1, (threshold / f) ** 0.5) for f in fractions], default=1))
    assert (repeat_factors(split, 1e-9) == 1).all()


@pytest.mark.quick
def test_class_aware_draws_show_every_class_equally_often(open_images):
    split = load_openimages("oid", open_images, "validation", group_of="object")
    images = class_aware_images(split, 40000, seed=1)
    assert np.array_equal(images, class_aware_images(split, 40000, seed=1))
    c = split.columns
    owners = np.repeat(np.arange(len(split)), np.diff(c["first_object"]))
    present = np.unique(c["labels"])
    drawn = np.bincount(images, minlength=len(split))
    # Each class is drawn 40000 / C times, and seen at least that often, since images show other classes too.
    for label in present:
        assert drawn[np.unique(owners[c["labels"] == label])].sum() > 0.95 * 40000 / len(present)
    assert (drawn[np.diff(c["first_object"]) == 0] == 0).all()


@pytest.mark.quick
@given(plans)
def test_every_image_is_used_exactly_once_an_epoch(plan):
    portrait, batch, seed = np.array(plan[0]), plan[1], plan[2]
    steps = StepPlan(portrait, batch, seed)
    images, epochs = len(portrait), 0
    stream = []
    for step in range(5 * -(-images // batch) + 5):
        stream += steps.images(step).tolist()
    for epochs in range(1, len(stream) // images + 1):
        # The steps that lie wholly in the first epochs: all but the last few of their images, fewer than a step.
        if batch <= images:
            used = np.bincount(stream[: epochs * images // batch * batch], minlength=images)
            assert used.max() <= epochs and (epochs - used).sum() == epochs * images % batch
            assert used.min() >= epochs - 1


@pytest.mark.quick
@given(plans, st.integers(0, 50))
def test_any_step_is_found_without_those_before_it(plan, step):
    portrait, batch, seed = np.array(plan[0]), plan[1], plan[2]
    steps = StepPlan(portrait, batch, seed)
    expected = [steps.images(s) for s in range(step + 1)][-1]
    np.testing.assert_array_equal(StepPlan(portrait, batch, seed).images(step), expected)
    assert len(expected) == batch


@pytest.mark.quick
def test_steps_are_of_one_orientation_except_at_the_end_of_an_epoch():
    portrait = np.random.default_rng(0).random(1000) < 0.3
    steps = StepPlan(portrait, 8, 1)
    mixed = [s for s in range(125) if 0 < portrait[steps.images(s)].sum() < 8]
    assert len(mixed) <= 2 and all(s >= 123 for s in mixed)
    kinds = [portrait[steps.images(s)].all() for s in range(100)]
    assert 0.1 < np.mean(kinds) < 0.5  # both kinds from the beginning


@pytest.mark.quick
def test_epochs_and_seeds_differ():
    def first_steps(seed):
        plan = StepPlan(np.zeros(50, bool), 5, seed)
        return [np.concatenate([plan.images(s) for s in range(e * 10, e * 10 + 10)]).tolist() for e in range(2)]

    (a, b), (c, _) = first_steps(0), first_steps(1)
    assert a != b and a != c and sorted(a) == sorted(b) == list(range(50))
