"""Banks of concepts nobody labelled (Oikarinen et al. 2023, arXiv:2304.06129).

A joint model of images and text gives how much each of n rows is like the name of each
concept. A direction c_k is sought in the frozen features whose projection rises and
falls over rows as that likeness does:

    max_c  sim(q, s) = (q^3 . s^3) / (|q^3| |s^3|),  q = standardised projections of c

(Sec. 3.2; s are likenesses, standardised; cubes let the rows that are most alike count
most.) A concept whose similarity on rows held out is low is not in the features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from . import contract
from .activation import Bank


class LabelFree(NamedTuple):
    bank: Bank  # concepts that were found; no levels, since no example was labelled
    similarity: dict[str, float]  # of every concept, on rows held out; at most 1


def similarity(a: Float[Array, "n k"], b: Float[Array, "n k"]) -> Float[Array, " k"]:
    """cos of the cubes of standardised columns, in [-1, 1]."""

    def cubes(values):
        z = (values - values.mean(0)) / jnp.maximum(values.std(0), 1e-9)
        z = z**3
        return z / jnp.maximum(jnp.linalg.norm(z, axis=0), 1e-9)

    return jnp.sum(cubes(a) * cubes(b), 0)


def bank_from_similarity(
    names: Sequence[str],
    x,
    likeness,
    *,
    least: float = 0.45,
    held_out: float = 0.2,
    steps: int = 500,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> LabelFree:
    """Directions for names from features x [n, d] and likeness [n, k] alone.

    least: concepts of less similarity on the rows held out (this share, by seed) leave
        the bank (0.45 in the paper, Sec. 3.2).
    All directions are sought at once by Adam; each keeps the step that was best on the
    rows held out. Intercepts put the mean projection at 0.
    Raises ValueError for shapes that do not fit, or where no concept is left.
    """
    names = contract.checked_names(names)
    x, likeness = np.asarray(x, np.float32), np.asarray(likeness, np.float32)
    if x.ndim != 2 or likeness.shape != (len(x), len(names)):
        raise ValueError(
            f"likeness: shape {likeness.shape}, but {len(x)} rows of {len(names)} "
            "names are needed"
        )
    if not 0 < held_out < 1 or min(held_out, 1 - held_out) * len(x) < 4:
        raise ValueError(
            f"held_out: {held_out} of {len(x)} rows, but both parts need 4 rows"
        )
    order = np.random.default_rng(seed).permutation(len(x))
    test, learn = np.split(order, [int(held_out * len(x))])
    centre, scale = x[learn].mean(0), np.maximum(x[learn].std(0), 1e-9)
    z = jnp.asarray((x - centre) / scale)
    start = z[learn].T @ jnp.asarray(likeness[learn] - likeness[learn].mean(0))
    start = start / jnp.maximum(jnp.linalg.norm(start, axis=0), 1e-9)
    directions, found = _search(
        *(start, z[learn], likeness[learn], z[test], likeness[test]),
        steps=steps,
        learning_rate=learning_rate,
    )
    keep = np.asarray(found) >= least
    said = {name: float(value) for name, value in zip(names, found, strict=True)}
    if not keep.any():
        raise ValueError(f"likeness: no concept reaches least={least}; found {said}")
    directions = (np.asarray(directions) / scale[:, None]).T[keep]
    bank = Bank(
        tuple(name for name, kept in zip(names, keep, strict=True) if kept),
        jnp.asarray(directions),
        jnp.asarray(-directions @ centre),
        None,
    )
    return LabelFree(bank, said)


def _search(start, x, likeness, held_x, held_likeness, *, steps, learning_rate):
    tx = optax.adam(learning_rate)

    def step(carry, _):
        c, state, best, kept = carry
        now = similarity(held_x @ c, held_likeness)
        kept = jnp.where(now > best, c, kept)
        gradient = jax.grad(lambda c: -similarity(x @ c, likeness).sum())(c)
        updates, state = tx.update(gradient, state)
        return (
            (optax.apply_updates(c, updates), state, jnp.maximum(now, best), kept),
            None,
        )

    @jax.jit
    def run(start):
        nothing = jnp.full(start.shape[1], -jnp.inf)
        carry = (start, tx.init(start), nothing, start)
        (_, _, best, kept), _ = jax.lax.scan(step, carry, None, steps)
        return kept, best

    return run(start)
