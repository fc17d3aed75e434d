"""The floors of the house: a module imports from its own floor and from those below, never from above.

The source is read, not run, so an import inside a function counts too.
"""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import klimb

SOURCE = Path(klimb.__file__).parent
FLOORS = [  # from the bottom
    {"numbers", "objectives"},
    {"exact"},
    {"data", "nearest", "ranks", "spans"},
    {"models", "samplers", "rewards", "target"},
    {"methods", "backward"},
    {"learn", "log_z"},
    {"batch", "steps"},
    {"pool"},
    {"plan", "train", "measure", "sample", "distil", "plan_distil", "reward_model"},
    {"report", "explorer", "store", "config", "dataset", "comparisons", "convert", "tasks"},
    {"offline", "trackers", "records", "checkpoint", "watch", "profile"},
    {"loaded", "named_models", "choice", "aim"},
    {"training", "planning", "diagnosis"},
    {"beginning", "judging", "measuring", "sampling"},
    {"run", "reward_run", "problems"},
    {"integrations"},
    {"screen", "screen_derive", "screen_profile", "screen_diagnose", "screen_reward"},
    {
        "cli",
        "cli_data",
        "cli_methods",
        "cli_derive",
        "cli_diagnose",
        "cli_report",
        "cli_explore",
        "launch",
        "__main__",
    },
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
VERBS = {"pool", "plan", "train", "measure", "sample"}
THIRD_PARTY = {"numbers": {"torch", "numpy"}, "objectives": {"torch"}, "exact": {"torch"}}
LAZY = {"numbers": {"scipy", "arviz_stats"}}  # slow to import: only inside functions
FILES_AND_PRINTING = {
    "open",
    "print",
    "write_text",
    "write_bytes",
    "read_text",
    "read_bytes",
    "mkdir",
    "unlink",
}

MODULES = {
    ".".join(("klimb", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports(tree):
    """Every imported name, its line, whether it is inside a function, and how many dots it starts with."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside, 0
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module or ''}.{alias.name}", node.lineno, id(node) in inside, node.level


def violations(module, source):
    """What is wrong with the imports and calls of one module, a line each."""
    tree = ast.parse(source)
    parts = module.split(".")
    package = parts[1] if len(parts) > 1 else None
    found = []
    for name, line, lazy, dots in imports(tree):
        where = f"{module}, line {line}: imports {name}"
        top, *rest = name.split(".")
        if dots:
            found.append(f"{where} by dots; write klimb. in full")
        elif top == "klimb" and package is None:
            found.append(f"{where}: `import klimb` itself must stay empty and quick")
        elif top == "klimb" and rest[0] in FLOOR_OF:
            if FLOOR_OF[rest[0]] > FLOOR_OF[package]:
                found.append(f"{where} from a floor above")
            elif package == "objectives" and rest[:2] != ["numbers", "baselines"] and rest[0] != "objectives":
                found.append(f"{where}; objectives take torch and klimb.numbers.baselines alone")
        elif top != "klimb" and package in THIRD_PARTY and top not in sys.stdlib_module_names:
            if top in LAZY.get(package, ()):
                if not lazy:
                    found.append(f"{where} at the top; it is slow, import it inside the function")
            elif top not in THIRD_PARTY[package]:
                found.append(f"{where}; {package} takes {', '.join(sorted(THIRD_PARTY[package]))} alone")
    if package in VERBS:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", None))
                if called in FILES_AND_PRINTING:
                    found.append(f"{module}, line {node.lineno}: {called}(...); only the edge does that")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_keeps_to_its_floor(module):
    if module != "klimb":
        assert module.split(".")[1] in FLOOR_OF, f"{module} has no floor: give it one in FLOORS"
    assert violations(module, MODULES[module].read_text()) == []


PLANTED = [
    ("klimb.numbers.tilt", "from klimb.exact.space import Space", "floor above"),
    ("klimb.data", "import klimb.models.policy", "floor above"),
    ("klimb.data", "from klimb import cli", "floor above"),
    ("klimb.models.policy", "def f():\n    from klimb.train import train", "floor above"),
    ("klimb.train", "if TYPE_CHECKING:\n    from klimb.store import Store", "floor above"),
    ("klimb.objectives.x", "from klimb.numbers.tilt import tilted_mean", "baselines alone"),
    ("klimb.objectives.x", "import numpy as np", "objectives takes torch alone"),
    ("klimb.exact.truth", "def f():\n    import transformers", "exact takes torch alone"),
    ("klimb.numbers.weights", "import scipy.stats", "inside the function"),
    ("klimb.numbers.weights", "class A:\n    from arviz_stats import psislw", "inside the function"),
    ("klimb.numbers.weights", "def f():\n    import pandas", "numbers takes numpy, torch alone"),
    ("klimb.models.policy", "from .logprob import Head", "by dots"),
    ("klimb.models.policy", "from . import logprob", "by dots"),
    ("klimb", "from klimb.plan import plan", "must stay empty"),
    ("klimb.train", "print('step')", "only the edge"),
    ("klimb.plan", "with open('pool') as f:\n    pass", "only the edge"),
    ("klimb.measure", "Path('measure.json').write_text('')", "only the edge"),
]


@pytest.mark.parametrize(("module", "source", "complaint"), PLANTED)
def test_planted_violations_are_found(module, source, complaint):
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("klimb.objectives.x", "import torch\nfrom klimb.numbers.baselines import leave_one_out"),
        ("klimb.numbers.weights", "import math\nimport numpy\ndef f():\n    from scipy.stats import beta"),
        ("klimb.cli", "def f():\n    from klimb.train import train\n    print(1)"),
        ("klimb.exact.tuples", "from klimb.numbers.baselines import leave_one_out"),
        ("klimb.config", "from klimb import __version__\nfrom klimb.methods import METHODS"),
    ],
)
def test_what_is_allowed_is_not_complained_of(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_file_explains_itself_in_its_first_lines(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    importlib.import_module(module)


def loaded_after(statement):
    """The modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_objectives_and_exact_stand_alone():
    loaded = loaded_after("import klimb.objectives, klimb.exact")
    assert {"torch", "klimb.objectives", "klimb.exact"} <= loaded
    assert not loaded & {"transformers", "peft", "datasets", "scipy", "pandas", "arviz_stats", "klimb.data"}


def test_the_command_answers_without_torch():
    if importlib.util.find_spec("klimb.cli") is None:
        pytest.skip("klimb.cli is not there yet")
    loaded = loaded_after("import klimb.cli")
    assert "klimb.cli" in loaded
    assert not loaded & {"torch", "transformers"}
