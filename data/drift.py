"""Streams of clicks with drift, made of real tables.

A table gives columns as click logs have them (numbers, and categories hashed into
buckets, crosses of two among them) and a real target, cut into labels. A stream puts
its rows in an order, from some row on with other labels:

    none     rows in random order; nothing changes
    region   in random order; from the change on, a row of one region is a click only
             where the target is high, of another already where it is not low
    time     in the order of the table, which is that of time: what changes is real

>>> table = load_table(folder, "beijing_pm25")      # doctest: +SKIP
>>> rows = events(table, "region", seed=0)          # doctest: +SKIP
>>> rows.numbers.shape, rows.categories.shape       # doctest: +SKIP
((41757, 6), (41757, 6))
"""

import csv
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

NAMES = ("beijing_pm25", "bike_sharing")
DRIFTS = ("none", "region", "time")
FILES = {
    "beijing_pm25": "PRSA_data_2010.1.1-2014.12.31.csv",
    "bike_sharing": "hour.csv",
}
# Numbers, categories, target. What would give the date away is in neither: a click log
# has no such column, and a model could not have seen its later values.
COLUMNS = {
    "beijing_pm25": (
        ("DEWP", "TEMP", "PRES", "Iws", "Is", "Ir"),
        ("month", "hour", "cbwd"),
        "pm2.5",
    ),
    "bike_sharing": (
        ("temp", "atemp", "hum", "windspeed"),
        ("mnth", "hr", "weekday", "weathersit"),
        "cnt",
    ),
}
BUCKETS = 256  # that the categories of a column are hashed into


class Table(NamedTuple):
    numbers: Float64[np.ndarray, "n a"]
    categories: Int32[np.ndarray, "n c"]  # each in [0, BUCKETS)
    target: Float64[np.ndarray, " n"]


class Events(NamedTuple):
    """Rows in the order in which they come; `drifted` ones have another label rule."""

    numbers: Float64[np.ndarray, "n a"]
    categories: Int32[np.ndarray, "n c"]
    label: Int64[np.ndarray, " n"]  # 0 or 1
    drifted: Bool[np.ndarray, " n"]
    change: int  # the row from which on labels follow the other rule; n: never


def load_table(folder: str | pathlib.Path, name: str) -> Table:
    """One of NAMES in the order of its file; rows without a target are left out.

    Categories are hashed by column, and so is the cross of each two columns.

    Raises: ValueError for an unknown name, FileNotFoundError where there is no file.
    """
    if name not in NAMES:
        raise ValueError(f"name: {name!r}, but allowed are {', '.join(NAMES)}")
    numbers, categories, target = COLUMNS[name]
    with (pathlib.Path(folder) / name / FILES[name]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[target] != "NA"]
    words = [[row[column] for row in rows] for column in categories]
    pairs = [(i, j) for i in range(len(words)) for j in range(i)]
    crossed = [
        [f"{a}&{b}" for a, b in zip(words[i], words[j], strict=True)] for i, j in pairs
    ]
    return Table(
        np.array([[float(row[column]) for column in numbers] for row in rows]),
        np.stack([_hashed(column, i) for i, column in enumerate(words + crossed)], 1),
        np.array([float(row[target]) for row in rows]),
    )


def events(
    table: Table,
    drift: str,
    *,
    seed: int,
    change: float = 0.5,
    region: float = 0.25,
    quantile: float = 0.8,
) -> Events:
    """The rows of a table as a stream; labels say whether the target is high.

    High is above the median of the rows before the change. "region" draws a direction
    through the standardised numbers: of the rows beyond it, a share `region` at either
    end, labels move to the quantile `quantile` at one end and 1 - quantile at the
    other, so that the clicks of all stay about as many.

    change: the share of rows that come before it.
    Raises: ValueError for an unknown drift or a share outside (0, 1); a region above
    0.5 would overlap its opposite.
    """
    if drift not in DRIFTS:
        raise ValueError(f"drift: {drift!r}, but allowed are {', '.join(DRIFTS)}")
    for name, share, most in (
        ("change", change, 1.0),
        ("region", region, 0.5),
        ("quantile", quantile, 1.0),
    ):
        if not 0 < share <= most or share == 1:
            raise ValueError(
                f"{name}: {share}, but must be above 0 and at most {most}, not 1"
            )
    rng = np.random.default_rng(seed)
    n = len(table.target)
    order = np.arange(n) if drift == "time" else rng.permutation(n)
    numbers, categories, target = (column[order] for column in table)
    at = round(change * n)
    before = target[:at]
    label = target > np.median(before)
    drifted = np.zeros(n, bool)
    if drift == "region":
        mean, spread = numbers[:at].mean(0), numbers[:at].std(0)
        place = (numbers - mean) / spread @ rng.normal(size=numbers.shape[1])
        low, high = np.quantile(place[:at], [region, 1 - region])
        later = np.arange(n) >= at
        drifted = later & ((place < low) | (place > high))
        label = np.where(
            later & (place < low), target > np.quantile(before, quantile), label
        )
        label = np.where(
            later & (place > high), target > np.quantile(before, 1 - quantile), label
        )
    return Events(
        numbers,
        categories,
        label.astype(np.int64),
        drifted,
        n if drift == "none" else at,
    )


def _hashed(words: list[str], salt: int) -> Int32[np.ndarray, " n"]:
    """FNV-1a of the words of a column, which salts it; the same on every machine."""
    known = {}
    for word in set(words):
        value = 2166136261
        for byte in f"{salt}:{word}".encode():
            value = (value ^ byte) * 16777619 % 2**32
        known[word] = (value ^ value >> 16) % BUCKETS
    return np.array([known[word] for word in words], np.int32)
