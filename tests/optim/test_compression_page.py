"""The tables of docs/compression.md say what the code says."""

import pathlib
import re

import pytest
from absl import flags
from narrows.optim import links
from narrows.optim.compression import bits
from narrows.optim.compressors import COMPRESSORS, make_compressor
from narrows.optim.table import LOCAL, SHARDED
from narrows.parallel.layout import Layout
from narrows.scripts.optimizer_flags import define_optimizer, optimizer_of

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "compression.md"
SHAPE = (1024, 1024)


LAYOUTS = "## Over fsdp"  # the heading of the part whose table lists methods again


def cells(name, part=None):
    """The cells of the first table line that begins with a name, of a part if given."""
    text = PAGE.read_text()
    text = text.split(part)[1] if part else text
    lines = [x for x in text.splitlines() if x.startswith(f"| `{name}` ")]
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def number(x):
    return "" if x is None else f"{x:.3g}"


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressor_is_described_as_it_is(name):
    compressor = make_compressor(name)
    promise = compressor.promise(SHAPE)
    per_number = bits(compressor, SHAPE) / (SHAPE[0] * SHAPE[1])
    expected = [f"{per_number:.3g}", number(promise.delta), number(promise.omega)]
    assert cells(name)[:3] == expected


@pytest.mark.parametrize("name", links.LINKS)
def test_a_link_is_described_as_it_is(name):
    needs, *_ = cells(name)
    assert needs == (links.LINKS[name].needs or "")


def test_every_optimizer_that_compresses_is_named():
    for name in LOCAL | SHARDED:
        assert cells(name)


@pytest.mark.parametrize("name", LOCAL)
def test_every_method_takes_the_layouts_that_the_page_says(name):
    (head,) = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| | `data=")
    ]
    layouts = re.findall(r"`(.+?)`", head)
    assert len(layouts) == 5
    found = [taken(name, Layout.parse(text)) for text in layouts]
    assert found == cells(name, LAYOUTS)


def taken(name, layout):
    """What the training script makes of a method on a layout."""
    f = flags.FlagValues()
    flags.DEFINE_integer("steps", 100, "", flag_values=f)
    define_optimizer(f)
    freeze = ["--freeze_step=9"] if name == "zero_one_adam" else []
    f(["train", f"--optimizer={name}", *freeze])
    try:
        chosen = optimizer_of(f, 64, layout)
    except ValueError:
        return "refused"
    return "over fsdp" if chosen.name in SHARDED else "over data"
