"""The loops of the `cpu_*.cpp` beside this file as a library, compiled once for a machine by the C++ compiler that is there.

Kept in the user's cache under a name made of the source, the compiler and the processor, so another of these compiles anew. On
Linux with g++ (or what the variable CXX names) and the OpenMP that torch has loaded, which is GCC's: a second one beside it would bring
threads of its own. Without any of these there is no library, and torch's operations do the same work more slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

SOURCES = (
    *("cpu_vectors.h", "cpu_tiles.h", "cpu_between.h", "cpu_attend_token.h", "cpu_products.h"),
    *("cpu_kernels.cpp", "cpu_attention.cpp", "cpu_token.cpp"),
)
SWITCH = "KLIMB_CPU_KERNELS"
"""the variable of the environment that leaves them out when it says 0"""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where there is no compiler; where one fails, or nothing can be kept or loaded, that is said once."""
    compiler, openmp = _compiler(), _openmp()
    if os.environ.get(SWITCH) == "0" or compiler is None or openmp is None:
        return None
    try:
        return _loaded(compiler, openmp)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"klimb's loops could not be compiled for this processor by {compiler[0]} ({error}); drawing and training on the "
            f"CPU go on without them, at about half the speed. Set CXX to a g++ that works, or {SWITCH}=0 to "
            "say that this is meant",
            stacklevel=2,
        )
        return None


def _loaded(compiler: list[str], openmp: Path) -> ctypes.CDLL:
    sources = {name: files("klimb.models").joinpath(name).read_bytes() for name in SOURCES}
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    parts = (
        *sources.values(),
        version,
        _processor(),
        str(openmp).encode(),
        " ".join([*compiler, *_flags()]).encode(),
    )
    target = _cache() / (hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".so")
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # torn, or of a machine that shares this home: made anew, once
            target.unlink()
    _compile(compiler, sources, openmp, target)
    return ctypes.CDLL(str(target))


def _compiler() -> list[str] | None:
    """The command that compiles, without options."""
    if platform.system() != "Linux":
        return None
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def _openmp() -> Path | None:
    """The OpenMP of GCC that came with torch."""
    home = Path(torch.__file__).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    return found[0] if found else None


def _flags() -> list[str]:
    tuned = ["-mcpu=native"]
    if platform.machine() in ("x86_64", "AMD64"):
        tuned = ["-march=native", *([] if _lends_tiles() else ["-U__AMX_BF16__"])]
    return ["-std=gnu++17", "-O3", *tuned, "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi"]


def _lends_tiles() -> bool:
    """True where the system lets this process use the processor's matrix tiles (AMX); a sandbox may not."""
    arch_prctl, ask_for, tiles = 158, 0x1023, 18  # of Linux on x86-64
    return ctypes.CDLL(None).syscall(arch_prctl, ask_for, tiles) == 0


def _processor() -> bytes:
    """What the processor can do: a cache may lie in a home that machines of several kinds share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(told)).encode() + platform.machine().encode()


def _cache() -> Path:
    """A folder that nobody else can write into."""
    named, home = os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME")
    kept = [*([Path(named)] if named else []), *([Path(home) / ".cache"] if home else [])]
    for folder in [
        *(place / "klimb" for place in kept),
        Path(tempfile.gettempdir()) / f"klimb-{os.getuid()}",
    ]:
        with contextlib.suppress(OSError):  # the next one may do
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            seen = folder.stat()
            if seen.st_uid == os.getuid() and not seen.st_mode & 0o022:
                return folder
    raise OSError("there is no folder to keep them in that only you can write into, such as ~/.cache/klimb")


def _compile(compiler: list[str], sources: dict[str, bytes], openmp: Path, target: Path) -> None:
    """Write the library, whole or not at all.

    Raises:
        RuntimeError: the compiler refuses, in its words.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / "kernels.so"
        for name, source in sources.items():
            (Path(folder) / name).write_bytes(source)
        texts = [Path(folder) / name for name in sources if name.endswith(".cpp")]
        parts = [str(text.with_suffix(".o")) for text in texts]
        for step in (
            *(
                [*compiler, *_flags(), "-c", str(text), "-o", part]
                for text, part in zip(texts, parts, strict=True)
            ),
            # a name that stays unknown, such as another OpenMP's, is a mistake here and not when it is loaded
            [*compiler, "-shared", "-Wl,-z,defs", *parts, str(openmp), "-lm", "-o", str(whole)],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                telling = (line for line in lines if "error" in line or "undefined" in line)
                raise RuntimeError(next(telling, lines[-1])[:200])
        if not target.exists():
            whole.replace(target)
