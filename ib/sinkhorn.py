"""Sinkhorn's scalings in the log domain: block coordinate ascent on the dual.

Cuturi 2013 (arXiv:1306.0895); in the log domain Schmitzer 2019 (arXiv:1610.06519).
The public door is `transport.solve`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

RAMP = 0.7  # share of the steps over which an annealed run reaches its eta


class Problem(NamedTuple):
    """min <C, P> + (1/eta) sum P log P over plans P >= 0 with P 1 = r, P^T 1 = c.

    P_ij = exp(eta (x_i + y_j - C_ij)) at the optimum.  The paper's exp(... - 1) is the
    same plan with x lower by 1/eta; without it the dual value is r.x + c.y.
    """

    cost: Float[Array, "n m"]  # +inf along bins of no mass: their entries are exact 0
    r: Float[Array, " n"]
    c: Float[Array, " m"]
    eta: Float[Array, ""]  # in 1 / units of cost


class Scaled(NamedTuple):
    x: Float[Array, " n"]  # potentials, in units of cost; 0 at bins of no mass
    y: Float[Array, " m"]
    error: Float[Array, ""]  # before the last step, see `marginal_error`
    steps: Int[Array, ""]


def problem(cost, r, c, eta) -> Problem:
    """Drops the bins of no mass without a change of shape: log 0 never enters."""
    kept = (r > 0)[:, None] & (c > 0)
    return Problem(jnp.where(kept, cost, jnp.inf), r, c, eta)


def plan_of(p: Problem, x, y) -> Float[Array, "n m"]:
    return jnp.exp(p.eta * (x[:, None] + y - p.cost))


def marginal_error(p: Problem, rows, columns) -> Float[Array, ""]:
    """(|P 1 - r|_1 + |P^T 1 - c|_1) / mass."""
    wrong = jnp.abs(rows - p.r).sum() + jnp.abs(columns - p.c).sum()
    return wrong / p.r.sum()


def step(p: Problem, x, y):
    """Scales the rows, then the columns (arXiv:2401.12253, Algorithm 1, lines 3-5).

    Returns x, y and the error before the step, provided the columns were exact then.
    """
    rows = jnp.log(p.r) - logsumexp(p.eta * (y - p.cost), axis=1)
    new = jnp.where(p.r > 0, rows / p.eta, 0)
    # P 1 was r exp(eta (x - new)).
    error = jnp.sum(p.r * jnp.abs(jnp.expm1(p.eta * (x - new)))) / p.r.sum()
    columns = jnp.log(p.c) - logsumexp(p.eta * (new[:, None] - p.cost), axis=0)
    return new, jnp.where(p.c > 0, columns / p.eta, 0), error


def scale(p: Problem, x, y, *, tol, max_steps, halvings=0) -> Scaled:
    """Steps until the error is at most `tol`; two log-sum-exps of n m entries each.

    With `halvings` > 0 eta rises by as many doublings over the first 70 % of max_steps.
    """
    ramp = RAMP * max_steps if halvings else 0

    def wrong(s: Scaled):
        return (s.error > tol) & (s.steps < max_steps)

    def body(s: Scaled):
        left = jnp.maximum(0, 1 - s.steps / max(ramp, 1)).astype(p.eta.dtype)
        eta = p.eta * 2 ** (-halvings * left)
        x, y, error = step(p._replace(eta=eta), s.x, s.y)
        # Of an annealed eta, or of a y that no step has fitted, the error says nothing.
        error = jnp.where(s.steps > ramp, error, jnp.inf)
        return Scaled(x, y, error, s.steps + 1)

    start = Scaled(x, y, jnp.array(jnp.inf, x.dtype), jnp.array(0, jnp.int32))
    return lax.while_loop(wrong, body, start)
