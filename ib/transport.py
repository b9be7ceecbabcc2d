"""Entropic optimal transport: potentials, plan and value, with exact derivatives.

    W(C, r, c) = min_{P 1 = r, P^T 1 = c} <C, P> + (1/eta) sum P log P
               = max_{x, y} r.x + c.y - (1/eta) (sum P - mass),
    P_ij = exp(eta (x_i + y_j - C_ij))

`solve` is the door.  Its methods: "sinkhorn" (Cuturi 2013, arXiv:1306.0895) and "sns",
Sinkhorn-Newton-Sparse (Tang et al., ICLR 2024, arXiv:2401.12253).

    with jax.enable_x64(True):
        t = solve(cost, r, c, eta=1200.0)
    t.value, t.converged, plan(cost, t.x, t.y, eta=1200.0)
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import zero_from_primal
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float, Int

from .sinkhorn import marginal_error, plan_of, problem, scale
from .sinkhorn_newton import newton, scaled

MILD = 8.0  # eta times the range of the cost from where an annealed run begins


class Transport(NamedTuple):
    """Potentials and how they were found; dtype of the cost, at least float32."""

    x: Float[Array, " n"]  # units of cost; -inf, the exact limit, at a bin of no mass
    y: Float[Array, " m"]
    value: Float[Array, ""]  # W: units of cost times units of mass
    error: Float[Array, ""]  # (|P 1 - r|_1 + |P^T 1 - c|_1) / mass
    converged: Bool[Array, ""]  # error <= tol
    sinkhorn_steps: Int[Array, ""]
    newton_steps: Int[Array, ""]
    cg_steps: Int[Array, ""]
    nnz: Int[Array, ""]  # entries of the plan kept in the last Newton step


class Limits(NamedTuple):
    """What may change without compiling anew; the numbers of `solve`'s options."""

    tol: Float[Array, ""]
    scalings: Int[Array, ""]
    halvings: Float[Array, ""]
    relaxation: Float[Array, ""]
    newton: Int[Array, ""]
    cg: Int[Array, ""]
    delta: Float[Array, ""]


def plan(
    cost: Float[Array, "n m"], x: Float[Array, " n"], y: Float[Array, " m"], *, eta
) -> Float[Array, "n m"]:
    """P_ij = exp(eta (x_i + y_j - C_ij)) of the potentials of a `Transport`."""
    return jnp.exp(eta * (x[:, None] + y - cost))


def sinkhorn(
    cost: Float[Array, "n m"],
    r: Float[Array, " n"],
    c: Float[Array, " m"],
    *,
    eta,
    tol: float | None = None,
    max_steps: int = 10_000,
    halvings: float | None = 0,
    relaxation: float = 1.0,
) -> Transport:
    """Stabilised Sinkhorn: best where 1/eta is large or a per cent is near enough.

    Args, beyond those of `solve`:
        max_steps: scalings of rows and columns, in blocks of ten.
        halvings: doublings of eta over the first 70 % of `max_steps`; None begins where
            eta (max C - min C) is 8.
        relaxation: exponent of a scaling, in [1, 2).  Above 1 it is often faster, and
            may diverge (Thibault et al. 2021, arXiv:1711.01851).
    """
    cost, r, c, eta, tol = _checked(cost, r, c, eta, tol)
    _at_least(max_steps=(max_steps, 1), halvings=(halvings or 0, 0))
    if not 1 <= relaxation < 2:
        raise ValueError(f"relaxation={relaxation} must lie in [1, 2)")
    limits = _limits(cost, eta, tol, max_steps, halvings, relaxation, 0, 0, 0)
    return _transport(None, limits, cost, r, c, eta)


def sinkhorn_newton_sparse(
    cost: Float[Array, "n m"],
    r: Float[Array, " n"],
    c: Float[Array, " m"],
    *,
    eta,
    tol: float | None = None,
    lam: float | Literal["mass"] = "mass",
    delta: float = 1e-3,
    warmup: int = 50,
    halvings: float | None = None,
    max_steps: int = 100,
    max_cg: int = 1000,
) -> Transport:
    """`warmup` scalings, then at most `max_steps` sparse Newton steps.

    A Newton step costs one evaluation of the plan for each trial of its line search,
    one compression of it, and products with the kept entries.

    Args, beyond those of `solve`:
        lam: the share of the plan's entries that stay in the Hessian (the paper takes
            2/n to 15/n), or "mass": as many as it takes that no row or column drops
            `delta` of its mass, and all of them where an eighth does not suffice.
        halvings: doublings of eta over the first 70 % of the warm-up; None begins where
            eta (max C - min C) is 8, and 0 is the paper's warm-up.
        max_cg: conjugate-gradient steps in one Newton step.
    """
    cost, r, c, eta, tol = _checked(cost, r, c, eta, tol)
    _at_least(warmup=(warmup, 1), halvings=(halvings or 0, 0))
    _at_least(max_steps=(max_steps, 0), max_cg=(max_cg, 1))
    if lam != "mass" and not (isinstance(lam, (int, float)) and 0 < lam <= 1):
        raise ValueError(
            f'lam={lam!r}: give "mass" or the share of entries to keep, in (0, 1]'
        )
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} must lie between 0 and 1")
    limits = _limits(cost, eta, tol, warmup, halvings, 1, max_steps, max_cg, delta)
    return _transport(lam, limits, cost, r, c, eta)


