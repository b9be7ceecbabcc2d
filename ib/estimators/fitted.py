"""Bounds with a critic that is trained on one part of a sample and judged on another.

Half of the rows train, a quarter stops the training, and the last quarter, which chose
nothing, gives the value: a lower bound stays a lower bound. A second critic learns from
half as many rows. Both are judged on the same rows: where the second falls behind, the
first has not learned all there is either, and says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from . import critics
from .estimate import NEITHER, STABLE, Estimate, pair

Scores = Callable[[Any, Array, Array], Float[Array, "n n"]]


BOUNDS = ("inner", "self_normalised")  # critics of lower bounds, whatever they learned
CAP = 10.0  # nats; above log n of any sample that bounds are believed on


class Fit(NamedTuple):
    """What is trained, by which loss, and what is reported of it."""

    kind: str  # of critic, see `_build`
    loss: Callable[[Array], Array]  # of the scores of a batch
    bound: Callable[[Array], Estimate]
    moving: bool = False  # steps take `critics.mine_loss`, `loss` only stops


def _ascend(bound):
    return lambda scores: -bound(scores).value


def _likelihood(log_q):
    return -jnp.diagonal(log_q).mean()


FITS = {
    "dv": Fit("inner", _ascend(critics.donsker_varadhan), critics.donsker_varadhan),
    "mine": Fit(
        "inner",
        _ascend(critics.donsker_varadhan),
        critics.donsker_varadhan,
        moving=True,
    ),
    "nwj": Fit("inner", _ascend(critics.nwj), critics.nwj),
    "flo": Fit("self_normalised", _ascend(critics.nwj), critics.nwj),
    "infonce": Fit("inner", _ascend(critics.infonce), critics.infonce),
    "smile": Fit("inner", critics.js_loss, critics.smile),
    "club": Fit("normal", _likelihood, critics.club),
    "leave_one_out": Fit("normal", _likelihood, critics.leave_one_out),
    "vub": Fit("normal_ratio", _likelihood, critics.vub),
}


def _network(key: Array, widths: tuple[int, ...], dtype) -> list[tuple[Array, Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    draw = jax.nn.initializers.he_normal()
    shapes = zip(keys, widths[:-1], widths[1:], strict=True)
    return [(draw(k, (a, b), dtype), jnp.zeros(b, dtype)) for k, a, b in shapes]


def _apply(layers, x):
    *hidden, (last, shift) = layers
    for matrix, bias in hidden:
        x = jax.nn.relu(x @ matrix + bias)
    return x @ last + shift


def _inner(params, x, y):
    """An inner product of two networks: n^2 scores from 2 n evaluations.

    Within (-CAP, CAP), so that one far row of those held out cannot make exp infinite.
    """
    return CAP * jnp.tanh(_apply(params[0], x) @ _apply(params[1], y).T / CAP)


def _normal(params, x, y):
    """log N(y_j; mean(x_i), variance(x_i)), features independent given x."""
    mean, log_scale = _apply(params[0], x), _apply(params[1], x)
    log_scale = 5 * jnp.tanh(log_scale / 5)  # no feature becomes a point
    precision = jnp.exp(-2 * log_scale)
    squares = precision @ (y**2).T - 2 * (mean * precision) @ y.T
    constant = (mean**2 * precision + 2 * log_scale).sum(1) + y.shape[1] * jnp.log(
        jnp.asarray(2 * jnp.pi, y.dtype)
    )
    return -(squares + constant[:, None]) / 2


def _normal_ratio(params, x, y):
    """`_normal` less log N(y_j; 0, I), for y of mean 0 and deviation 1."""
    constant = y.shape[1] * jnp.log(jnp.asarray(2 * jnp.pi, y.dtype))
    return _normal(params, x, y) + ((y**2).sum(1) + constant) / 2


def _self_normalised(params, x, y):
    """s_ij - s_ii - u_i, u a second critic of true pairs: FLO is `nwj` of these.

    (Guo et al. 2021, arXiv:2107.01131: a lower bound for every s and u; the
    best u is log mean_j exp(s_ij - s_ii).)
    """
    scores = _inner(params[0], x, y)
    u = jnp.diagonal(_inner(params[1], x, y))
    return scores - (jnp.diagonal(scores) + u)[:, None]


def _build(kind, key, d, e, width, dtype) -> tuple[Any, Scores]:
    first, second, third = jax.random.split(key, 3)
    hidden = (width, width)

    def inner(key):
        a, b = jax.random.split(key)
        out = width // 2
        return (
            _network(a, (d, *hidden, out), dtype),
            _network(b, (e, *hidden, out), dtype),
        )

    if kind == "inner":
        return inner(first), _inner
    if kind == "self_normalised":
        return (inner(first), inner(third)), _self_normalised
    return (
        _network(first, (d, *hidden, e), dtype),
        _network(second, (d, *hidden, e), dtype),
    ), (_normal if kind == "normal" else _normal_ratio)


class _Progress(NamedTuple):
    params: Any
    moments: Any
    memory: Float[Array, ""]  # MINE's moving average, its logarithm
    best: Any
    least: Float[Array, ""]
    waited: Array
    rounds: Array


def fitted(
    key: Array,
    x: Float[Array, "n d"],
    y: Float[Array, "n e"],
    *,
    bound: str = "infonce",
    width: int = 64,
    batch: int = 128,
    learning_rate: float = 2e-3,
    rounds: int = 60,
    patience: int = 6,
) -> Estimate:
    """A bound of `critics` in nats, by networks trained here with Adam.

    A round is 25 steps; training ends when `patience` rounds brought no lower loss on
    the rows held out for that, and the best parameters are kept. Converged where it
    ended so before the last round with a finite value, for lower bounds at most 0.8
    log n, and where a critic of half the training rows gives the same within 2 standard
    errors. By what they differ the error is widened, in squares. A
    fitted q makes "club", "leave_one_out" and "vub" no bounds: direction NEITHER.

    Raises: ValueError for what `pair` refuses, fewer than 4 batches of rows, a bound
    that is not in FITS, or settings below 1.
    """
    if bound not in FITS:
        raise ValueError(f"bound: {bound!r}, but allowed are {', '.join(FITS)}")
    for name, count in (("rounds", rounds), ("patience", patience), ("width", width)):
        if count < 1:
            raise ValueError(f"{name}: {count}, but it must be at least 1")
    if batch < 2:
        raise ValueError(f"batch: {batch} rows, but at least 2 are compared")
    x, y = pair(x, y, 2 * batch)
    fit, n = FITS[bound], x.shape[0]
    key_order, key_init, key_steps = jax.random.split(key, 3)
    order = jax.random.permutation(key_order, n)
    learn, stop, judge = jnp.split(order, [n // 2, 3 * n // 4])

    def scaled(a):
        deviation = a[learn].std(0)
        return (a - a[learn].mean(0)) / jnp.where(deviation > 0, deviation, 1)

    x, y = scaled(x), scaled(y)
    params, scores = _build(fit.kind, key_init, x.shape[1], y.shape[1], width, x.dtype)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))

    def loss(params, rows):
        return fit.loss(scores(params, x[rows], y[rows]))

    def step_loss(params, rows, memory):
        if not fit.moving:
            return loss(params, rows), memory
        return critics.mine_loss(scores(params, x[rows], y[rows]), memory)

    def train(known):
        """The best parameters by `stop` of those learned from learn[:known]."""

        def step(carry, key):
            params, moments, memory = carry
            rows = learn[jax.random.randint(key, (batch,), 0, known)]
            slope, memory = jax.grad(step_loss, has_aux=True)(params, rows, memory)
            updates, moments = tx.update(slope, moments, params)
            return (optax.apply_updates(params, updates), moments, memory), None

        def improving(p: _Progress):
            return (p.waited < patience) & (p.rounds < rounds)

        def one_round(p: _Progress):
            keys = jax.random.split(jax.random.fold_in(key_steps, p.rounds), 25)
            carry = p.params, p.moments, p.memory
            (params, moments, memory), _ = lax.scan(step, carry, keys)
            now = loss(params, stop)
            better = now < p.least
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, p.best)
            least = jnp.where(better, now, p.least)
            waited = jnp.where(better, 0, p.waited + 1)
            return _Progress(params, moments, memory, best, least, waited, p.rounds + 1)

        count, memory = jnp.zeros((), jnp.int32), jnp.zeros((), x.dtype)
        least = loss(params, stop)
        start = _Progress(params, tx.init(params), memory, params, least, count, count)
        return lax.while_loop(improving, one_round, start)

    done = jax.vmap(train)(jnp.array([n // 2, n // 4]))
    judged = jax.vmap(lambda params: scores(params, x[judge], y[judge]))(done.best)
    found, other = (fit.bound(s) for s in judged)
    behind = jnp.abs(found.value - other.value)
    settled = behind <= STABLE * found.standard_error
    direction = found.direction if fit.kind in BOUNDS else jnp.int32(NEITHER)
    return found._replace(
        direction=direction,
        standard_error=jnp.hypot(found.standard_error, behind),
        converged=found.converged & (done.waited[0] >= patience) & settled,
    )
