"""How the suite runs: property tests draw the same examples in every run (HYPOTHESIS_PROFILE=explore draws new ones),
and what several pytest processes (-n) may not do at the same time stays together."""

import os

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """A file's tests run in one process, as its fixtures ask for; recipes are independent, and jobs of several ranks
    run one after the other."""
    for item in items:
        group = item.path.name if item.path.parent.name != "distributed" else "distributed"
        item.add_marker(pytest.mark.xdist_group(item.name if group == "test_recipes.py" else group))
