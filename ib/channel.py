"""What passes a Gaussian channel t = mean(x) + scale(x) noise, in nats.

Bounds on I(x;t) from the channel's own parameters: nothing is fitted. The rate needs a
prior and treats each x alone; the mixture bounds compare the x of a sample with each
other, so they cannot exceed log n.
"""

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from .kernels import (
    BLOCK,
    by_rows,
    log_weights,
    rows_of,
    squared_distances,
    without_masked,
)


def gaussian_kl(
    mean: Float[Array, "*b e"],
    scale: Float[Array, "*b e"] | Float[Array, ""],
    prior_mean: Float[Array, "*b e"] | Float[Array, ""] | float = 0.0,
    prior_scale: Float[Array, "*b e"] | Float[Array, ""] | float = 1.0,
) -> Float[Array, "*b"]:
    """KL(N(mean, scale^2); N(prior_mean, prior_scale^2)) of diagonal laws, in nats.

    Its mean over x bounds I(x;t) from above whatever the prior: the gap is
    KL(p(t); prior) (Alemi et al. 2017, arXiv:1612.00410, Eq. 14).

    >>> float(gaussian_kl(jnp.zeros(3), jnp.ones(())))
    0.0
    """
    ratio = jnp.square(scale / prior_scale)
    offset = jnp.square((mean - prior_mean) / prior_scale)
    each = 0.5 * (offset + ratio - 1 - jnp.log(ratio))
    return jnp.broadcast_to(each, mean.shape).sum(-1)


def mixture_information(
    mean: Float[Array, "n e"],
    variance: Float[Array, ""] | float,
    *,
    bound: str = "upper",
    mask: Bool[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """Bound on I(x;t) in nats, x uniform on the sample and t = mean + N(0, variance I).

        -mean_i log mean_j exp(-|mean_i - mean_j|^2 / (2 c variance)),

    c = 1 "upper" (by KL), c = 4 "lower" (by Bhattacharyya's distance) (Kolchinsky and
    Tracey 2017, arXiv:1706.02419, Eq. 10, 11; the first is NIB's, arXiv:1705.02436).
    At least 0, at most log n. mask: rows that are False change nothing.
    Raises: ValueError for another bound, a mean that is not [n, e], or a variance that
    is not one number.
    """
    if bound not in ("upper", "lower"):
        raise ValueError(f"bound: {bound!r}, but allowed are 'upper' and 'lower'")
    if jnp.ndim(variance):
        raise ValueError(
            f"variance: shape {jnp.shape(variance)}, but one number serves all rows"
        )
    mean = without_masked(rows_of("mean", mean), mask)
    factor = 2.0 if bound == "upper" else 8.0
    log_w = log_weights(mean, mask)

    def row(a):
        kernel = -squared_distances(a, mean) / (factor * variance)
        return logsumexp(kernel + log_w, axis=1)

    rows = by_rows(row, mean, block=block)
    return -jnp.sum(jnp.exp(log_w) * rows)


def sampled_information(
    code: Float[Array, "n e"],
    mean: Float[Array, "n e"],
    scale: Float[Array, "n e"],
    *,
    labels: Int[Array, " n"] | None = None,
    bound: str = "mixture",
    block: int = 256,
) -> Float[Array, ""]:
    """I(x;t), or I(x;t|y) with labels y, from one draw code_i of each x_i's law, nats.

        mean_i log p(code_i | x_i) - log mean_j p(code_i | x_j)        "mixture"
        mean_i log p(code_i | x_i) - mean_j log p(code_i | x_j)        "jensen"

    j runs over the sample, with labels over the rows of i's class. The first is at
    most log n (log of the class's rows) and low in the mean where that is near; the
    second bounds it from above and has no ceiling (Kawaguchi et al. 2023,
    arXiv:2305.18887, Sec. 4). Densities are of all e numbers together.
    Raises: ValueError for another bound.
    """
    if bound not in ("mixture", "jensen"):
        raise ValueError(f"bound: {bound!r}, but allowed are 'mixture' and 'jensen'")
    code, mean, scale = (
        rows_of(name, a)
        for name, a in (("code", code), ("mean", mean), ("scale", scale))
    )
    labels = jnp.zeros(code.shape[0], jnp.int32) if labels is None else labels

    def density(z, m, s):
        """log N(z_i; m_j, s_j^2) without the constant; one number at a time."""
        total = jnp.zeros((z.shape[0], m.shape[0]), z.dtype)
        for a, b, c in zip(z.T, m.T, s.T, strict=True):
            total -= 0.5 * jnp.square((a[:, None] - b) / c) + jnp.log(c)
        return total

    def row(z, m, s, y):
        own = -0.5 * jnp.square((z - m) / s).sum(1) - jnp.log(s).sum(1)
        same = y[:, None] == labels
        count = same.sum(1)
        each = density(z, mean, scale)
        if bound == "jensen":
            return own - jnp.where(same, each, 0).sum(1) / count
        kept = jnp.where(same, each, -jnp.inf)
        return own - logsumexp(kept, axis=1) + jnp.log(count)

    return by_rows(row, code, mean, scale, labels, block=block).mean()
