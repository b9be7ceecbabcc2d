"""Every example in a docstring of the library gives what it shows."""

import doctest
import importlib
import pkgutil

import narrows
import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(narrows.__path__, "narrows.")
    if module.name.split(".")[1] in ("data", "ib", "models", "optim", "parallel")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0, f"{result.failed} examples of {name}: see above"


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = map(importlib.import_module, MODULES)
    examples = [e for m in modules for t in finder.find(m) for e in t.examples]
    assert len(examples) > 10
