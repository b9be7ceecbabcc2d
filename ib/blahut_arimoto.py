"""The information bottleneck of a discrete law, by Blahut's and Arimoto's iteration.

An encoder p(t | x) that makes I(X; T) - beta I(T; Y) stationary obeys

    p(t | x) ∝ p(t) exp(-beta KL(p(y | x) || p(y | t))),
    p(t) = sum_x p(x) p(t | x),   p(y | t) = sum_x p(y | x) p(x | t)

(Tishby, Pereira and Bialek 1999, arXiv:physics/0004057, eq. 16, 28 to 31). Iterating
it never raises the functional. All in float64 and nats, on the host: the alphabets that
this is for are small once inputs with equal p(y | x) are one.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp, rel_entr


class Curve(NamedTuple):
    """Points of the curve, in the order of the betas given; nats."""

    beta: Float[np.ndarray, " b"]
    x_t: Float[np.ndarray, " b"]  # I(X; T)
    t_y: Float[np.ndarray, " b"]  # I(T; Y)


def information(joint: Float[np.ndarray, "a b"]) -> float:
    """I of a table of probabilities in nats.

    >>> round(information(np.eye(2) / 2), 6)
    0.693147
    """
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float(rel_entr(joint, independent).sum())


def merged(joint: Float[np.ndarray, "x y"]) -> Float[np.ndarray, "s y"]:
    """The law of the sufficient statistic: rows of equal p(y | x) are added.

    It has the curve of the whole law, since nothing else of x says anything of y. Rows
    of no probability are left out.
    """
    joint = joint[joint.sum(1) > 0]
    given = joint / joint.sum(1, keepdims=True)
    which = np.unique(given.round(12), axis=0, return_inverse=True)[1].ravel()
    return np.stack([joint[which == s].sum(0) for s in range(which.max() + 1)])


def step(
    joint: Float[np.ndarray, "x y"], encoder: Float[np.ndarray, "x t"], beta: float
) -> Float[np.ndarray, "x t"]:
    """The next p(t | x): it has no larger I(X; T) - beta I(T; Y)."""
    p_x = joint.sum(1)
    p_t = p_x @ encoder
    encoder = encoder[:, p_t > 0]
    p_t = p_t[p_t > 0]
    given_x, given_t = joint / p_x[:, None], encoder.T @ joint / p_t[:, None]
    gaps = rel_entr(given_x[:, None], given_t).sum(2)  # [x, t]; inf where y cannot be
    logs = np.log(p_t) - beta * gaps
    return np.exp(logs - logsumexp(logs, axis=1, keepdims=True))


def both(joint, encoder) -> tuple[float, float]:
    """I(X; T) and I(T; Y) in nats of an encoder."""
    p_x = joint.sum(1, keepdims=True)
    return information(p_x * encoder), information(encoder.T @ joint)


def _united(joint, encoder):
    """Clusters of equal p(y | t) as one: less I(X; T), the same I(T; Y)."""
    given_t = encoder.T @ joint / (joint.sum(1) @ encoder)[:, None]
    which = np.unique(given_t.round(7), axis=0, return_inverse=True)[1].ravel()
    return encoder @ np.eye(which.max() + 1)[which]


def curve(
    joint: Float[np.ndarray, "x y"],
    betas: Float[np.ndarray, " b"],
    *,
    tolerance: float = 1e-9,
    steps: int = 5_000,
) -> Curve:
    """The curve at betas: annealed from the largest down, where T = X is the start.

    A beta ends when a step changes the encoder by less than `tolerance` anywhere. Near
    a beta where clusters merge the iteration is slow: after `steps` it is left where it
    is, above the least functional. Where the constant code is better it is taken: the
    iteration alone does not leave a Y that is a function of X. Between points the curve
    is concave; for such a Y it is the line min(I(X; T), H(Y)), and betas find its ends.

    Raises: ValueError unless joint is a table of probabilities and betas are above 0.

    >>> noisy = np.array([[0.4, 0.1], [0.1, 0.4]])
    >>> found = curve(noisy, np.array([0.5, 1000.0]))
    >>> found.t_y.round(4).tolist(), round(information(noisy), 4)
    ([0.0, 0.1927], 0.1927)
    """
    joint, betas = np.asarray(joint, np.float64), np.asarray(betas, np.float64)
    if joint.ndim != 2 or joint.min() < 0 or abs(joint.sum() - 1) > 1e-6:
        raise ValueError(
            f"joint: shape {joint.shape}, sum {joint.sum():g}, but it must be a table "
            "[x, y] of probabilities"
        )
    if betas.ndim != 1 or betas.size == 0 or betas.min() <= 0:
        raise ValueError("betas: they must be a row of numbers above 0")
    joint = merged(joint / joint.sum())
    encoder = np.eye(len(joint))
    found = np.empty((len(betas), 2))
    for place in np.argsort(-betas):
        for count in range(steps):
            after = step(joint, encoder, betas[place])
            same = after.shape == encoder.shape
            moved = np.abs(after - encoder).max() if same else np.inf
            encoder = after if count % 50 else _united(joint, after)
            if moved < tolerance:
                break
        x_t, t_y = both(joint, encoder)
        found[place] = (x_t, t_y) if x_t < betas[place] * t_y else (0.0, 0.0)
    return Curve(betas, *found.T)


def least_rate(
    of: Curve, t_y: Float[np.ndarray, " n"], whole: float
) -> Float[np.ndarray, " n"]:
    """The I(X; T) that any code with this I(T; Y) needs at least, nats.

    By the chords of the curve, (0, 0) and its largest point among them. Chords lie
    below a concave curve, so at a given I(T; Y) they ask for too much I(X; T), by the
    less the denser the betas. nan beyond the largest point within `whole` = I(X; Y).
    """
    order = np.argsort(of.t_y)
    ys = np.concatenate([[0.0], of.t_y[order]])
    xs = np.concatenate([[0.0], of.x_t[order]])
    asked = np.clip(np.asarray(t_y, np.float64), 0, None)
    found = np.interp(asked, ys, xs)
    return np.where(asked > max(ys[-1], whole) + 1e-9, np.nan, found)
