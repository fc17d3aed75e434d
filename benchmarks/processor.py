"""What a table or a record calls the processor: its architecture, and the best it has for products of bfloat16."""

import platform
from pathlib import Path

WAYS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""best first, as Linux calls them"""


def processor(about=Path("/proc/cpuinfo")):
    """x86_64 amx_bf16, say; the architecture alone where the system says no more.

    >>> processor(Path("nowhere")) == platform.machine()
    True
    """
    flags = about.read_text().split() if about.exists() else []
    return " ".join([platform.machine(), *[way for way in WAYS if way in flags][:1]])
