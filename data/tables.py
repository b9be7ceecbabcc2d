"""Regression sets: real tables read from a folder, and some that need no file.

>>> table = load_table(folder, "california_housing")  # doctest: +SKIP
>>> parts = split(table, seed=0)                      # doctest: +SKIP
>>> parts.train.x.shape, parts.test.x.shape           # doctest: +SKIP
((12585, 8), (3930, 8))
"""

import csv
import gzip
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32
from sklearn import datasets

from .faces import load_faces
from .rotated import rotated_digits

WINDS = ("NE", "NW", "SE", "cv")


class Table(NamedTuple):
    """Numbers as the files have them, but for what `load_table` says of each set."""

    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, " n"]
    official_test: Bool[np.ndarray, " n"] | None = None  # where the authors gave one


class Part(NamedTuple):
    x: Float32[np.ndarray, "n d"]
    y: Float32[np.ndarray, "n 1"]


class Split(NamedTuple):
    """Inputs and labels standardised by the training rows; disjoint parts."""

    train: Part
    valid: Part
    test: Part
    unit: float  # the table's unit of y in one of ours


def _housing(place: pathlib.Path) -> Table:
    raw = gzip.decompress((place / "cal_housing.data.gz").read_bytes()).decode()
    a = np.loadtxt(raw.splitlines(), delimiter=",")
    longitude, latitude, age, rooms, beds, people, homes, income, value = a.T
    x = [income, age, rooms / homes, beds / homes, people, people / homes]
    x, y = np.stack([*x, latitude, longitude], 1), value / 1e5
    kept = y < 5
    return Table(x[kept], np.log(y[kept]))


def _bike(place: pathlib.Path) -> Table:
    columns = [*range(2, 14), 16]
    a = np.genfromtxt(place / "hour.csv", delimiter=",", skip_header=1, usecols=columns)
    return Table(a[:, :-1], a[:, -1])


def _appliances(place: pathlib.Path) -> Table:
    raw = gzip.decompress((place / "energydata_complete.csv.gz").read_bytes()).decode()
    rows = list(csv.reader(raw.splitlines()))[1:]
    a = np.array([row[1:] for row in rows], float)
    test = np.zeros(len(a), bool)
    test[np.load(place / "test_idx.npy")] = True
    return Table(a[:, 1:-2], a[:, 0], test)


def _pm25(place: pathlib.Path) -> Table:
    text = (place / "PRSA_data_2010.1.1-2014.12.31.csv").read_text()
    rows = [row for row in csv.reader(text.splitlines()[1:]) if row[5] != "NA"]
    winds = np.eye(len(WINDS))[[WINDS.index(row[9]) for row in rows]]
    a = np.array([row[1:5] + row[6:9] + row[10:] for row in rows], float)
    return Table(np.concatenate([a, winds], 1), np.array([r[5] for r in rows], float))


def _year(place: pathlib.Path) -> Table:
    a = np.loadtxt(place / "millionsong.txt", delimiter=",")
    return Table(a[:, 1:], a[:, 0])


TABLES: dict[str, Callable[[pathlib.Path], Table]] = {
    "california_housing": _housing,
    "bike_sharing": _bike,
    "appliances_energy": _appliances,
    "beijing_pm25": _pm25,
    "yearprediction_subset": _year,
}


def load_table(folder: str | pathlib.Path, name: str) -> Table:
    """One of TABLES, read from `<folder>/<name>`.

    california_housing: scikit-learn's eight features, blocks below 500,000 dollars,
    y the logarithm of the value in 100,000 dollars. bike_sharing: by the hour, without
    date and index and without the two columns whose sum is y. appliances_energy: Wh of
    ten minutes, without the date and the two random columns, with the authors' test
    rows. beijing_pm25: rows that have a label, the wind's direction as four columns.
    yearprediction_subset: 12 averages of timbre.

    Raises: ValueError for an unknown name, FileNotFoundError where the folder lacks
    the set.
    """
    if name not in TABLES:
        raise ValueError(f"name: {name!r}, but allowed are {', '.join(TABLES)}")
    return TABLES[name](pathlib.Path(folder) / name)


TAILS = ("none", "outliers", "student")


