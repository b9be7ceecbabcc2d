"""Information of wide layers through short codes (arXiv:2305.08013).

Neighbours and kernels fail in hundreds of features. A code of a few numbers holds at
most as much,

    I(E(X); E(L)) <= I(X; L)                    (data processing)

and all of it where E is one to one on what occurs. What a code loses is bounded by its
error: `residual_entropy`, `projection_gap`. A layer needs noise, for the information of
a deterministic layer is infinite: `inject`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from .kernels import rows_of


def inject(
    key: Array, h: Float[Array, "n *d"], sigma: float | Array
) -> Float[Array, "n *d"]:
    """h + sigma r N(0, I), r the root mean square of the whole layer on these rows.

    One r for all units, so that a unit that is 0 gets noise too; no gradient passes
    through r. The caller's dtype.
    """
    r = jnp.sqrt(jnp.mean(jnp.square(lax.stop_gradient(h).astype(jnp.float32))))
    noise = sigma * r * jax.random.normal(key, h.shape, jnp.float32)
    return (h + noise).astype(h.dtype)


class Code(NamedTuple):
    """A lossy code of k numbers, fitted to rows of d features."""

    encode: Callable[[Float[Array, "n d"]], Float[Array, "n k"]]
    decode: Callable[[Float[Array, "n k"]], Float[Array, "n d"]]


def squared_error(code: Code, x: Float[Array, "n d"]) -> Float[Array, ""]:
    """mean_i |x_i - decode(encode(x_i))|^2, summed over features."""
    x = rows_of("x", x, 2)
    return jnp.square(x - code.decode(code.encode(x))).sum(1).mean()


def _check_size(k: int, x: Float[Array, "n d"]) -> None:
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k: {k} numbers, but x has {x.shape[1]} features: 1 to these")


def linear_code(mean: Float[Array, " d"], basis: Float[Array, "d k"]) -> Code:
    """Coordinates along orthonormal columns."""
    return Code(lambda x: (x - mean) @ basis, lambda z: z @ basis.T + mean)


def pca(key: Array, x: Float[Array, "n d"], k: int, *, iterations: int = 30) -> Code:
    """The k directions of the largest variance, by subspace iteration.

    O(n d k) an iteration, so thousands of features do no harm; the directions are in
    falling order of variance. Raises: ValueError for k not in 1..d, what `rows_of`
    refuses.
    """
    x = rows_of("x", x, 2)
    _check_size(k, x)
    centred = x - x.mean(0)
    wide = min(x.shape[1], k + 8)  # spare directions make the first k converge

    def turn(basis, _):
        return jnp.linalg.qr(centred.T @ (centred @ basis))[0], None

    start = jnp.linalg.qr(jax.random.normal(key, (x.shape[1], wide), x.dtype))[0]
    basis = lax.scan(turn, start, length=iterations)[0]
    inside = centred @ basis
    turned = jnp.linalg.eigh(inside.T @ inside)[1][:, ::-1]
    return linear_code(x.mean(0), (basis @ turned)[:, :k])


def random_projection(key: Array, x: Float[Array, "n d"], k: int) -> Code:
    """k random orthonormal directions: what a code without any fitting holds."""
    x = rows_of("x", x, 2)
    _check_size(k, x)
    drawn = jax.random.normal(key, (x.shape[1], k), x.dtype)
    return linear_code(x.mean(0), jnp.linalg.qr(drawn)[0])


def _dense(key: Array, sizes: tuple[int, ...]) -> list[tuple[Array, Array]]:
    draw, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return [(draw(k, (a, b), jnp.float32), jnp.zeros(b)) for k, a, b in pairs]


def _apply(layers, x):
    for matrix, bias in layers[:-1]:
        x = jax.nn.gelu(x @ matrix + bias)
    return x @ layers[-1][0] + layers[-1][1]


def autoencoder(
    key: Array,
    x: Float[Array, "n d"],
    k: int,
    *,
    width: int = 128,
    steps: int = 2000,
    batch: int = 128,
    learning_rate: float = 2e-3,
) -> Code:
    """Two networks of two hidden layers, trained to the least absolute error.

    Adam, the rate falling to 0 as a cosine. Features are centred and brought to a
    common scale. Raises: ValueError as `pca`, or for counts below 1.
    """
    x = rows_of("x", x, 2)
    _check_size(k, x)
    for name, count in (("width", width), ("steps", steps), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name}: {count}, but it must be at least 1")
    mean, d = x.mean(0), x.shape[1]
    scale = jnp.sqrt(jnp.square(x - mean).mean())
    scale = jnp.where(scale > 0, scale, 1)
    into, out, order = jax.random.split(key, 3)
    params: Any = {
        "encoder": _dense(into, (d, width, width, k)),
        "decoder": _dense(out, (k, width, width, d)),
    }
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    rows = (x - mean) / scale

    def loss(params, batch):
        again = _apply(params["decoder"], _apply(params["encoder"], batch))
        return jnp.abs(again - batch).mean()

    def step(carry, key):
        params, moments = carry
        chosen = rows[jax.random.randint(key, (batch,), 0, len(rows))]
        updates, moments = tx.update(jax.grad(loss)(params, chosen), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(order, steps)
    params = lax.scan(step, (params, tx.init(params)), keys)[0][0]
    return Code(
        lambda x: _apply(params["encoder"], (x - mean) / scale),
        lambda z: _apply(params["decoder"], z) * scale + mean,
    )


CODES: dict[str, Callable[..., Code]] = {
    "pca": pca,
    "random_projection": random_projection,
    "autoencoder": autoencoder,
}


def residual_entropy(mse: float, d: int) -> float:
    """h(X | E(X)) <= d / 2 log(2 pi e mse / d) in nats, mse summed over d features.

    The normal law of this variance has the largest entropy (arXiv:2305.08013,
    section 3; constants derived here). Raises: ValueError for mse <= 0 or d < 1.
    """
    if mse <= 0 or d < 1:
        raise ValueError(f"mse, d: {mse}, {d}, but they must be above 0 and at least 1")
    return d / 2 * math.log(2 * math.pi * math.e * mse / d)


def projection_gap(mse: float, left_out: int, noise: float) -> float:
    """Most that a linear code E of orthonormal columns loses of I(X; L), in nats.

        I(X; L) - I(X; E(L)) <= left_out / 2 log(mse / (left_out noise))

    for L = f(X) + N(0, noise I); mse, summed over features, holds that noise. The part
    R that is left out of a turned L has a noise of its own, independent of E's:

        I(X; R | E) = h(R | E) - h(R | E, X) <= `residual_entropy` - h(noise).

    For I(L; Y) with a Y that depends on L through X it bounds the loss too.
    Raises: ValueError for mse or noise not above 0, left_out < 0.

    >>> projection_gap(2.0, 2, 1.0)
    0.0
    """
    if mse <= 0 or noise <= 0 or left_out < 0:
        raise ValueError(
            f"mse, noise, left_out: {mse}, {noise}, {left_out}, but they must be above "
            "0, above 0 and at least 0"
        )
    if left_out == 0:
        return 0.0
    return left_out / 2 * math.log(mse / (left_out * noise))
