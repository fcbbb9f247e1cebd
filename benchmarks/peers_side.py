"""How a side of peers.py works, in any environment: it is told when to do its work, and answers with lines of JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["peak_mib", "say", "serve"]


def serve(unit: Callable[[], Any], notes: dict[str, Any]) -> None:
    """Says that it is ready, then does the unit of work for each line of standard input and says its seconds; at the
    end, the peak memory of the process."""
    say({"ready": notes})
    for _ in sys.stdin:
        start = time.perf_counter()
        unit()
        say({"seconds": time.perf_counter() - start})
    say({"peak_mib": peak_mib()})


def say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


def peak_mib() -> float:
    """MiB that were resident at once in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
