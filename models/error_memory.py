"""A memory of recent errors beside a frozen model (ReLoop2, arXiv:2306.08808).

When labels drift faster than a model is retrained, its errors on similar recent samples
tell how far it is off. The memory holds pairs of a key, such as the last hidden layer
of the model, and a value, such as the signed error y - p of its prediction; reading
it at a query gives the average value of what is near. Two forms of one contract:

    exact    the newest `capacity` pairs, read at the k nearest keys
    sketch   sums and counts in the buckets of a few random hashes: constant memory and
             time, whatever has been written

>>> memory = sketch(jax.random.key(0), 4, tables=8, bits=3)
>>> keys = jax.random.normal(jax.random.key(1), (100, 4))
>>> state = memory.write(memory.init(1), keys, jnp.full((100, 1), 0.25))
>>> compensate(jnp.array([0.5, 0.9]), memory.read(state, keys[:2])[:, 0], 1.0).tolist()
[0.75, 1.0]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8


class Memory(NamedTuple):
    """init(values) -> state; the rest are pure functions of a state.

    write(state, keys [b, d], values [b, v], mask=None [b], version=0) -> state
    read(state, keys [b, d], version=0) -> average values near each key, float32 [b, v];
        0 where nothing was written

    `version` names the encoder that made the keys, an integer. Keys of two encoders are
    never compared: writing with a new one empties the memory first, reading with
    another than was written finds nothing.
    """

    init: Callable[[int], Any]
    write: Callable[..., Any]
    read: Callable[..., Array]


class Pairs(NamedTuple):
    keys: Float[Array, "m d"]
    values: Float[Array, "m v"]
    written: Int[Array, ""]  # pairs ever written; the newest m are there
    version: Int[Array, ""]


class Buckets(NamedTuple):
    planes: Int8[Array, "l k d"]  # hash l is the k signs of planes[l] @ key
    sums: Float[Array, "l n v"]  # over what fell into each of n = 2^k buckets
    counts: Float[Array, "l n"]
    version: Int[Array, ""]


def exact(
    width: int, *, capacity: int, neighbours: int, temperature: float, shrink: float
) -> Memory:
    """The newest pairs; e(x) = sum_i a_i value_i / (1 + shrink / k) over neighbours.

    Neighbours are nearest in Euclidean distance, a = softmax(-distance^2 /
    temperature); an infinite temperature weighs them alike. k is the number that was
    found: at first there are fewer.
    """
    if not 0 < neighbours <= capacity:
        raise ValueError(
            f"neighbours: {neighbours}, but must be from 1 to capacity={capacity}"
        )

    def init(values: int) -> Pairs:
        zero = jnp.zeros((), jnp.int32)
        keys = jnp.zeros((capacity, width), jnp.float32)
        return Pairs(keys, jnp.zeros((capacity, values), jnp.float32), zero, zero)

    def write(state: Pairs, keys, values, mask=None, version: Any = 0) -> Pairs:
        keep = jnp.ones(len(keys), bool) if mask is None else mask
        written = jnp.where(state.version == version, state.written, 0)
        place = (written + jnp.cumsum(keep) - 1) % capacity
        last = jnp.cumsum(keep[::-1])[::-1] <= capacity  # of a batch beyond capacity
        place = jnp.where(keep & last, place, capacity)
        return Pairs(
            state.keys.at[place].set(keys.astype(jnp.float32), mode="drop"),
            state.values.at[place].set(values.astype(jnp.float32), mode="drop"),
            written + keep.sum(dtype=jnp.int32),
            jnp.asarray(version, jnp.int32),
        )

    def read(state: Pairs, keys, version: Any = 0) -> Float[Array, "b v"]:
        precise = jax.lax.Precision.HIGHEST
        keys = keys.astype(jnp.float32)
        product = jnp.matmul(keys, state.keys.T, precision=precise)
        square = (keys**2).sum(-1)[:, None] - 2 * product + (state.keys**2).sum(-1)
        held = jnp.arange(capacity) < state.written
        held &= state.version == version
        near, index = jax.lax.top_k(jnp.where(held, -square, -jnp.inf), neighbours)
        found = jnp.isfinite(near)
        count = found.sum(-1, keepdims=True)
        weights = jax.nn.softmax(jnp.where(found, near / temperature, -1e30), -1)
        mean = jnp.einsum(
            "bk,bkv->bv", jnp.where(found, weights, 0), state.values[index]
        )
        return mean * count / jnp.maximum(count + shrink, 1)

    return Memory(init, write, read)


def sketch(
    key: jax.Array,
    width: int,
    *,
    tables: int,
    bits: int,
    decay: float = 1.0,
    shrink: float = 0.0,
) -> Memory:
    """Sums by hash: e(x) = mean over tables of sum / (count + shrink) of its bucket.

    A hash is the signs of `bits` random projections: keys at an angle t fall into one
    bucket with probability (1 - t / pi)^bits, so keys should be centred. Each call of
    `write` first multiplies all sums and counts by `decay`.
    """
    if bits < 0 or tables < 1:
        raise ValueError(
            f"tables, bits: {tables}, {bits}, but must be at least 1 and at least 0"
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay: {decay}, but must be above 0 and at most 1")

    def init(values: int) -> Buckets:
        normal = jax.random.normal(key, (tables, bits, width))
        return Buckets(  # a byte each: only the direction of a plane matters
            jnp.clip(jnp.round(32 * normal), -127, 127).astype(jnp.int8),
            jnp.zeros((tables, 2**bits, values), jnp.float32),
            jnp.zeros((tables, 2**bits), jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    def write(state: Buckets, keys, values, mask=None, version: Any = 0) -> Buckets:
        ones = jnp.ones(len(keys)) if mask is None else mask.astype(jnp.float32)
        values = jnp.where(ones[:, None] > 0, values, 0).astype(jnp.float32)
        faded = jnp.where(state.version == version, decay, 0.0)
        rows, bucket = jnp.arange(tables), hashes(state.planes, keys)
        return state._replace(
            sums=(state.sums * faded).at[rows, bucket].add(values[:, None]),
            counts=(state.counts * faded).at[rows, bucket].add(ones[:, None]),
            version=jnp.asarray(version, jnp.int32),
        )

    def read(state: Buckets, keys, version: Any = 0) -> Float[Array, "b v"]:
        rows, bucket = jnp.arange(tables), hashes(state.planes, keys)
        counts = state.counts[rows, bucket][..., None]
        held = (counts > 0) & (state.version == version)
        mean = state.sums[rows, bucket] / jnp.where(held, counts + shrink, 1)
        return jnp.where(held, mean, 0).mean(1)

    return Memory(init, write, read)


def hashes(
    planes: Int8[Array, "l k d"], keys: Float[Array, "b d"]
) -> Int[Array, "b l"]:
    """The bucket of each key in each table, in [0, 2^k)."""
    precise = jax.lax.Precision.HIGHEST
    keys = keys.astype(jnp.float32)
    planes = planes.astype(jnp.float32)
    signs = jnp.einsum("bd,lkd->blk", keys, planes, precision=precise) > 0
    return (signs * 2 ** jnp.arange(planes.shape[1])).sum(-1, dtype=jnp.int32)


def size_in_bytes(state: Any) -> int:
    """Of all arrays of a state, whatever they hold."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def compensate(
    prediction: Float[Array, "*b"], error: Float[Array, "*b"], strength: Any
) -> Float[Array, "*b"]:
    """p + strength * e, clipped to [0, 1]."""
    return jnp.clip(prediction + strength * error, 0, 1)


