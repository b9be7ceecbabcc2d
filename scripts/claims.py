"""What a reproduction is made of: systems, claims, rows, criteria; how it is found.

A file `scripts/reproductions/<slug>.py` opens with a docstring (paper, claim in our
words, command, expected figure, hardware and time) and defines

    SYSTEM = System(slug, title, paper, room, module, summary)
    CLAIMS = (Claim(id, text, paper, criterion, measure), ...)
    FIGURES = {"name": function_of_recorded_rows, ...}        # optional

`scripts/reproduce.py` finds it by its name alone: no list is edited by hand. Claims may
share a `measure`: each distinct (measure, scale, seed) is called once.
"""

import contextvars
import dataclasses
import difflib
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
from narrows.scripts import reproductions
from scipy import special

SCALES = ("quick", "full", "paper")  # 2 minutes, 30 minutes, as long as it takes
CONFIDENCE = 0.95  # of every interval, two-sided
DATA_DIR: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
    "data_dir", default=None
)  # folder of the larger data sets, set by the harness; None: there is none


class NotMeasured(Exception):
    """Raised by a measure whose data or hardware is absent; says what is missing."""


class Row(NamedTuple):
    """One measured number; `arm` names the method or a baseline."""

    metric: str
    value: float
    arm: str = "method"


class Verdict(NamedTuple):
    """What a criterion found; `interval` is in the criterion's own unit."""

    holds: bool
    mean: float  # of our arm over seeds
    deviation: float  # sample standard deviation over seeds; nan for one seed
    n: int  # seeds
    interval: tuple[float, float] | None  # None: fewer than two seeds, or a law
    baseline: float | None  # mean of the other arm


class Criterion(Protocol):
    @property
    def asked(self) -> str: ...  # what must hold, for the tables

    def verdict(self, rows: Mapping[int, Sequence[Row]]) -> Verdict: ...


@dataclasses.dataclass(frozen=True)
class Claim:
    id: str
    text: str  # the claim in our words
    paper: str  # the paper's figure and setting
    criterion: Criterion
    measure: Callable[[str, int], Iterable[Row]]  # (scale, seed), a named function
    scales: tuple[str, ...] = SCALES
    note: str = ""  # what a reader must know, and why it falls short where it does

    @property
    def measurement(self) -> str:
        """The name its rows are recorded under, shared by claims of one measure."""
        return self.measure.__name__


@dataclasses.dataclass(frozen=True)
class System:
    slug: str
    title: str
    paper: str  # arXiv id and venue
    room: str
    module: str  # the code, such as "narrows.optim.normalized_gd"
    summary: str


@dataclasses.dataclass(frozen=True)
class Ratio:
    """`arm` over `baseline`, paired by seed; its interval must keep to the bound.

    The interval is that of the geometric mean: a t interval of the mean log-ratio.
    """

    metric: str
    arm: str
    baseline: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self):
        if self.at_most is None and self.at_least is None:
            raise ValueError("Ratio got neither at_most nor at_least: give one of them")

    @property
    def asked(self) -> str:
        low = f"ratio at least {self.at_least:g}" if self.at_least is not None else ""
        high = f"ratio at most {self.at_most:g}" if self.at_most is not None else ""
        return " and ".join(filter(None, (low, high)))

    def verdict(self, rows: Mapping[int, Sequence[Row]]) -> Verdict:
        ours = _by_seed(rows, self.metric, self.arm)
        other = _by_seed(rows, self.metric, self.baseline)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.exp(_interval(np.log(ours) - np.log(other)))
        above = self.at_least is None or low >= self.at_least
        below = self.at_most is None or high <= self.at_most
        return _verdict(bool(above and below), ours, (low, high), other)


