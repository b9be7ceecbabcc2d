"""Small stochastic classifiers of blobs in the plane, and what might predict their gap.

Networks of all widths are one program: arrays have the room of the widest. Each gives
its gap in loss, what its code keeps, norms and margin, and a posterior of the encoder's
parameters from the last third of its path.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from narrows.ib.channel import sampled_information
from narrows.ib.swag import (
    collected,
    no_moments,
    parameter_information,
    posterior,
)

CLASSES, CODE, TRAIN, TEST, MEASURED = 5, 5, 50, 250, 500
TARGET = 1.5  # nats, where the constraint on I(X;Z) is on
DRAWS = 3  # of the data, for each set of centres
RANK = 10  # snapshots that a posterior of parameters keeps


class Points(NamedTuple):
    x: Any  # [n, 2] of numpy or jax
    y: Any  # [n]


class Data(NamedTuple):
    train: Points
    test: Points
    measured: Points  # a further draw, on which information is estimated


def blobs(seed: int, draw: int, fraction: float = 0.0) -> Data:
    """One set of five centres a seed, three draws of points around them.

    fraction: of the labels of all parts, drawn at random.
    """
    draws = np.random.default_rng([seed, 0])
    centres = draws.uniform(-3, 3, size=(CLASSES, 2))
    while min(np.linalg.norm(a - b) for a, b in itertools.combinations(centres, 2)) < 2:
        centres = draws.uniform(-3, 3, size=(CLASSES, 2))  # or none fits to 85 %
    rng = np.random.default_rng([seed, 1 + draw])
    parts = []
    for n in (TRAIN, TEST, MEASURED):
        y = np.arange(n) % CLASSES
        x = centres[y] + 0.7 * rng.normal(size=(n, 2))
        y = np.where(rng.random(n) < fraction, rng.integers(0, CLASSES, n), y)
        parts.append(Points(x.astype(np.float32), y.astype(np.int32)))
    return Data(*parts)


def _mlp(layers, x):
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def start(seed: int, width: int, room: int) -> dict[str, Any]:
    """Parameters of a network of this width, in arrays of `room`: He's initialisation.

    What is beyond the width is 0 and stays 0, whatever is learned: it feeds and is fed
    by nothing. So networks of all widths are one program.
    """
    rng = np.random.default_rng(seed)

    def dense(sizes, places):
        layers = []
        for i, o, rows, columns in zip(
            sizes[:-1], sizes[1:], places[:-1], places[1:], strict=True
        ):
            w = np.zeros((rows, columns), np.float32)
            w[:i, :o] = rng.normal(size=(i, o)) * (2 / i) ** 0.5
            layers.append((w, np.zeros(columns, np.float32)))
        return layers

    def sizes(w):
        return (2, w, w, w // 2, w // 2, CODE)

    law = {name: dense(sizes(width), sizes(room)) for name in ("mean", "scale")}
    return law | {"head": dense((CODE, CLASSES), (CODE, CLASSES))}


def parameters(width: int) -> int:
    """How many numbers a network of this width learns."""
    return sum(a.size for a in jax.tree.leaves(start(0, width, width)))


def law(params, x):
    raw = _mlp(params["scale"], x)
    return _mlp(params["mean"], x), jnp.maximum(jax.nn.softplus(raw), 1e-10)


def logits_of(params, x, key):
    """Of one draw of the code; and the draw, its mean and scale."""
    mean, scale = law(params, x)
    code = mean + scale * jax.random.normal(key, mean.shape)
    return _mlp(params["head"], code), (code, mean, scale)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, static_argnames="steps")
def study(params, data: Data, decay, rate, keys, *, steps: int) -> dict[str, Array]:
    """One network for each leading index: its gap and what might predict it.

    DRAWS in a row differ in their data alone; so their posteriors of the encoder's
    parameters tell what these keep of the data.
    """

    def one(params, data, decay, rate, key):
        sgd = optax.sgd(1e-2, momentum=0.9)
        tx = optax.chain(optax.add_decayed_weights(decay), sgd)

        def step(carry, key):
            params, state, price = carry

            def loss(params):
                logits, (code, mean, scale) = logits_of(params, data.train.x, key)
                kept = sampled_information(code, mean, scale)
                total = cross_entropy(logits, data.train.y) + price * (TARGET - kept)
                return total, kept

            slope, kept = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(slope, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, price + rate * (TARGET - kept)), None

        def watched(carry, key):
            """A step, and the path of the encoder's parameters."""
            trained, moments = carry
            trained = step(trained, key)[0]
            moments = [
                collected(m, p)
                for m, p in zip(moments, encoder_of(trained[0]), strict=True)
            ]
            return (trained, moments), None

        def late(carry, key):
            carry = watched(carry, key)[0]
            away = [
                p - m.first
                for p, m in zip(encoder_of(carry[0][0]), carry[1], strict=True)
            ]
            return carry, away

        carry = (params, tx.init(params), jnp.zeros(()))
        every = jax.random.split(jax.random.fold_in(key, 1), steps)
        early, end = 2 * steps // 3, steps - RANK
        carry, _ = jax.lax.scan(step, carry, every[:early])
        moments = [no_moments(p) for p in encoder_of(carry[0])]
        carry, _ = jax.lax.scan(watched, (carry, moments), every[early:end])
        (carry, moments), away = jax.lax.scan(late, carry, every[end:])
        posteriors = [posterior(m, a) for m, a in zip(moments, away, strict=True)]
        return judged(carry[0], data, jax.random.fold_in(key, 2)), posteriors

    found, posteriors = jax.vmap(one)(params, data, decay, rate, keys)

    def kept(key, of):  # of the draws of one configuration
        one, two = jax.random.split(key)
        return {
            "I(encoder;S)": parameter_information(one, of),
            "I(encoder;S) Jensen": parameter_information(two, of, bound="jensen"),
        }

    groups = jax.tree.map(lambda a: a.reshape(-1, DRAWS, *a.shape[1:]), posteriors)
    known = jax.lax.map(lambda of: kept(*of), (keys[::DRAWS], groups))
    return found | jax.tree.map(lambda a: a.reshape(-1), known)


