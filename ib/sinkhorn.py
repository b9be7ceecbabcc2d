"""Sinkhorn's scalings with absorbed potentials: block coordinate ascent on the dual.

Cuturi 2013 (arXiv:1306.0895); absorption and the log domain, Schmitzer 2019
(arXiv:1610.06519).  The public door is `transport.solve`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

INNER = 10  # scalings on one evaluation of the plan
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
    error: Float[Array, ""]  # see `marginal_error`; inf where not known
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


def centred(p: Problem, x, y):
    """The same plan with potentials of one mean: small numbers round least."""
    shift = (p.r @ x - p.c @ y) / (2 * p.r.sum())
    return jnp.where(p.r > 0, x - shift, 0), jnp.where(p.c > 0, y + shift, 0)


def step(p: Problem, x, y):
    """Scales the rows, then the columns, in the log domain: always finite.

    arXiv:2401.12253, Algorithm 1, lines 3-5.  x is not read: y decides it.
    """
    rows = jnp.log(p.r) - logsumexp(p.eta * (y - p.cost), axis=1)
    x = jnp.where(p.r > 0, rows / p.eta, 0)
    columns = jnp.log(p.c) - logsumexp(p.eta * (x[:, None] - p.cost), axis=0)
    return x, jnp.where(p.c > 0, columns / p.eta, 0)


def absorbed(p: Problem, x, y, count, relaxation):
    """`count` scalings on one evaluation of the plan; x, y and the error after them.

    K = plan_of(x, y) takes the potentials in, and u, v near 1 are all that is left: a
    scaling is two products in place of two log-sum-exps.  Not finite where K lost a
    whole row or column to underflow, or where u or v left the range of the dtype.
    """
    k = plan_of(p, x, y)

    def body(_, uv):
        u, v = uv
        u *= jnp.where(p.r > 0, p.r / (u * (k @ v)), 1) ** relaxation
        v *= jnp.where(p.c > 0, p.c / (v * (u @ k)), 1) ** relaxation
        return u, v

    u, v = lax.fori_loop(0, count, body, (jnp.ones_like(x), jnp.ones_like(y)))
    error = marginal_error(p, u * (k @ v), v * (u @ k))
    x, y = centred(p, x + jnp.log(u) / p.eta, y + jnp.log(v) / p.eta)
    return x, y, error


def scale(p: Problem, x, y, *, tol, max_steps, halvings, relaxation) -> Scaled:
    """Scalings in blocks of `INNER` until the error is at most `tol`.

    eta rises by `halvings` doublings over the first 70 % of max_steps.  The options may
    be traced: one program serves them all.
    """
    ramp = jnp.where(halvings > 0, RAMP * max_steps, 0).astype(x.dtype)
    unknown = jnp.array(jnp.inf, x.dtype)

    def wrong(s: Scaled):
        return (s.error > tol) & (s.steps < max_steps)

    def body(s: Scaled):
        left = jnp.where(s.steps < ramp, 1 - s.steps / jnp.maximum(ramp, 1), 0)
        now = p._replace(eta=p.eta * jnp.exp2(-halvings * left))
        count = jnp.minimum(INNER, max_steps - s.steps)
        x, y, error = absorbed(now, s.x, s.y, count, relaxation)
        error = jnp.where(left > 0, unknown, error)
        fine = jnp.isfinite(x).all() & jnp.isfinite(y).all()
        return lax.cond(
            fine,
            lambda: Scaled(x, y, error, s.steps + count),
            lambda: Scaled(*step(now, s.x, s.y), unknown, s.steps + 1),
        )

    start = Scaled(x, y, unknown, jnp.array(0, jnp.int32))
    return lax.while_loop(wrong, body, start)
