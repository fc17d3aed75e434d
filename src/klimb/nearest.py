"""What was probably meant: for messages about a name that is not there, the nearest of those that are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """The end of a message about an unknown name: the one name that looks like it or begins with it, if any does.

    Args:
        name: what was written.
        names: what could have been.
        prefix: what is written before such names, "--" for options.

    Returns:
        " (did you mean 'it'?)", or nothing.

    Example:
        >>> nearest("learning_rat", ["seed", "learning_rate"], prefix="--")
        " (did you mean '--learning_rate'?)"
        >>> nearest("dataset", ["seed", "dataset_name"]), nearest("gamma", ["seed", "dataset_name"])
        (" (did you mean 'dataset_name'?)", '')
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    if not near and len(name) > 2:  # "lr" begins lr_scheduler_type, and learning_rate was meant
        near = [n for n in names if n.startswith(name)]
    return f" (did you mean '{prefix}{near[0]}'?)" if near else ""


def nearest_file(path: Path) -> str:
    """The same for a file that is not there, from the names in its folder; or that there is no such folder either."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    folder = "" if path.parent == Path() else f"{path.parent}/"
    return nearest(path.name, (p.name for p in path.parent.iterdir()), prefix=folder)


def nearest_run(path: Path) -> str:
    """The same for a directory that should hold a run: the nearest run beside it, around it or in a folder next to its own; or those in it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("dpo", "reviews"):
        ...         (Path(folder) / "runs" / name).mkdir(parents=True)
        ...         (Path(folder) / "runs" / name / "config.yaml").touch()
        ...     for name in ("runs/review", "run/reviews", "runs/reviews/report.html", "runs", "runs/x"):
        ...         print(nearest_run(Path(folder, name)).replace(folder, ""))
         (did you mean '/runs/reviews'?)
         (did you mean '/runs/reviews'?)
         (did you mean '/runs/reviews'?)
         (it is a folder of runs: dpo, reviews)
        <BLANKLINE>
    """
    inside = sorted(file.parent.name for file in path.glob("*/config.yaml"))
    if inside:
        return f" (it is a folder of runs: {', '.join(inside[:5])}{', ...' * (len(inside) > 5)})"
    if not path.name:  # the current folder, or the topmost one
        return ""
    above = path.parent
    if (above / "config.yaml").is_file():
        return f" (did you mean '{above}'?)"
    depth = 1 if above.exists() else 2  # of the names that are compared
    files = path.parents[depth - 1].glob("/".join(["*"] * depth) + "/config.yaml")
    runs = {"/".join(file.parts[-1 - depth : -1]): file.parent for file in files}
    near = difflib.get_close_matches("/".join(path.parts[-depth:]), runs, n=1)
    return f" (did you mean '{runs[near[0]]}'?)" if near else ""
