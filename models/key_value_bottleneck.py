"""A memory of pairs between a frozen encoder and its classes (arXiv:2207.11240).

Features are projected into c heads, each head finds its nearest key, and only the value
of that key is read and learned. Keys come from features without labels and then never
move, so what one class teaches leaves the cells of the others untouched. Features are
[b, d], or [b, n, d] where an encoder gives several positions of a sample. As a waist
inside of a model it is `key_value_waist.KeyValue`.

>>> places = projections(jax.random.key(0), 16, books=4, width=8)
>>> features = jax.random.normal(jax.random.key(1), (256, 16))
>>> keys = average_keys(jax.random.key(2), heads(places, features), 32, batch=64)
>>> memory = empty(places, keys, 10)
>>> memory, loss = learn(memory, features[:8], jnp.arange(8), rate=0.3)
>>> vote(fetch(memory, features[:8])).shape
(8, 10)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .quantize.search import nearest
from .quantize.updates import code_state, code_sums, ema, follow, kmeans, revive

FAR = 1e15  # where a key lies that must not be found; its square is still finite


class Memory(NamedTuple):
    """c books of k pairs; only `values` and `hits` change once keys are chosen."""

    projections: Float[Array, "c d e"]
    keys: Float[Array, "c k e"]
    values: Float[Array, "c k v"]
    hits: Int[Array, "c k"]  # samples that wrote each cell


def projections(
    key: jax.Array, d: int, *, books: int, width: int
) -> Float[Array, "c d e"]:
    """Normal numbers, each column over d of length 1."""
    drawn = jax.random.normal(key, (books, d, width))
    return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)


def chunks(d: int, *, books: int) -> Float[Array, "c d e"]:
    """Each book its own d // books numbers of a feature, in their order."""
    if books < 1 or d % books:
        raise ValueError(f"books: {books}, but they must divide the {d} numbers")
    return jnp.eye(d).reshape(d, books, d // books).swapaxes(0, 1)


def heads(
    projections: Float[Array, "c d e"], features: Float[Array, "*b d"]
) -> Float[Array, "*b c e"]:
    """What each book sees of a feature, float32."""
    precise = jax.lax.Precision.HIGHEST
    features = features.astype(jnp.float32)
    return jnp.einsum("...d,cde->...ce", features, projections, precision=precise)


def mean_keys(
    key: jax.Array, x: Float[Array, "n c e"], k: int, *, iterations: int = 10
) -> Float[Array, "c k e"]:
    """Keys at the k-means of each book's heads."""
    seeds = jax.random.split(key, x.shape[1])

    def book(key, x):
        return kmeans(key, x, k, iterations=iterations).codes

    return jax.vmap(book)(seeds, x.astype(jnp.float32).swapaxes(0, 1))


def average_keys(
    key: jax.Array,
    x: Float[Array, "n c e"],
    k: int,
    *,
    batch: int = 256,
    passes: int = 10,
    decay: float = 0.95,
) -> Float[Array, "c k e"]:
    """Keys that follow the averages of heads, from rows drawn by chance.

    Every pass shows n // batch whole batches in a new order; keys that receive less
    than a tenth of the mean are split off full ones.

    Raises: ValueError where `batch` exceeds the rows.
    """
    if not 0 < batch <= len(x):
        raise ValueError(f"batch: {batch}, but must be from 1 to the {len(x)} rows")
    rules = (ema(decay), revive(0.1))
    start, order = jax.random.split(key)
    orders = [
        jax.random.permutation(row, len(x))[: len(x) // batch * batch]
        for row in jax.random.split(order, passes)
    ]
    batches = jnp.concatenate(orders).reshape(-1, batch)

    def book(key, x):
        rows = jax.random.choice(key, len(x), (k,), replace=len(x) < k)

        def show(state, rows):
            seen = x[rows]
            index = nearest(seen, state.codes)
            square = jnp.sum((seen - state.codes[index]) ** 2, -1)
            sums = code_sums(seen, index, square, jnp.ones(batch), k)
            return follow(state, sums, rules)[0], None

        return jax.lax.scan(show, code_state(x[rows], rules), batches)[0].codes

    seeds = jax.random.split(start, x.shape[1])
    return jax.vmap(book)(seeds, x.astype(jnp.float32).swapaxes(0, 1))


def empty(
    projections: Float[Array, "c d e"], keys: Float[Array, "c k e"], width: int
) -> Memory:
    """Values of `width` zeros; no cell was hit."""
    values = jnp.zeros((*keys.shape[:2], width), jnp.float32)
    return Memory(projections, keys, values, jnp.zeros(keys.shape[:2], jnp.int32))


def find(
    memory: Memory,
    features: Float[Array, "*b d"],
    *,
    written: bool = True,
    top: int = 1,
) -> Int[Array, "*b c top"]:
    """The nearest keys of each book; with `written` the nearest that were ever hit.

    A book that has fewer such keys than `top` answers with cells in range.
    """
    keys = memory.keys
    if not 1 <= top <= keys.shape[1]:
        raise ValueError(f"top: {top}, but must be from 1 to the {keys.shape[1]} keys")
    if written:
        keys = jnp.where(memory.hits[..., None] > 0, keys, FAR)
    x = heads(memory.projections, features)
    x = x.reshape(-1, *x.shape[-2:])
    if top == 1:
        index = jax.vmap(nearest, in_axes=(1, 0), out_axes=1)(x, keys)[..., None]
    else:
        index = jax.lax.map(lambda row: _nearest(row, keys, top), x, batch_size=256)
    return index.reshape(*features.shape[:-1], len(keys), top)


def _nearest(x: Float[Array, "c e"], keys, top: int) -> Int[Array, "c top"]:
    dots = jnp.einsum("ce,cke->ck", x, keys, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(dots - 0.5 * jnp.sum(keys**2, -1), top)[1]


def fetch(
    memory: Memory,
    features: Float[Array, "*b d"],
    *,
    written: bool = True,
    top: int = 1,
) -> Float[Array, "*b c v"]:
    """Values of the cells found, of several the sum."""
    return _read(memory.values, find(memory, features, written=written, top=top))


def _read(values, index: Int[Array, "*b c top"]) -> Float[Array, "*b c v"]:
    return values[jnp.arange(len(values))[:, None], index].sum(-2)


def vote(fetched: Float[Array, "b *n c v"]) -> Float[Array, "b v"]:
    """The decoder without parameters: logits are the mean over books and positions."""
    return fetched.mean(range(1, fetched.ndim - 1))


def linear(
    kernel: Float[Array, "m v"], bias: Float[Array, " v"] | None = None
) -> Callable[[jax.Array], jax.Array]:
    """A decoder with parameters: m = c v numbers, the values of all books, to logits.

    Positions are averaged first. The parameters stay as they are in `learn`.
    """

    def decode(fetched: Float[Array, "b *n c v"]) -> Float[Array, "b v"]:
        mean = fetched.mean(range(1, fetched.ndim - 2))
        logits = mean.reshape(len(mean), -1) @ kernel
        return logits if bias is None else logits + bias

    return decode


def learn(
    memory: Memory,
    features: Float[Array, "b *n d"],
    labels: Int[Array, " b"],
    *,
    rate: float | Float[Array, ""],
    top: int = 1,
    smoothing: float = 0.0,
    decode: Callable[[jax.Array], jax.Array] = vote,
) -> tuple[Memory, Float[Array, ""]]:
    """A step of plain gradient descent on the values hit; the summed loss in nats.

    The loss is summed, not averaged, and has no momentum, decay or clipping: a cell's
    value depends on the samples that hit it and on the values they read beside it.

    smoothing: of the labels, toward all classes alike.
    decode: from fetched values [b, c, v] to logits [b, classes]; it stays as it is.
    """
    index = find(memory, features, written=False, top=top)
    return learn_at(
        memory, index, labels, rate=rate, smoothing=smoothing, decode=decode
    )


def learn_at(
    memory: Memory,
    index: Int[Array, "b *n c top"],
    labels: Int[Array, " b"],
    *,
    rate: float | Float[Array, ""],
    smoothing: float = 0.0,
    decode: Callable[[jax.Array], jax.Array] = vote,
) -> tuple[Memory, Float[Array, ""]]:
    """`learn` at cells already found: keys never move, so they are found once."""
    books = jnp.arange(len(memory.keys))[:, None]

    def total(fetched):
        logits = decode(fetched.sum(-2))
        goal = jax.nn.one_hot(labels, logits.shape[-1])
        goal = optax.smooth_labels(goal, smoothing)
        return optax.softmax_cross_entropy(logits, goal).sum()

    loss, slope = jax.value_and_grad(total)(memory.values[books, index])
    return memory._replace(
        values=memory.values.at[books, index].add(-rate * slope),
        hits=memory.hits.at[books, index].add(1),
    ), loss
