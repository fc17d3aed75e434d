"""The examples in the docstrings, run: what they print is what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import klimb

SOURCE = Path(klimb.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("klimb", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_print_what_they_say(module, capsys):
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert not failed, capsys.readouterr().out


def test_a_wrong_example_is_found():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1
