"""What the processor of this machine can do, as Linux tells it in /proc/cpuinfo."""

import platform
import re
from pathlib import Path

__all__ = ["computes_bfloat16", "cpu_facts"]

# Names of /proc/cpuinfo that determine the speed of convolutions; the last two speed up bfloat16.
_FEATURES = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"]


def cpu_facts(cpuinfo: str) -> tuple[str, dict[str, bool]]:
    """(model name, {feature: present}) from the text of /proc/cpuinfo; ARM names its lines differently."""
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M)
    present = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else platform.machine(), {f: f in present for f in _FEATURES}


def computes_bfloat16() -> bool:
    """Whether this machine's processor has instructions for products of bfloat16."""
    try:
        features = cpu_facts(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))[1]
    except OSError:
        return False
    return features["avx512_bf16"] or features["amx_bf16"]
