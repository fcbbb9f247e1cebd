"""Many small pieces of work on several threads, in order."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

__all__ = ["in_threads"]


def in_threads(function: Callable[[Any], Any], items: Sequence, threads: int, what: str) -> list:
    """function(item) of every item, in order. Items are grouped by the hundred, because a task costs more than many
    items."""
    parts = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: [function(item) for item in part], parts)
        hidden = not sys.stderr.isatty() or len(parts) < 40
        return [result for part in tqdm(found, what, len(parts), disable=hidden, unit="x256") for result in part]
