"""Classifiers on frozen features that learn from a stream of labelled rows.

A learner gives the logits of held-out features after it saw `rows` [tasks, steps,
batch] of the training features in that order, without replay. All are pure, and are
compiled once for each shape.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from narrows.models import key_value_bottleneck as kv


class Samples(NamedTuple):
    features: Float[Array, "n d"]
    labels: Int[Array, " n"]
    held_out: Float[Array, "m d"]


Rows = Int[Array, "tasks steps batch"]
Layers = list[tuple[Float[Array, "i o"], Float[Array, " o"]]]


class Memory(NamedTuple):
    """Where the samples lie in a memory whose keys are chosen: found once."""

    memory: kv.Memory
    train: Int[Array, "n c 1"]
    held_out: Int[Array, "m c 1"]  # nearest of all cells, written or not


class Votes(NamedTuple):
    written: Float[Array, "m v"]  # of the nearest cells that were written
    every: Float[Array, "m v"]  # of the nearest cells


@functools.partial(
    jax.jit, static_argnames=("books", "pairs", "width", "classes", "passes")
)
def remember(
    key: jax.Array,
    samples: Samples,
    unlabelled: Float[Array, "u d"],
    *,
    books: int,
    pairs: int,
    width: int,
    classes: int,
    passes: int = 4,
) -> Memory:
    """An empty memory with keys from features without labels."""
    place, start = jax.random.split(key)
    places = kv.projections(place, samples.features.shape[-1], books=books, width=width)
    keys = kv.average_keys(
        start, kv.heads(places, unlabelled), pairs, batch=500, passes=passes
    )
    memory = kv.empty(places, keys, classes)
    both = jnp.concatenate([samples.features, samples.held_out])
    index = kv.find(memory, both, written=False)
    count = len(samples.features)
    return Memory(memory, index[:count], index[count:])


@jax.jit
def key_value(held: Memory, samples: Samples, rate, rows: Rows) -> Votes:
    """Votes of a memory that has learned."""

    def step(memory, batch):
        labels = samples.labels[batch]
        return kv.learn_at(memory, held.train[batch], labels, rate=rate)[0], None

    memory = jax.lax.scan(step, held.memory, rows.reshape(-1, rows.shape[-1]))[0]
    books = jnp.arange(len(memory.keys))[:, None]
    return Votes(
        kv.vote(kv.fetch(memory, samples.held_out)),
        kv.vote(memory.values[books, held.held_out].sum(-2)),
    )


def layers(key: jax.Array, sizes: Sequence[int]) -> Layers:
    """Normal weights of variance 2 / inputs, the last layer zeros."""
    keys = jax.random.split(key, len(sizes))
    made = [
        (jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o))
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]
    made[-1] = jax.tree.map(jnp.zeros_like, made[-1])
    return made


def forward(params: Layers, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    *inner, (weight, bias) = params
    for w, b in inner:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


@functools.partial(jax.jit, static_argnames=("classes", "hidden"))
def probe(
    samples: Samples,
    rate,
    rows: Rows,
    key: jax.Array,
    *,
    classes: int,
    hidden: tuple[int, ...] = (),
    penalty: float | Float[Array, ""] = 0.0,
) -> Float[Array, "m v"]:
    """A linear probe or a perceptron by Adam; with `penalty` under EWC.

    After each task the diagonal of the empirical Fisher information, from one batch in
    ten of it, is added to that of the tasks before, and what follows pays penalty / 2
    sum F (p - p*)^2, p* the parameters at that moment (arXiv:1612.00796, Eq. 3, in the
    running form of arXiv:1805.06370, Sec. 2).
    """
    params = layers(key, [samples.features.shape[-1], *hidden, classes])
    optimizer = optax.adam(rate)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def nats(params, batch):
        logits = forward(params, samples.features[batch])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, samples.labels[batch]
        ).mean()

    def step(held, batch):
        params, state, fisher, centre = held

        def total(params):
            squares = jax.tree.map(
                lambda f, p, c: jnp.sum(f * (p - c) ** 2), fisher, params, centre
            )
            return nats(params, batch) + 0.5 * penalty * optax.tree.sum(squares)

        updates, state = optimizer.update(jax.grad(total)(params), state, params)
        return (optax.apply_updates(params, updates), state, fisher, centre), None

    def task(held, rows):
        params, state, fisher, _ = jax.lax.scan(step, held, rows)[0]
        chosen = rows[::10].reshape(-1, 1)
        slopes = jax.lax.map(
            lambda row: jax.grad(nats)(params, row), chosen, batch_size=50
        )
        fisher = jax.tree.map(lambda f, g: f + (g**2).mean(0), fisher, slopes)
        return (params, state, fisher, params), None

    start = params, optimizer.init(params), zeros, zeros
    end: Any
    if isinstance(penalty, float) and penalty == 0.0:
        rows = rows.reshape(-1, rows.shape[-1])
        end = jax.lax.scan(step, start, rows)[0]
        return forward(end[0], samples.held_out)
    end = jax.lax.scan(task, start, rows)[0]
    return forward(end[0], samples.held_out)