def replay(
    memory: Memory,
    keys: Float[Array, "t b d"],
    values: Float[Array, "t b v"],
    *,
    delay: int = 1,
    mask: Bool[Array, "t b"] | None = None,
) -> tuple[Float[Array, "t b v"], Any]:
    """Serve batches in order: read, then learn what has become known.

    Batch t is read from a memory that was written with the values of the batches up to
    t - delay; labels come that late. Returns what was read, and the last state.
    Raises: ValueError for a delay below 1, with which a sample would see its own label.
    """
    if not 1 <= delay <= len(keys):
        raise ValueError(
            f"delay: {delay}, but must be from 1 to the {len(keys)} batches"
        )
    mask = jnp.ones(keys.shape[:2], bool) if mask is None else mask

    def late(x):
        return jnp.concatenate([jnp.zeros_like(x[: delay - 1]), x])[: len(x)]

    def serve(state, batch):
        query, *known = batch
        return memory.write(state, *known), memory.read(state, query)

    xs = (keys, late(keys), late(values), late(mask))
    state, found = jax.lax.scan(serve, memory.init(values.shape[-1]), xs)
    return found, state


def strengths(
    prediction: Float[Array, "t b"],
    error: Float[Array, "t b"],
    label: Float[Array, "t b"],
    grid: Float[Array, " g"],
    *,
    decay: float,
    delay: int = 1,
) -> Float[Array, " t"]:
    """The strength of `compensate` for each batch, by log loss on recent labels.

    Of the grid the one whose loss, summed with `decay` a batch over the batches up to
    t - delay, is least; the first of the grid while no label is known.
    """

    def nats(strength):
        p = jnp.clip(compensate(prediction, error, strength), 1e-3, 1 - 1e-3)
        return -jnp.where(label > 0, jnp.log(p), jnp.log1p(-p)).mean(-1)

    def choose(seen, loss):
        return decay * seen + loss, grid[jnp.argmin(seen)]

    losses = jax.vmap(nats, out_axes=1)(grid)
    losses = jnp.concatenate([jnp.zeros((delay - 1, len(grid))), losses])
    return jax.lax.scan(choose, jnp.zeros(len(grid)), losses)[1][: len(prediction)]
