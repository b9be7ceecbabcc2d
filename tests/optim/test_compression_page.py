"""The tables of docs/compression.md say what the code says."""

import pathlib

import pytest
from narrows.optim import links
from narrows.optim.compression import bits
from narrows.optim.compressors import COMPRESSORS, make_compressor
from narrows.optim.table import LOCAL

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "compression.md"
SHAPE = (1024, 1024)


def cells(name):
    """The cells of the one table line that begins with a name."""
    lines = PAGE.read_text().splitlines()
    (line,) = [x for x in lines if x.startswith(f"| `{name}` ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


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
    for name in LOCAL:
        assert cells(name)
