"""When to freeze the second moment: at a given step, or once it has settled.

Tang et al. 2021, arXiv:2102.02888, Sec. 7.1: compression starts when the norm of the
second moment has stopped to change over 1 / (1 - b2) steps, its own memory. All is
decided inside the compiled step, from arrays that are equal on all workers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree


class Switch(NamedTuple):
    frozen_at: Int[Array, ""]  # updates made with a moving second moment; -1: it moves
    norm: Float[Array, ""]  # float32, |v|_1 at the last look
    change: Float[Array, ""]  # float32, relative to the look before; inf before two


def init_switch() -> Switch:
    return Switch(jnp.int32(-1), jnp.float32(0), jnp.float32(jnp.inf))


def is_frozen(switch: Switch) -> Bool[Array, ""]:
    return switch.frozen_at >= 0


def look(
    switch: Switch,
    count: Int[Array, ""],
    moment: PyTree,
    *,
    freeze_step: int | None,
    decay: float,
    tolerance: float,
    earliest: int,
) -> Switch:
    """The switch after update `count`, whose second moment (unbiased) is `moment`.

    freeze_step: freeze after so many updates. None: at the first look, every
    1 / (1 - decay) updates from `earliest` on (where the learning rate's warm-up ends),
    at which |v|_1 differs by less than `tolerance`, relatively, from the look before.
    """
    if freeze_step is not None:
        frozen_at = jnp.where(count >= freeze_step, count, switch.frozen_at)
        return switch._replace(frozen_at=frozen_at)
    every = math.ceil(1 / (1 - decay) - 1e-6)
    norm = optax.tree.norm(moment, ord=1).astype(jnp.float32)
    change = jnp.abs(norm - switch.norm) / switch.norm  # inf or nan at first: not below
    looked = Switch(
        jnp.where((change < tolerance) & (switch.norm > 0), count, -1), norm, change
    )
    due = (count >= earliest) & (count % every == 0)
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), looked, switch)
