"""A JPEG without tables lacks its tables and nothing else."""

import io

import numpy as np
import pytest
from narrows.scripts.split_costs import jpegs, without_tables

Image = pytest.importorskip("PIL.Image")


def picture():
    ramp = np.add.outer(np.arange(28) * 5, np.arange(28) * 3)
    return (ramp % 256).astype(np.uint8)


def test_with_its_tables_back_it_is_the_picture():
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", quality=50)
    whole = file.getvalue()
    kept = without_tables(whole)
    tables, at = b"", 2
    while whole[at + 1] != 0xDA:  # segments up to the scan
        size = int.from_bytes(whole[at + 2 : at + 4], "big")
        if whole[at + 1] in (0xDB, 0xC4):
            tables += whole[at : at + 2 + size]
        at += 2 + size
    assert tables
    assert not any(kept.count(bytes([0xFF, marker])) for marker in (0xDB, 0xC4, 0xE0))
    again = Image.open(io.BytesIO(kept[:2] + tables + kept[2:]))
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(file)))


def test_a_higher_quality_takes_more_bytes_and_loses_less():
    found = list(jpegs(picture()[None], (10, 90)))
    (_, few, coarse), (_, many, fine) = found
    assert few < many
    off = [np.abs(x[0].astype(int) - picture()).mean() for x in (coarse, fine)]
    assert off[1] < off[0]
