"""Vector quantisation: the nearest of k codes that learn from sums.

`nearest_code` is the whole of it as a pure function; `vq` makes it a quantiser.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import losses
from .protocol import Quantized, Quantizer, State, positions
from .search import Metric, nearest, unit
from .updates import Rule, code_state, code_sums, ema, follow, kmeans, revive


class Nearest(NamedTuple):
    z: Float[Array, "*b e"]  # the code, with the estimator's gradient to x
    index: Int[Array, "*b"]
    commitment: Float[Array, "*b"]  # squared distance, float32, pulls x alone


def straight_through(
    x: Float[Array, "*b e"], z: Float[Array, "*b e"]
) -> Float[Array, "*b e"]:
    """z, with the gradient of x (arXiv:1711.00937, Sec. 3.1)."""
    return jax.lax.stop_gradient(z) + (x - jax.lax.stop_gradient(x))


def rotation(x: Float[Array, "*b e"], z: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """z, with the gradient of rotating and scaling x onto it (arXiv:2410.06424, 4.2).

    |z|/|x| (x - 2 r r^T x + 2 u v^T x) with v = x/|x|, u = z/|z|, r = (u + v)/|u + v|,
    and x alone differentiated: angles to x become angles to z. Where z = -x, r is 0.
    """
    z = jax.lax.stop_gradient(z)
    start = jax.lax.stop_gradient(x)
    u, v = unit(z), unit(start)
    r = unit(u + v)

    def along(a):
        return jnp.sum(x * a, -1, keepdims=True)

    length = jnp.sum(start**2, -1, keepdims=True)
    scale = jnp.sqrt(
        jnp.sum(z**2, -1, keepdims=True) / jnp.where(length > 0, length, 1)
    )
    turned = scale * (x - 2 * along(r) * r + 2 * along(v) * u)
    return straight_through(turned, z)


ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "straight": straight_through,
    "rotation": rotation,
}


def nearest_code(
    x: Float[Array, "*b e"],
    codes: Float[Array, "k e"],
    *,
    metric: Metric = "euclidean",
    estimator: str = "straight",
) -> Nearest:
    """Nearest code of each position (arXiv:1711.00937, Eq. 1 and 2).

    Everything is float32 for every input dtype, and z is cast back to it at the end.
    metric "cosine" compares, and measures the commitment, on the unit sphere.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator: {estimator!r}, but allowed are {', '.join(ESTIMATORS)}"
        )
    wide, codes = x.astype(jnp.float32), jax.lax.stop_gradient(codes)
    if metric == "cosine":
        wide = unit(wide)
    index = nearest(jax.lax.stop_gradient(wide), codes, metric=metric)
    chosen = codes.astype(jnp.float32)[index]
    z = ESTIMATORS[estimator](wide, chosen).astype(x.dtype)
    return Nearest(z, index, losses.commitment(wide, chosen))


def vq(
    width: int,
    codes: int,
    *,
    metric: Metric = "euclidean",
    estimator: str = "straight",
    rules: Sequence[Rule] = (ema(), revive()),
) -> Quantizer:
    """The nearest of `codes` codes; `rules` of `updates` say how they learn.

    With metric "cosine", end the rules with `updates.sphere()`. Starts from normal
    codes; `start` puts them at the k-means of data.

    >>> vq(16, 1024).capacity
    10.0
    """
    if width < 1 or codes < 1:
        raise ValueError(
            f"vq: width={width}, codes={codes}, but both must be at least 1"
        )

    def init(key: jax.Array) -> State:
        drawn = jax.random.normal(key, (codes, width), jnp.float32)
        return State(
            memory=code_state(unit(drawn) if metric == "cosine" else drawn, rules)
        )

    def encode(state: State, x):
        return quantize(state, x).indices

    def decode(state: State, indices):
        return state.memory.codes[indices[..., 0]]

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, keep = positions(x, mask, width)
        found = nearest_code(
            wide, state.memory.codes, metric=metric, estimator=estimator
        )
        at = unit(wide) if metric == "cosine" else wide
        stats = code_sums(at, found.index, found.commitment, keep, codes)
        loss = {"commitment": losses.mean(found.commitment, keep)}
        return Quantized(found.z.astype(x.dtype), found.index[..., None], loss, stats)

    def update(state: State, stats):
        memory, report = follow(state.memory, stats, rules)
        return state._replace(memory=memory), report

    def start(key: jax.Array, state: State, x, mask=None) -> State:
        wide, _ = positions(x, mask, width)
        found = kmeans(key, wide, codes, mask=mask, metric=metric)
        inner = tuple(rule.init(found.codes) for rule in rules)
        return state._replace(memory=found._replace(inner=inner))

    weights = {"commitment": 1.0}
    return Quantizer(
        width, width, (codes,), init, encode, decode, quantize, weights, update, start
    )