def encoder_of(params) -> list[Array]:
    """Both networks of the code's law, tensor by tensor."""
    return jax.tree.leaves((params["mean"], params["scale"]))


def judged(params, data: Data, key) -> dict[str, Array]:
    keys = jax.random.split(key, 11)

    def loss(points):
        draws = jax.vmap(lambda k: logits_of(params, points.x, k)[0])(keys[:10])
        return jax.vmap(cross_entropy, (0, None))(draws, points.y).mean(), draws.mean(0)

    (train, logits), (test, _) = loss(data.train), loss(data.test)
    right = jnp.take_along_axis(logits, data.train.y[:, None], 1)[:, 0]
    others = jnp.where(jax.nn.one_hot(data.train.y, CLASSES) > 0, -jnp.inf, logits)
    code = logits_of(params, data.measured.x, keys[10])[1]
    labels = data.measured.y
    norms = jnp.stack([jnp.linalg.norm(w) for part in params.values() for w, _ in part])
    return {
        "gap": test - train,
        "accuracy": (logits.argmax(1) == data.train.y).mean(),
        "I(X;Z|Y)": sampled_information(*code, labels=labels),
        "I(X;Z|Y) Jensen": sampled_information(*code, labels=labels, bound="jensen"),
        "I(X;Z)": sampled_information(*code),
        "I(X;Z) Jensen": sampled_information(*code, bound="jensen"),
        "norm sum": norms.sum(),
        "norm product": jnp.log(norms).sum(),
        "margin": (right - others.max(1)).mean(),
    }


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def trained(
    seed: int,
    steps: int,
    *,
    widths: Sequence[int],
    decays: Sequence[float] = (0.0,),
    rates: Sequence[float] = (0.0,),
    starts: int = 1,
    fractions: Sequence[float] = (0.0,),
) -> tuple[dict[str, np.ndarray], np.ndarray, list[tuple]]:
    """All networks of a grid: what was found of each, whose gap is finite, the grid.

    A place of the grid: width, decay, rate of the price of I(X;Z), start, share of
    random labels, draw of the data.

    The draws of one configuration begin at one place and see one order of noise.
    """
    axes = (widths, decays, rates, range(starts), fractions, range(DRAWS))
    grid = list(itertools.product(*axes))
    decay, rate = (np.array([g[i] for g in grid], np.float32) for i in (1, 2))
    group = [i // DRAWS for i in range(len(grid))]
    begun = [
        start(1000 * seed + i, g[0], max(widths))
        for i, g in zip(group, grid, strict=True)
    ]
    data = stacked([blobs(seed, g[5], g[4]) for g in grid])
    every = jax.random.split(jax.random.key(seed), group[-1] + 1)
    out = study(stacked(begun), data, decay, rate, every[np.array(group)], steps=steps)
    whole = {name: np.asarray(values, np.float64) for name, values in out.items()}
    count = np.array([parameters(g[0]) for g in grid], np.float64)
    whole |= {"parameters": count, "m log m": count * np.log2(count)}
    return whole, np.isfinite(whole["gap"]), grid
