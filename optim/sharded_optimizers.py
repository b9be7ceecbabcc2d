"""1-bit Adam and compressed SGD over shards: see `sharded`.

As in Tang et al. 2021, arXiv:2102.02888, Algorithm 1, v freezes and then one bit an
entry travels. What is sent is the gradient, since a worker does not hold the whole
momentum; that is linear in the gradient, so feedback cancels its errors there too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int

from .compressed_mean import Way
from .compressed_sgd import FOUR_BITS
from .one_bit_adam import ONE_BIT, root
from .quantizers import blocks
from .sharded import sharded
from .signs import sign
from .switch import Switch, init_switch, is_frozen, look

ONE_BIT_DOWN = Way("ef21", sign())
FOUR_BITS_DOWN = Way("ef21", blocks(4, block=32))


class SettlingAdamState(NamedTuple):
    count: Int[Array, ""]
    mu: optax.Updates
    nu: optax.Updates
    switch: Switch


def scale_by_settling_adam(
    *,
    axis_name: str = "fsdp",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    floor: float = 0.01,
    freeze_step: int | None = None,
    tolerance: float = 0.04,
    earliest: int = 0,
) -> optax.GradientTransformation:
    """Adam on chunks whose second moment freezes; options as in `one_bit_adam`."""
    adam: Any = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params):
        start = adam.init(params)
        return SettlingAdamState(start.count, start.mu, start.nu, init_switch())

    def moving(grads, state: SettlingAdamState):
        updates, new = adam.update(grads, optax.ScaleByAdamState(*state[:3]))
        unbiased = optax.tree.bias_correction(new.nu, b2, new.count)
        size = lax.psum(optax.tree.norm(unbiased, ord=1), axis_name)  # of all chunks
        switch = look(
            state.switch,
            new.count,
            [size],
            freeze_step=freeze_step,
            decay=b2,
            tolerance=tolerance,
            earliest=earliest,
        )
        return updates, SettlingAdamState(new.count, new.mu, new.nu, switch)

    def frozen(grads, state: SettlingAdamState):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.bias_correction(state.nu, b2, state.switch.frozen_at)
        below = root(nu, eps, floor, lambda v: lax.pmean(jnp.mean(v), axis_name))
        updates = optax.tree.bias_correction(mu, b1, count)
        updates = jax.tree.map(jnp.divide, updates, below)
        return updates, state._replace(count=count, mu=mu)

    def update(grads, state: Any, params=None):
        del params
        still: Bool[Array, ""] = is_frozen(state.switch)
        return lax.cond(still, frozen, moving, grads, state)

    return optax.GradientTransformation(init, update)


def sharded_one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    axis_name: str = "fsdp",
    weight_decay: float = 0.0,
    mask: Any = None,
    clip: float | None = None,
    up: Way = ONE_BIT,
    down: Way = ONE_BIT_DOWN,
    **options: Any,
) -> optax.GradientTransformation:
    """1-bit Adam over shards; options as `scale_by_settling_adam`.

    >>> tx = sharded_one_bit_adam(1e-3, workers=8, freeze_step=100)
    >>> state = tx.init({"w": jnp.zeros((16, 64))})  # of all workers
    >>> state.master.over_workers["w"].shape
    (8, 2, 64)
    """
    inner = optax.chain(
        scale_by_settling_adam(axis_name=axis_name, **options),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return sharded(
        inner,
        workers=workers,
        axis_name=axis_name,
        up=up,
        down=down,
        clip=clip,
        frozen_at=lambda state: state[0].switch.frozen_at,
    )


def sharded_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    axis_name: str = "fsdp",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    clip: float | None = None,
    up: Way = FOUR_BITS,
    down: Way = FOUR_BITS_DOWN,
) -> optax.GradientTransformation:
    """Momentum SGD over shards, compressed from the start.

    >>> tx = sharded_sgd(0.1, workers=4)
    """
    inner = optax.chain(
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.sgd(learning_rate, momentum=momentum),
    )
    options = {"workers": workers, "axis_name": axis_name, "up": up, "down": down}
    return sharded(inner, clip=clip, **options)
