"""Compressed gradients where optimizer state and parameters lie in shards (fsdp).

Each of n workers owns a chunk of every parameter, with its moments. A step is

    g_j  <- compressed reduce-scatter of the workers' gradients, to the owner of chunk j
    x_j  <- one step of an optax optimizer on chunk j
    y    <- y + C(x - y), an all-gather of compressed differences (EF21-P,
            Gruntkowska et al. 2022, arXiv:2209.15218)

y is the copy of the parameters that every worker computes with: what `update` takes as
`params` and moves. It trails x by what has not been sent yet. So a worker keeps y and
its residual whole, and 1/n of all else; nothing of 32 bits an entry travels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from ..parallel.chunks import join, split
from ..parallel.state import OverWorkers, Reported, replicate
from .clipping import clip_local, learn_spread
from .compressed_mean import Way, sharded_mean
from .links import LINKS
from .topologies import DownState, UpState


class ShardedState(NamedTuple):
    count: Int[Array, ""]
    master: OverWorkers  # float32, the parameters proper
    moments: OverWorkers  # the arrays of the inner state, () for its scalars
    scalars: Any  # and these, () for its arrays
    spread: Float[Array, ""]  # see `clipping`
    up: UpState
    down: OverWorkers  # residuals of owners, where the link keeps any
    said: Reported


def sharded(
    inner: optax.GradientTransformation,
    *,
    workers: int,
    axis_name: str = "fsdp",
    up: Way,
    down: Way,
    clip: float | None = None,
    frozen_at: Callable[[Any], Int[Array, ""]] | None = None,
) -> optax.GradientTransformation:
    """`inner`, entry by entry, on chunks of parameters and of their mean gradient.

    frozen_at(state of inner): the update after which all is compressed, -1 as long as
    it is not to be; before, the same steps go uncompressed. None: from the start.
    clip: of the global norm of the mean gradient, as in `one_bit_adam`; with no dense
    phase to learn from, of what was received.
    """
    if down.link in LINKS and not LINKS[down.link].numbers(1.0)[1]:
        raise ValueError(
            f"down: link {down.link!r} sends parameters whole; take one of differences "
            "(ef21, econtrol)"
        )

    def chunks(tree):
        """[workers, rows, width] of every leaf."""
        return jax.tree.map(lambda x: split(x.astype(jnp.float32), workers), tree)

    def init(params):
        state = sharded_mean(up, down, like=params, workers=workers).init(params)
        master = chunks(params)
        moments, scalars = _parted(inner.init(jax.tree.map(lambda x: x[0], master)))
        return ShardedState(
            jnp.int32(0),
            OverWorkers(master),
            replicate(OverWorkers(moments), workers),
            scalars,
            jnp.float32(1),
            state.up,
            state.down.e,
            Reported({"compressed": jnp.float32(0), "frozen_at": jnp.float32(-1)}),
        )

    def update(grads, state: Any, params=None):
        if params is None:
            raise ValueError("params is missing: call update(grads, state, params)")
        key = jax.random.fold_in(jax.random.key(0), state.count)
        mean = sharded_mean(up, down, like=params, workers=workers, axis_name=axis_name)
        before = _joined(state.moments.over_workers, state.scalars)

        def stepped(shards, norm, state: ShardedState):
            """The owner's step, by the mean gradient clipped by its norm."""
            if clip is not None and norm is not None:
                shards = optax.tree.scale(clip / jnp.maximum(norm, clip), shards)
            master = state.master.over_workers
            updates, new = inner.update(shards, before, master)
            moments, scalars = _parted(new)
            return state._replace(
                master=OverWorkers(optax.apply_updates(master, updates)),
                moments=OverWorkers(moments),
                scalars=scalars,
            )

        def norm_of(shards):
            return jnp.sqrt(lax.psum(optax.tree.norm(shards, squared=True), axis_name))

        def warm(grads, state: ShardedState):
            shards = jax.tree.map(
                lambda g: lax.psum_scatter(g, axis_name) / workers, chunks(grads)
            )
            norm = norm_of(shards)
            share = 1 / (state.count + 1)
            spread = learn_spread(
                state.spread, grads, norm, share=share, axis_name=axis_name
            )
            state = stepped(shards, norm, state)._replace(spread=spread)
            return _gathered(state.master.over_workers, params, axis_name), state

        def compressed(grads, state: ShardedState):
            if clip is not None and frozen_at is not None:
                grads = clip_local(grads, state.spread, clip, axis_name=axis_name)
            shards, up_state = mean.reduce_scatter(grads, state.up, key)
            norm = norm_of(shards) if frozen_at is None else None
            state = stepped(shards, norm, state)._replace(up=up_state)
            expected = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            sent = state.master.over_workers
            copy, new = mean.all_gather(sent, DownState(state.down, expected), key)
            return copy, state._replace(down=new.e)

        at = jnp.int32(0) if frozen_at is None else frozen_at(before)
        if frozen_at is None:
            copy, state = compressed(grads, state)
        else:
            copy, state = lax.cond(at >= 0, compressed, warm, grads, state)
        new_at = at
        if frozen_at is not None:
            new_at = frozen_at(_joined(state.moments.over_workers, state.scalars))
        said = {
            "compressed": (at >= 0).astype(jnp.float32),
            "frozen_at": new_at.astype(jnp.float32),
        }
        state = state._replace(count=state.count + 1, said=Reported(said))
        return jax.tree.map(jnp.subtract, copy, params), state

    return optax.GradientTransformation(init, update)


def _gathered(master, params, axis_name: str):
    """The whole parameters, from every owner's chunk."""

    def whole(x, like):
        return join(lax.all_gather(x, axis_name), like.shape).astype(like.dtype)

    return jax.tree.map(whole, master, params)


def _parted(state):
    """An inner state's arrays, which are in chunks, and its scalars; () elsewhere."""
    return (
        jax.tree.map(lambda x: x if x.ndim else (), state),
        jax.tree.map(lambda x: () if x.ndim else x, state),
    )


def _joined(arrays, scalars):
    return jax.tree.map(
        lambda a, s: s if isinstance(a, tuple) else a,
        arrays,
        scalars,
        is_leaf=lambda x: x == () if isinstance(x, tuple) else False,
    )
