"""Sinkhorn-Newton-Sparse: Newton's method on a sparsified dual Hessian.

Tang et al., ICLR 2024 (arXiv:2401.12253), Algorithm 1.  Near the optimum of a sharp
problem few entries of the plan matter, so the negative Hessian of the dual

    eta [[diag(P 1), P], [P^T, diag(P^T 1)]]

is a diagonal and a sparse block.  Entries are dropped from P only; the diagonal keeps
the full sums, so what is left stays diagonally dominant.  The public door is
`transport.solve`; `direction` is the linear algebra, `newton` the iteration.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .sinkhorn import Problem, marginal_error, plan_of, step

CLIP = (
    30.0  # largest |eta dz| tried: an entry grows by at most exp(60), also in float32
)
ARMIJO = 1e-4
WOLFE = 0.1
SHORTEST = 2.0**-10  # fraction of a direction below which a scaling goes instead
DAMPING = 1e-3  # first Levenberg-Marquardt damping, as a share of the diagonal
IDLE = 10  # steps of no use after which the iteration gives up


class Sparse(NamedTuple):
    """The kept entries of an n x m matrix in row order, padded with zeros."""

    row: Int[Array, " nnz"]
    column: Int[Array, " nnz"]
    value: Float[Array, " nnz"]


class Newton(NamedTuple):
    x: Float[Array, " n"]
    y: Float[Array, " m"]
    plan: Float[Array, "n m"]
    error: Float[Array, ""]
    damping: Float[Array, ""]
    steps: Int[Array, ""]
    cg_steps: Int[Array, ""]
    nnz: Int[Array, ""]  # kept entries of the last step
    idle: Int[Array, ""]  # steps the search gave up, or that rounding ate


def rungs(n: int, m: int, lam) -> tuple[int, ...]:
    """Static capacities: one for a number `lam`; by fours for "mass", then dense."""
    if lam != "mass":
        return (max(1, round(lam * n * m)),)
    capacity, ladder = 4 * (n + m), []
    while 8 * capacity <= n * m:
        ladder.append(capacity)
        capacity *= 4
    return tuple(ladder)


def largest(score: Float[Array, "n m"], capacity: int) -> Float[Array, ""]:
    """A level that at most `capacity` scores reach, within 3 % of the lowest such one.

    Sixteen counts instead of a sort: a sort of n^2 entries costs more than the step.
    """
    tiny = jnp.finfo(score.dtype).tiny

    def halve(_, ends):
        low, high = ends
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        fits = jnp.sum(score >= middle) <= capacity
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ends = (jnp.array(tiny, score.dtype), 2 * jnp.maximum(score.max(), tiny))
    return lax.fori_loop(0, 16, halve, ends)[1]


def compress(matrix: Float[Array, "n m"], kept, capacity: int) -> Sparse:
    """The entries where `kept`, at most `capacity`.

    `jnp.nonzero` sums over all n m flags; here 32 flags are one word, only words are
    summed, and a slot finds its bit by five halvings of its word.
    """
    n, m = matrix.shape
    flags = jnp.pad(kept.ravel(), (0, -n * m % 32)).reshape(-1, 32)
    words = jnp.sum(flags.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), 1)
    words = words.astype(jnp.uint32)
    ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32))
    slot = jnp.arange(capacity, dtype=jnp.int32)
    at = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), words.size - 1)
    word = words[at]
    rank = slot - ends[at] + lax.population_count(word).astype(jnp.int32)
    bit = jnp.zeros_like(slot)
    for width in (16, 8, 4, 2, 1):
        low = lax.population_count(word & jnp.uint32(2**width - 1)).astype(jnp.int32)
        above = rank >= low
        rank = jnp.where(above, rank - low, rank)
        word = jnp.where(above, word >> width, word)
        bit = jnp.where(above, bit + width, bit)
    filled = slot < ends[-1]
    row, column = jnp.divmod(jnp.where(filled, 32 * at + bit, n * m - 1), m)
    return Sparse(row, column, jnp.where(filled, matrix[row, column], 0))


def times(a, v: Float[Array, " m"], n: int) -> Float[Array, " n"]:
    if not isinstance(a, Sparse):
        return a @ v
    parts = a.value * v[a.column]
    return jax.ops.segment_sum(parts, a.row, n, indices_are_sorted=True)


def transposed_times(a, u: Float[Array, " n"], m: int) -> Float[Array, " m"]:
    if not isinstance(a, Sparse):
        return u @ a
    return jax.ops.segment_sum(a.value * u[a.row], a.column, m)


def scaled(p, d, e):
    """B = diag(d)^-1/2 P diag(e)^-1/2, for a dense or a `Sparse` P; 0 / 0 is 0."""
    d, e = (jnp.where(t > 0, lax.rsqrt(t), 0) for t in (d, e))
    if isinstance(p, Sparse):
        return p._replace(value=p.value * d[p.row] * e[p.column])
    return p * d[:, None] * e


def direction(b, d, e, gx, gy, damping, *, rtol, max_steps):
    """Solves [[D, P], [P^T, E]] (dx, dy) = (gx, gy), its diagonal times 1 + damping.

    `b` is P scaled by the diagonals (`scaled`): Jacobi's preconditioner.  dx is
    eliminated, which halves the number of conjugate-gradient steps: they run on
    (1 + t) I - B^T B / (1 + t).  Its null vector at t = 0, sqrt(e), is the shift
    (1, -1) of the potentials and is projected out of every product.
    Returns dx, dy and the number of products with B^T B.
    """
    half_d, half_e = jnp.sqrt(d), jnp.sqrt(e)
    t = 1 + damping
    bx = jnp.where(d > 0, gx / half_d, 0)
    by = jnp.where(e > 0, gy / half_e, 0)
    null = half_e / jnp.linalg.norm(half_e)

    def project(v):
        return v - null * (null @ v)

    def product(v):
        return project(t * v - transposed_times(b, times(b, v, d.size), e.size) / t)

    def body(state):
        v, residual, p, square, k = state
        ap = product(p)
        curvature = p @ ap
        # Curvature lost to rounding: what is left of the residual is noise.
        lost = curvature <= 0
        length = jnp.where(lost, 0, square / curvature)
        v, residual = v + length * p, residual - length * ap
        new = residual @ residual
        return v, residual, residual + new / square * p, jnp.where(lost, 0, new), k + 1

    rhs = project(by - transposed_times(b, bx, e.size) / t)
    square = rhs @ rhs
    state = (jnp.zeros_like(rhs), rhs, rhs, square, jnp.array(0, jnp.int32))
    v, *_, k = lax.while_loop(
        lambda s: (s[3] > rtol**2 * square) & (s[4] < max_steps), body, state
    )
    u = (bx - times(b, v, d.size)) / t
    dx = jnp.where(d > 0, u / half_d, 0)
    return dx, jnp.where(e > 0, v / half_e, 0), k


def sparse_direction(p: Problem, s: Newton, *, lam, delta, max_cg):
    """The damped Newton direction of the sparsified Hessian, its CG steps and nnz.

    A number `lam` keeps the lam n m largest entries.  "mass" keeps P_ij >= delta
    min(r_i / m, c_j / n), so that no row loses delta r_i and no column delta c_j.
    """
    n, m = s.plan.shape
    d, e = s.plan.sum(1), s.plan.sum(0)
    ladder = rungs(n, m, lam)
    if lam == "mass":
        level = delta * jnp.minimum(p.r[:, None] / m, p.c / n)
    else:
        level = largest(s.plan, ladder[0])
    kept = (s.plan >= level) & (s.plan > 0)
    nnz = kept.sum().astype(jnp.int32)
    rtol = jnp.clip(
        jnp.sqrt(s.error), 1e-10, 0.1
    )  # forcing: superlinear, cheap far off
    damping = jnp.minimum(s.damping, s.error)

    def solve(capacity):
        entries = compress(s.plan, kept, capacity) if capacity else s.plan
        return direction(
            scaled(entries, d, e),
            d,
            e,
            (p.r - d) / p.eta,
            (p.c - e) / p.eta,
            damping,
            rtol=rtol,
            max_steps=max_cg,
        )

    capacities = (*ladder, None) if lam == "mass" else ladder
    rung = sum((nnz > k).astype(jnp.int32) for k in capacities[:-1])
    branches = [functools.partial(solve, k) for k in capacities]
    if len(branches) == 1:
        return *branches[0](), nnz
    return *lax.switch(rung, branches), nnz


def search(p: Problem, s: Newton, dx, dy):
    """Halves a step until the dual rises; overflow does not.

    Close to the optimum the rise drowns in rounding: there the slope decides (Hager and
    Zhang 2005, SIAM J. Optim. 16, Eq. 4.1).  One evaluation of the plan per trial.
    """

    def value(x, y, plan):
        return p.r @ x + p.c @ y - plan.sum() / p.eta

    now = value(s.x, s.y, s.plan)
    slope = (p.r - s.plan.sum(1)) @ dx + (p.c - s.plan.sum(0)) @ dy
    size = p.r @ jnp.abs(s.x) + p.c @ jnp.abs(s.y) + p.r.sum() / p.eta
    slack = 4 * jnp.finfo(s.x.dtype).eps * size
    flat = slope < slack

    def trial(length):
        x, y = s.x + length * dx, s.y + length * dy
        plan = plan_of(p, x, y)
        rows, columns = plan.sum(1), plan.sum(0)
        then = value(x, y, plan)
        slope_then = (p.r - rows) @ dx + (p.c - columns) @ dy
        rises = then >= now + ARMIJO * length * slope
        even = (then >= now - slack) & (slope_then >= -(1 - 2 * WOLFE) * slope)
        good = jnp.isfinite(then) & (rises | even)
        return x, y, plan, marginal_error(p, rows, columns), length, flat, good

    longest = p.eta * jnp.maximum(jnp.abs(dx).max(), jnp.abs(dy).max())
    length = jnp.minimum(1, CLIP / longest)
    # The first trial halves this one, so that `trial` is compiled once.
    start = (s.x, s.y, s.plan, s.error, 2 * length, flat, jnp.array(False))
    return lax.while_loop(
        lambda t: ~t[6] & (t[4] > SHORTEST), lambda t: trial(t[4] / 2), start
    )


def newton(p: Problem, x, y, *, tol, max_steps, **sparsity) -> Newton:
    """Newton steps from (x, y) until the marginal error is at most `tol`."""

    def at(x, y):
        plan = plan_of(p, x, y)
        return x, y, plan, marginal_error(p, plan.sum(1), plan.sum(0))

    def wrong(s: Newton):
        return (s.error > tol) & (s.steps < max_steps) & (s.idle < IDLE)

    def body(s: Newton):
        dx, dy, cg_steps, nnz = sparse_direction(p, s, **sparsity)
        *moved, length, flat, good = search(p, s, dx, dy)
        x, y, plan, error = lax.cond(
            good, lambda: tuple(moved), lambda: at(*step(p, s.x, s.y))
        )
        full = jnp.where(length == 1, s.damping / 10, s.damping)
        damping = jnp.where(good, full, jnp.maximum(10 * s.damping, DAMPING))
        return Newton(
            x,
            y,
            plan,
            error,
            damping,
            s.steps + 1,
            s.cg_steps + cg_steps,
            nnz,
            s.idle + (~good | (flat & (error > s.error / 2))),
        )

    zero = jnp.array(0, jnp.int32)
    start = Newton(*at(x, y), jnp.array(DAMPING, x.dtype), zero, zero, zero, zero)
    return lax.while_loop(wrong, body, start)