def _digits(folder: str | pathlib.Path, seed: int) -> Table:
    return Table(*rotated_digits(folder, seed=seed))


def _faces(folder: str | pathlib.Path, seed: int) -> Table:
    del seed
    return Table(*load_faces(folder))


def _diabetes(folder: str | pathlib.Path, seed: int) -> Table:
    del folder, seed
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    return Table(x, y)


def _friedman(tail: str):
    return lambda folder, seed: friedman(4000, seed=seed, tail=tail)


DRAWN: dict[str, Callable[[str | pathlib.Path, int], Table]] = {
    "rotated_mnist": _digits,
    "utkface": _faces,
    "diabetes": _diabetes,
    **{f"friedman_{tail}": _friedman(tail) for tail in TAILS},
}


def named_table(folder: str | pathlib.Path, name: str, *, seed: int = 0) -> Table:
    """One of TABLES, or of what is drawn by a seed or comes with scikit-learn.

    rotated_mnist: 10,000 digits at 14 x 14 pixels, y their angle in degrees. utkface:
    age by 32 x 32 pixels of a face. diabetes: scikit-learn's 442 patients.
    friedman_<tail>: 4,000 rows of `friedman`.
    Raises: ValueError for an unknown name, FileNotFoundError for a missing file.
    """
    if name in DRAWN:
        return DRAWN[name](folder, seed)
    if name not in TABLES:
        allowed = ", ".join((*TABLES, *DRAWN))
        raise ValueError(f"table: {name!r}, but allowed are {allowed}")
    return load_table(folder, name)


def split(
    table: Table, *, seed: int, rows: int | None = None, official: bool = False
) -> Split:
    """64 % of the rows to train, 16 % to validate, 20 % to test, drawn by `seed`.

    rows: of the training part, at most this many, with a quarter of it to validate, so
    that a short run sees fewer rows of one and the same split; the test part stays.
    official: the test part is the table's own, and only the rest is drawn.

    Raises: ValueError for rows below 4, or where the table has no test part of its own.
    """
    if rows is not None and rows < 4:
        raise ValueError(f"rows: {rows}, but a training part needs at least 4")
    n = len(table.y)
    order = np.random.default_rng(seed).permutation(n)
    if official:
        if table.official_test is None:
            raise ValueError("official: the table has no test part of its own")
        test = np.flatnonzero(table.official_test)
        order = order[~np.isin(order, test)]
    else:
        test, order = order[: n // 5], order[n // 5 :]
    cut = len(order) // 5
    valid, train = order[:cut], order[cut:]
    if rows is not None:
        train, valid = train[:rows], valid[: rows // 4]
    mean, spread = table.x[train].mean(0), table.x[train].std(0)
    spread = np.where(spread > 0, spread, 1)
    middle, unit = table.y[train].mean(), table.y[train].std()

    def part(index):
        x, y = (table.x[index] - mean) / spread, (table.y[index] - middle) / unit
        return Part(x.astype(np.float32), y[:, None].astype(np.float32))

    return Split(part(train), part(valid), part(test), float(unit))


def friedman(n: int, *, seed: int, tail: str = "none", clean: bool = False) -> Table:
    """Friedman's first function of ten uniform inputs, divided by its deviation.

        y = 10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5      (Friedman 1991)

    with noise of standard deviation 0.1 and, by `tail`, a tenth of the labels shifted
    by 8 Exp(1) ("outliers") or a further 0.3 times Student's t of 1.5 degrees of
    freedom ("student"). clean: no noise at all, what a perfect model would predict.

    Raises: ValueError for another tail.

    >>> friedman(4, seed=0).x.shape
    (4, 10)
    """
    if tail not in TAILS:
        raise ValueError(f"tail: {tail!r}, but allowed are {', '.join(TAILS)}")
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(n, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = (y + 10 * x[:, 3] + 5 * x[:, 4]) / 4.9
    if clean:
        return Table(x, y)
    y = y + 0.1 * rng.normal(size=n)
    if tail == "outliers":
        y = y + (rng.random(n) < 0.1) * 8 * rng.exponential(size=n)
    if tail == "student":
        y = y + 0.3 * rng.standard_t(1.5, size=n)
    return Table(x, y)