METHODS = {"sinkhorn": sinkhorn, "sns": sinkhorn_newton_sparse}


def solve(
    cost: Float[Array, "n m"],
    r: Float[Array, " n"],
    c: Float[Array, " m"],
    *,
    eta,
    method: str = "sns",
    **options,
) -> Transport:
    """Entropic optimal transport between r and c, jit-compiled.

    The value differentiates by the envelope theorem (dW/dC = P, dW/dr = x, dW/dc = y,
    0 at bins of no mass), the potentials by the implicit function theorem; both to any
    order, and in eta.  Derivatives in r and c hold along changes that keep the masses
    equal; the potentials are fixed up to (x + s, y - s).

    Args:
        cost: finite; its dtype is the result's (half precision is raised to float32).
        r, c: non-negative, of one mass, which need not be 1.
        eta: inverse temperature, positive, in 1 / units of cost; may be traced.
        method: "sinkhorn" or "sns", whose functions list the options.
        tol (in options): on `Transport.error`; default 1e-6 in float32, 1e-12 in
            float64.  Rounding leaves an error of about eps eta max |x|: for 1e-12 call
            under `jax.enable_x64(True)` with float64 arrays.

    Raises ValueError for what it cannot take.  Values are looked at only outside jit;
    inside, a bad value ends in `converged` False.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: give one of {', '.join(METHODS)}")
    return METHODS[method](cost, r, c, eta=eta, **options)


@functools.partial(jax.jit, static_argnums=0)
def _transport(lam, limits, cost, r, c, eta) -> Transport:
    found = _potentials(lam, limits, cost, r, c, eta)
    return found._replace(value=_value(found.x, found.y, cost, r, c, eta))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@jax.default_matmul_precision("highest")  # some accelerators round products to bfloat16
def _potentials(lam, limits, cost, r, c, eta) -> Transport:
    """`lam` None: scalings alone."""
    p = problem(cost, r, c, eta)
    s = scale(
        p,
        jnp.zeros_like(r),
        jnp.zeros_like(c),
        tol=limits.tol,
        max_steps=limits.scalings,
        halvings=limits.halvings,
        relaxation=limits.relaxation,
    )
    x, y, newton_steps, cg_steps, nnz = s.x, s.y, *jnp.zeros(3, jnp.int32)
    if lam is not None:
        z = newton(
            p,
            x,
            y,
            tol=limits.tol,
            max_steps=limits.newton,
            max_cg=limits.cg,
            lam=lam,
            delta=limits.delta,
        )
        x, y, newton_steps, cg_steps, nnz = z.x, z.y, z.steps, z.cg_steps, z.nnz
    last = plan_of(p, x, y)
    error = marginal_error(p, last.sum(1), last.sum(0))
    x, y = jnp.where(r > 0, x, -jnp.inf), jnp.where(c > 0, y, -jnp.inf)
    return Transport(
        x,
        y,
        jnp.zeros_like(error),
        error,
        error <= limits.tol,
        s.steps,
        newton_steps,
        cg_steps,
        nnz,
    )


@_potentials.defjvp
@jax.default_matmul_precision("highest")
def _implicit(lam, primals, tangents):
    """eta [[D, P], [P^T, E]] (dx, dy) = what dC, dr, dc and deta leave unpaid."""
    _, cost, _, c, eta = primals
    _, dcost, dr, dc, deta = tangents
    found = _potentials(lam, *primals)
    p = plan(cost, found.x, found.y, eta=eta)
    d, e = p.sum(1), p.sum(0)
    x, y = _finite(found.x), _finite(found.y)
    moved = p * (deta * (x[:, None] + y - cost) - eta * dcost)
    half_d, half_e = (jnp.where(t > 0, jnp.sqrt(t), 1) for t in (d, e))
    b = scaled(p, d, e)
    bx = jnp.where(d > 0, (dr - moved.sum(1)) / (eta * half_d), 0)
    by = jnp.where(e > 0, (dc - moved.sum(0)) / (eta * half_e), 0)
    null = jnp.sqrt(e) / jnp.linalg.norm(jnp.sqrt(e))

    def project(v):
        return v - null * (null @ v)

    def product(v):  # the Schur complement of `sinkhorn_newton.direction`, dense
        return project(v - (b @ v) @ b) + null * (null @ v)

    # Not `cg` alone: its own rule cannot be transposed (jax 0.10.2).
    tol = float(jnp.finfo(cost.dtype).eps ** 0.75)
    v = lax.custom_linear_solve(
        product,
        project(by - bx @ b),
        lambda a, rhs: cg(a, rhs, tol=tol, maxiter=10 * c.size)[0],
        symmetric=True,
    )
    dx = jnp.where(d > 0, (bx - b @ v) / half_d, 0)
    dy = jnp.where(e > 0, v / half_e, 0)
    still = jax.tree.map(zero_from_primal, found)
    return found, still._replace(x=dx, y=dy)


@jax.custom_jvp
def _value(x, y, cost, r, c, eta):
    mass = r.sum()
    total = plan(cost, x, y, eta=eta).sum()
    return r @ _finite(x) + c @ _finite(y) - (total - mass) / eta


@_value.defjvp
def _envelope(primals, tangents):
    """At the optimum the value does not move with the potentials."""
    x, y, cost, _, _, eta = primals
    _, _, dcost, dr, dc, deta = tangents
    p = plan(cost, x, y, eta=eta)
    fx, fy = _finite(x), _finite(y)
    entropy = jnp.sum(p * (fx[:, None] + fy - cost)) * eta  # sum P log P
    slope = jnp.sum(p * dcost) + fx @ dr + fy @ dc - entropy / eta**2 * deta
    return _value(*primals), slope


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _checked(cost, r, c, eta, tol):
    cost = jnp.asarray(cost)
    dtype = jnp.promote_types(cost.dtype, jnp.float32)
    cost = cost.astype(dtype)
    r, c, eta = (jnp.asarray(a, dtype) for a in (r, c, eta))
    if cost.ndim != 2 or (r.shape, c.shape) != (cost.shape[:1], cost.shape[1:]):
        raise ValueError(
            f"cost, r and c have shapes {cost.shape}, {r.shape} and {c.shape}: "
            "give (n, m), (n,) and (m,)"
        )
    if eta.ndim:
        raise ValueError(f"eta has shape {eta.shape}: give one number")
    eps = float(jnp.finfo(dtype).eps)
    if tol is None:
        tol = 1e-12 if dtype == jnp.float64 else 1e-6
    if not tol >= 4 * eps:
        raise ValueError(
            f"tol={tol} is below what {dtype} can hold ({4 * eps:.1e}): raise tol, or "
            "give float64 arrays under jax.enable_x64(True)"
        )
    if not any(isinstance(a, Tracer) for a in (cost, r, c, eta)):
        _check_values(np.asarray(cost), np.asarray(r), np.asarray(c), float(eta), tol)
    return cost, r, c, eta, float(tol)


def _check_values(cost, r, c, eta, tol):
    if not (np.isfinite(eta) and eta > 0):
        raise ValueError(f"eta={eta} must be positive and finite")
    for name, a in {"cost": cost, "r": r, "c": c}.items():
        if not np.isfinite(a).all():
            count = int((~np.isfinite(a)).sum())
            raise ValueError(f"{name} holds {count} entries that are NaN or infinite")
    for name, a in {"r": r, "c": c}.items():
        if (a < 0).any() or not a.any():
            raise ValueError(
                f"{name} must hold masses: its smallest is {a.min()}, its sum {a.sum()}"
            )
    if abs(r.sum() - c.sum()) > tol * r.sum():
        raise ValueError(
            f"r sums to {r.sum()} and c to {c.sum()}: no plan has both marginals; "
            f"scale one so that they agree within tol={tol}"
        )


def _limits(cost, eta, tol, scalings, halvings, relaxation, newton, cg, delta):
    if halvings is None:
        halvings = jnp.maximum(0, jnp.log2(eta * jnp.ptp(cost) / MILD))
    tol, halvings, relaxation, delta = (
        jnp.asarray(a, cost.dtype) for a in (tol, halvings, relaxation, delta)
    )
    scalings, newton, cg = (jnp.asarray(a, jnp.int32) for a in (scalings, newton, cg))
    return Limits(tol, scalings, halvings, relaxation, newton, cg, delta)


def _at_least(**bounds):
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
