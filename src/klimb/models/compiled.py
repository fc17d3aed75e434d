"""The loops of `cpu_kernels.cpp` as a library, compiled once for a machine by the C++ compiler that is there.

Kept in the user's cache under a name made of the source, the compiler and the processor, so another of these compiles anew. On
Linux with g++ or clang (or what the variable CXX names) and the OpenMP that torch has loaded: a second one beside it would bring
threads of its own. Without any of these there is no library, and torch's operations do the same work more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

SWITCH = "KLIMB_CPU_KERNELS"
"""the variable of the environment that leaves them out when it says 0"""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where there is no compiler; a compiler that fails is warned of."""
    compiler, openmp = _compiler(), _openmp()
    if os.environ.get(SWITCH) == "0" or compiler is None or openmp is None:
        return None
    source = files("klimb.models").joinpath("cpu_kernels.cpp").read_bytes()
    command = [compiler, *_flags()]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = (source, version, _processor(), str(openmp).encode(), " ".join(command).encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".so"
    folder = _cache()
    if not (folder / name).exists():
        failure = _compile(command, source, openmp, folder / name)
        if failure:
            warnings.warn(
                f"{compiler} could not compile klimb's loops for this processor ({failure}); drawing and training on the "
                f"CPU go on without them, at about half the speed. Set CXX to another compiler, or {SWITCH}=0 to "
                "say that this is meant",
                stacklevel=2,
            )
            return None
    return ctypes.CDLL(str(folder / name))


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    found = [shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])]
    return next((path for path in found if path), None) if platform.system() == "Linux" else None


def _openmp() -> Path | None:
    """The OpenMP of GCC that came with torch."""
    home = Path(torch.__file__).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    return found[0] if found else None


def _flags() -> list[str]:
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return f"-std=gnu++17 -O3 {tuned} -fPIC -fopenmp -fno-math-errno -Wno-psabi".split()


def _processor() -> bytes:
    """What the processor can do: a cache may lie in a home that machines of several kinds share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(told)).encode() + platform.machine().encode()


def _cache() -> Path:
    """A folder of the user's alone, kept if there can be one."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klimb"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="klimb-"))
    mine = home.stat().st_uid == os.getuid() and os.access(home, os.W_OK | os.X_OK)
    return home if mine else Path(tempfile.mkdtemp(prefix="klimb-"))


def _compile(command: list[str], source: bytes, openmp: Path, target: Path) -> str:
    """Write the library, whole or not at all; what went wrong, empty if nothing did."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        text, part, whole = (Path(folder) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        text.write_bytes(source)
        for step in (
            [*command, "-c", str(text), "-o", str(part)],
            [command[0], "-shared", str(part), str(openmp), "-o", str(whole)],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                return next((line for line in lines if "error" in line), lines[-1])[:200]
        whole.replace(target)
    return ""