@dataclasses.dataclass(frozen=True)
class Ordering:
    """`better` beats `worse`, paired by seed; the interval of the gain excludes 0.

    The gain is worse - better where lower is better, else better - worse.
    """

    metric: str
    better: str
    worse: str
    lower_is_better: bool = True

    @property
    def asked(self) -> str:
        return f"{'less' if self.lower_is_better else 'more'}: gain above 0"

    def verdict(self, rows: Mapping[int, Sequence[Row]]) -> Verdict:
        ours = _by_seed(rows, self.metric, self.better)
        other = _by_seed(rows, self.metric, self.worse)
        gain = (other - ours) if self.lower_is_better else (ours - other)
        low, high = _interval(gain)
        return _verdict(bool(low > 0), ours, (low, high), other)


@dataclasses.dataclass(frozen=True)
class Law:
    """|value| <= tolerance in every row of every seed: an exact statement."""

    metric: str
    tolerance: float
    arm: str = "method"

    @property
    def asked(self) -> str:
        return f"every row within {self.tolerance:g}"

    def verdict(self, rows: Mapping[int, Sequence[Row]]) -> Verdict:
        worst = np.array(
            [
                max(_values(of_seed, self.metric, self.arm, seed), key=_badness)
                for seed, of_seed in rows.items()
            ]
        )
        holds = bool(worst.size and np.all(np.abs(worst) <= self.tolerance))
        return _verdict(holds, worst, None, None)


def names() -> tuple[str, ...]:
    """The slugs of all systems with a reproduction, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(reproductions.__path__)))


def check(slug: str) -> None:
    """ValueError, with the nearest names, if no such system has a reproduction."""
    if slug not in names():
        near = difflib.get_close_matches(slug, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"no system named {slug!r}; the nearest: {', '.join(near)}")


def load(slug: str) -> ModuleType:
    """The reproduction of a system, if it keeps the contract; else ValueError."""
    check(slug)
    module = importlib.import_module(f"{reproductions.__name__}.{slug}")
    if module.SYSTEM.slug != slug:
        raise ValueError(f"{slug}.py holds SYSTEM.slug={module.SYSTEM.slug!r}: rename")
    ids = [claim.id for claim in module.CLAIMS]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{slug}.py has two claims of one id among {ids}")
    if len({c.measurement for c in module.CLAIMS}) < len(
        {c.measure for c in module.CLAIMS}
    ):
        raise ValueError(f"{slug}.py has two measures of one name: rows would mix")
    return module


def _badness(value: float) -> float:
    return np.inf if np.isnan(value) else abs(value)


def _values(rows: Sequence[Row], metric: str, arm: str, seed: int) -> list[float]:
    found = [r.value for r in rows if r.metric == metric and r.arm == arm]
    if not found:
        raise ValueError(f"no row of metric {metric!r}, arm {arm!r} at seed {seed}")
    return found


def _by_seed(rows: Mapping[int, Sequence[Row]], metric: str, arm: str) -> np.ndarray:
    found = {
        seed: _values(of_seed, metric, arm, seed) for seed, of_seed in rows.items()
    }
    for seed, values in found.items():
        if len(values) > 1:
            raise ValueError(
                f"{len(values)} rows of metric {metric!r}, arm {arm!r} at seed {seed}: "
                "paired criteria take one a seed; average them in the measure"
            )
    return np.array([values[0] for values in found.values()])


def _interval(x: np.ndarray) -> tuple[float, float]:
    """t interval of the mean; (nan, nan), which fails every bound, for n < 2."""
    if x.size < 2:
        return np.nan, np.nan
    quantile = special.stdtrit(x.size - 1, (1 + CONFIDENCE) / 2)  # of Student's t
    half = quantile * x.std(ddof=1) / x.size**0.5
    return float(x.mean() - half), float(x.mean() + half)


def _verdict(holds, ours, interval, other) -> Verdict:
    with np.errstate(invalid="ignore"):  # of rows that are not finite
        deviation = float(ours.std(ddof=1)) if ours.size > 1 else np.nan
    return Verdict(
        holds=holds,
        mean=float(ours.mean()) if ours.size else np.nan,
        deviation=deviation,
        n=ours.size,
        interval=None
        if interval is None or ours.size < 2
        else (float(interval[0]), float(interval[1])),
        baseline=None if other is None else float(other.mean()),
    )
