"""The information plane: I(X; T) and I(T; Y) of a network's layers while it trains.

Inputs are n rows, each as likely as the others, with one label each; T is a layer's
output. For a deterministic layer of a continuous map I(X; T) is log n or infinite: what
can be put on a plane is the information of a coarser T, and each estimator of `PLANE`
makes T coarser in its own way (Saxe et al. 2018; Goldfeld et al. 2019,
arXiv:1810.05728). So several are always put side by side:

    bins          T = the tuple of cells of a fixed grid: exact for the n rows
    scaled_bins   the same with cells of 0.5 deviations of the layer at that moment
    noisy         T = h + N(0, noise I): unbiased, from draws of the noise
    kde_lower, kde_upper    bounds on I(X; T) of the same T (arXiv:1706.02419)

A `Recorder` takes the layers of an nnx model at chosen steps without stopping it.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .estimators.binning import discrete, fixed_bins, symbols
from .estimators.estimate import Estimate
from .estimators.kde import kde_pair, kde_sampled
from .kernels import rows_of

Pair = tuple[Estimate, Estimate]  # I(X; T) and I(T; Y) in nats
BITS = float(np.log2(np.e))  # bits a nat
NOISE = 1e-3  # variance of the noise, that of the critique (Saxe et al. 2018)


def layer_outputs(model: nnx.Module, *inputs: Any) -> dict[str, Float[Array, "n d"]]:
    """What each submodule's __call__ returns on inputs, by path, as [n, features].

    A waist gives its z. What is no array of n rows of floats is left out, and so is
    what a module returns inside a scan. The model is not changed.

    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> {name: h.shape for name, h in layer_outputs(model, jnp.ones((5, 3))).items()}
    {'': (5, 2)}
    """
    copy = nnx.merge(*nnx.split(model))
    run = nnx.capture(copy, nnx.Intermediate, method_outputs=nnx.Intermediate)
    _, captured = run(*inputs)
    rows, found = len(inputs[0]), {}
    for path, calls in nnx.to_flat_state(captured):
        value = calls.get_value() if isinstance(calls, nnx.Variable) else calls
        value = value[-1] if isinstance(value, tuple) and len(value) == 1 else value
        value = getattr(value, "z", value)
        if path[-1] != "__call__" or not isinstance(value, jax.Array):
            continue
        if (
            value.ndim > 1
            and len(value) == rows
            and jnp.isdtype(value.dtype, "real floating")
        ):
            found["/".join(map(str, path[:-1]))] = value.reshape(rows, -1)
    return found


def bins(
    key: Array,
    h: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    count: int = 30,
    low: float = -1.0,
    high: float = 1.0,
) -> Pair:
    """`count` equal cells a unit over [low, high]; values outside are in the outermost.

    I(X; T) = H(T), since T is a function of X. (arXiv:1703.00810, section 3.2.) For
    units without bounds give the range of all times: one that moves with the epoch
    changes what is measured.
    """
    return _of_cells(fixed_bins(h, count, low, high), labels)


def scaled_bins(
    key: Array, h: Float[Array, "n d"], labels: Int[Array, " n"], *, width: float = 0.5
) -> Pair:
    """Cells of `width` deviations of all units of the layer together, at this moment.

    The same for a layer and its multiples, so growth of weights is not compression.
    Raises: ValueError for a width not above 0.
    """
    if width <= 0:
        raise ValueError(f"width: {width}, but it must be above 0")
    h = rows_of("h", h, 2)
    centred = h - h.mean(0)
    deviation = jnp.sqrt(jnp.square(centred).mean())
    cells = jnp.floor(centred / jnp.where(deviation > 0, width * deviation, 1))
    return _of_cells(cells.astype(jnp.int32), labels)


def _of_cells(cells: Int[Array, "n d"], labels: Int[Array, " n"]) -> Pair:
    """Exact where the n rows are the law, so converged whatever the cells hold."""
    cells = symbols(cells)[:, None]
    pair = discrete(cells, cells), discrete(cells, labels[:, None])
    x_t, t_y = (e._replace(converged=jnp.isfinite(e.value)) for e in pair)
    return x_t, t_y


def noisy(
    key: Array,
    h: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    noise: float | Array = NOISE,
) -> Pair:
    """T = h + N(0, noise I): unbiased for the n rows, see `kde_sampled`."""
    x_t, t_y = kde_sampled(key, h, noise, labels=labels)
    assert t_y is not None
    return x_t, t_y


def kde(
    key: Array,
    h: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    bound: str,
    noise: float | Array = NOISE,
) -> Pair:
    """Bound on I(X; T) for the same T, and an estimate of I(T; Y), see `kde_pair`."""
    return kde_pair(h, noise, labels, bound=bound)


PLANE: dict[str, Callable[..., Pair]] = {
    "bins": bins,
    "scaled_bins": scaled_bins,
    "noisy": noisy,
    "kde_lower": partial(kde, bound="lower"),
    "kde_upper": partial(kde, bound="upper"),
}


class Point(NamedTuple):
    """Where a layer is on the plane; bits."""

    step: int
    layer: str
    estimator: str
    x_t: float  # I(X; T)
    t_y: float  # I(T; Y)
    x_t_error: float  # standard errors
    t_y_error: float
    converged: bool


def log_steps(last: int, count: int) -> tuple[int, ...]:
    """0 and `last` and at most `count` steps between, evenly in their logarithm.

    Raises: ValueError for last < 1 or count < 1.

    >>> log_steps(100, 3)
    (0, 1, 10, 100)
    """
    if last < 1 or count < 1:
        raise ValueError(f"last, count: {last}, {count}, but both must be at least 1")
    between = np.geomspace(1, last, count).round().astype(int)
    return (0, *sorted({int(s) for s in (*between, last)}))


class Recorder:
    """Points of a model's layers at chosen steps, taken while the training goes on.

    Called as `recorder(step, model)` after a step; at a step that is not chosen it does
    nothing. The layers' outputs are dispatched like a training step, and a thread of
    its own turns them into information, so the loop waits for nothing. `points()` waits
    for all that was recorded. Estimators are named in `PLANE` or given as functions of
    (key, h, labels).

    Raises: ValueError for labels that are not one a row of x, an unknown estimator.
    """

    def __init__(
        self,
        x: Float[Array, "n ..."],
        labels: Int[Array, " n"],
        *,
        steps: Iterable[int],
        estimators: Mapping[str, Callable[..., Pair]] | tuple[str, ...] = tuple(PLANE),
        layers: Callable[..., Mapping[str, Array]] = layer_outputs,
        seed: int = 0,
    ):
        if jnp.shape(labels) != (len(x),):
            raise ValueError(f"labels: {jnp.shape(labels)}, but x has {len(x)} rows")
        if not isinstance(estimators, Mapping):
            for name in estimators:
                if name not in PLANE:
                    raise ValueError(
                        f"estimators: {name!r}, but allowed are {', '.join(PLANE)}"
                    )
            estimators = {name: PLANE[name] for name in estimators}
        self.steps = frozenset(steps)
        self._labels, self._key = jnp.asarray(labels), jax.random.key(seed)
        self._estimators = {name: jax.jit(f) for name, f in estimators.items()}
        self._x, self._read = jnp.asarray(x), jax.jit(layers)
        self._pool = ThreadPoolExecutor(1)  # one: what it computes is not to crowd out
        self._jobs: list[Future[list[Point]]] = []

    def __call__(self, step: int, model: Any) -> None:
        if step in self.steps:
            outputs = self._read(model, self._x)
            self._jobs.append(self._pool.submit(self._estimate, step, outputs))

    def points(self) -> list[Point]:
        """All points of the steps recorded so far, in their order."""
        return [point for job in self._jobs for point in job.result()]

    def _estimate(self, step: int, outputs: Mapping[str, Array]) -> list[Point]:
        found = []
        for layer, h in outputs.items():
            for name, estimator in self._estimators.items():
                key = jax.random.fold_in(self._key, step)
                pair = jax.device_get(estimator(key, h, self._labels))
                found.append(point(step, layer, name, pair))
        return found


def point(step: int, layer: str, estimator: str, pair: Pair) -> Point:
    """A pair of estimates in nats as a point in bits."""
    x_t, t_y = pair
    numbers = (x_t.value, t_y.value, x_t.standard_error, t_y.standard_error)
    converged = bool(x_t.converged) and bool(t_y.converged)
    return Point(step, layer, estimator, *(BITS * float(v) for v in numbers), converged)


class Phase(NamedTuple):
    """How the gradients of one step's batches agree, each over the weights' norm."""

    mean: Float[Array, ""]  # drift: |mean over batches|
    deviation: Float[Array, ""]  # diffusion: |deviation over batches|
    signal_to_noise: Float[Array, ""]  # their ratio


def gradient_phase(
    gradients: Float[Array, "b *w"], weights: Float[Array, "*w"]
) -> Phase:
    """|mean g| / |W|, |std g| / |W| and their ratio, Frobenius norms over a layer.

    (arXiv:1703.00810, section 3.3.) gradients: one a batch, at the same weights. Above
    1 the batches agree: drift; below they differ: diffusion.

    >>> float(gradient_phase(jnp.array([[1.0], [3.0]]), jnp.ones(1)).signal_to_noise)
    2.0
    """
    size = jnp.linalg.norm(weights.ravel())
    mean = jnp.linalg.norm(gradients.mean(0).ravel())
    deviation = jnp.linalg.norm(gradients.std(0).ravel())
    return Phase(mean / size, deviation / size, mean / deviation)
