"""0/1 Adam: one bit or none. Rare dense refreshes of v, then local steps.

Y. Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1
Adam", ICLR 2023, arXiv:2202.06009, Algorithm 1 and Sec. 4.

Until v is frozen, gradients are dense at refreshes alone, whose distance doubles after
every `refreshes` of them; between them gradients go by the one-bit mean and only m
moves. After it, workers step by their own m_i and add up u_i = sum rate m_i; every H
steps the u_i are sent by the one-bit mean, the moves of the round are undone, and
x <- x - u / (sqrt(v) + eps), m = u / sum rate on all workers. H doubles after every
`rounds` of them, up to `longest`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from ..parallel.state import PerWorkerMean, Reported, replicate
from .compressed_mean import MeanState, Way, compressed_mean
from .one_bit_adam import ONE_BIT, root
from .switch import Switch, init_switch, is_frozen


class Pace(NamedTuple):
    """Something done every `gap` steps, the gap doubling after some times."""

    gap: Int[Array, ""]
    since: Int[Array, ""]  # steps since it was last done
    times: Int[Array, ""]  # done with this gap


class ZeroOneAdamState(NamedTuple):
    count: Int[Array, ""]
    refreshed: Int[Array, ""]  # how often v was, for the correction of its bias
    mu: PerWorkerMean  # of each worker between rounds, else equal
    nu: optax.Updates
    moved: PerWorkerMean  # u_i, the sum of rate m_i of this round
    rates: Float[Array, ""]  # their sum
    refresh: Pace
    round: Pace
    switch: Switch
    mean: MeanState
    said: Reported


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    freeze_step: int,
    axis_name: str = "data",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    floor: float = 0.01,
    refreshes: int = 16,
    rounds: int = 32,
    longest: int = 1,
    up: Way = ONE_BIT,
    down: Way = ONE_BIT,
) -> optax.GradientTransformation:
    """0/1 Adam; with longest > 1 workers' parameters differ within a round.

    Parameters must then be each worker's own; after a round they agree to rounding.
    Weight decay acts once a round, by the round's sum of rates. Biases are corrected,
    v's by the number of its refreshes. v is frozen after `freeze_step` updates; its
    floor (see `one_bit_adam.root`) holds from the start, since it moves rarely.

    >>> tx = zero_one_adam(1e-3, workers=8, freeze_step=100)
    """
    mean = compressed_mean(up, down, workers=workers, axis_name=axis_name)
    decay = optax.add_decayed_weights(1.0, mask=mask)

    def rate_at(count) -> Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(rate, jnp.float32)

    def init(params):
        zero = jnp.int32(0)
        zeros = jax.tree.map(jnp.zeros_like, params)
        own = replicate(PerWorkerMean(zeros), workers)
        pace = Pace(jnp.int32(1), zero, zero)
        return ZeroOneAdamState(
            zero,
            zero,
            own,
            zeros,
            own,
            jnp.float32(0),
            pace,
            pace,
            init_switch(),
            mean.init(params),
            Reported({"compressed": jnp.float32(0), "frozen_at": jnp.float32(-1)}),
        )

    def below(state: ZeroOneAdamState):
        nu = optax.tree.bias_correction(state.nu, b2, state.refreshed)
        return root(nu, eps, floor)

    def stepped(m, state: ZeroOneAdamState, params):
        """The update of one step by m, with the state's v."""
        rate = rate_at(state.count)
        m = optax.tree.bias_correction(m, b1, state.count + 1)
        updates = jax.tree.map(lambda m, d: -rate * m / d, m, below(state))
        return decayed(updates, rate, params)

    def decayed(updates, rate, params):
        if not weight_decay:
            return updates
        zeros = jax.tree.map(jnp.zeros_like, params)
        pull = decay.update(zeros, decay.init(params), params)[0]
        return jax.tree.map(lambda u, p: u - rate * weight_decay * p, updates, pull)

    def key_of(state):
        return jax.random.fold_in(jax.random.key(0), state.count)

    def refresh(grads, state: ZeroOneAdamState, params):
        grads = lax.pmean(grads, axis_name)
        m = optax.tree.update_moment(grads, state.mu.per_worker_mean, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        state = state._replace(
            mu=PerWorkerMean(m), nu=nu, refreshed=state.refreshed + 1
        )
        return stepped(m, state, params), state

    def one_bit(grads, state: ZeroOneAdamState, params):
        found, mean_state = mean.mean(grads, state.mean, key_of(state))
        m = optax.tree.update_moment(found, state.mu.per_worker_mean, b1, 1)
        state = state._replace(mu=PerWorkerMean(m), mean=mean_state)
        return stepped(m, state, params), state

    def alone(grads, state: ZeroOneAdamState, params):
        """A step of the worker's own: nothing is sent."""
        del params
        rate = rate_at(state.count)
        m = optax.tree.update_moment(grads, state.mu.per_worker_mean, b1, 1)
        corrected = optax.tree.bias_correction(m, b1, state.count + 1)
        move = optax.tree.scale(rate, corrected)
        moved = optax.tree.add(state.moved.per_worker_mean, move)
        updates = jax.tree.map(lambda u, d: -u / d, move, below(state))
        return updates, state._replace(
            mu=PerWorkerMean(m), moved=PerWorkerMean(moved), rates=state.rates + rate
        )

    def together(grads, state: ZeroOneAdamState, params):
        """The worker's step, then all workers' moves of the round in place of its own.

        Bias correction makes u the moves by corrected momenta; m is set in the same
        units, and corrected back.
        """
        before = state.moved.per_worker_mean
        _, state = alone(grads, state, params)
        u, mean_state = mean.mean(
            state.moved.per_worker_mean, state.mean, key_of(state)
        )
        denominators = below(state)
        start = jax.tree.map(lambda x, b, d: x + b / d, params, before, denominators)
        updates = jax.tree.map(lambda b, u, d: (b - u) / d, before, u, denominators)
        updates = decayed(updates, state.rates, start)
        bias = 1 - b1 ** (state.count + 1)
        scale = jnp.where(
            state.rates > 0, bias / jnp.where(state.rates > 0, state.rates, 1), 0
        )
        zeros = jax.tree.map(jnp.zeros_like, u)
        return updates, state._replace(
            mu=PerWorkerMean(optax.tree.scale(scale, u)),
            moved=PerWorkerMean(zeros),
            rates=jnp.float32(0),
            mean=mean_state,
        )

    def update(grads, state: Any, params=None):
        if params is None:
            raise ValueError("params is missing: call update(grads, state, params)")
        frozen = is_frozen(state.switch)
        due = state.refresh.since + 1 >= state.refresh.gap
        meet = state.round.since + 1 >= state.round.gap
        branch = jnp.where(frozen, jnp.where(meet, 3, 2), jnp.where(due, 0, 1))
        updates, new = lax.switch(
            branch, [refresh, one_bit, alone, together], grads, state, params
        )
        new = new._replace(
            count=optax.safe_increment(state.count),
            refresh=_next(state.refresh, ~frozen, refreshes, 2**30),
            round=_next(state.round, frozen, rounds, longest),
        )
        late = new.count >= freeze_step
        switch = state.switch._replace(
            frozen_at=jnp.where(late & ~frozen, new.count, state.switch.frozen_at)
        )
        begun = is_frozen(switch) & ~frozen  # residuals of gradients mean nothing now
        memory = jax.tree.map(lambda x: jnp.where(begun, 0, x), new.mean)
        said = {
            "compressed": (branch != 0).astype(jnp.float32),
            "frozen_at": switch.frozen_at.astype(jnp.float32),
        }
        return updates, new._replace(switch=switch, mean=memory, said=Reported(said))

    return optax.GradientTransformation(init, update)


def _next(pace: Pace, running, times: int, longest: int) -> Pace:
    """After a step in which it was due (since + 1 >= gap) or not."""
    done = pace.since + 1 >= pace.gap
    full = done & (pace.times + 1 >= times)
    new = Pace(
        jnp.where(full, jnp.minimum(2 * pace.gap, longest), pace.gap),
        jnp.where(done, 0, pace.since + 1),
        jnp.where(full, 0, pace.times + done),
    )
    return jax.tree.map(lambda n, o: jnp.where(running, n, o), new, pace)
