"""Proximal policy optimisation as pure functions (arXiv:1707.06347).

    maximise  E min(r A, clip(r, 1 - c, 1 + c) A) - w_v (V - R)^2 / 2 + w_h H

(Eq. 7 and 9), with r the ratio of new to old probability of the action taken, A the
generalised advantage (arXiv:1506.02438, Eq. 16) and R = A + V what the value should be.
Rows are environments and all that is random has a key of its row, so that the same
experience comes of any number of devices. An `act` that draws (dropout) gets keys, one
an observation, and the update gives it the same ones: r is 1 before the first step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Environment(NamedTuple):
    """Of one world; worlds side by side come from `jax.vmap`."""

    reset: Callable  # key -> state
    observe: Callable  # state -> observation, any tree of arrays
    step: Callable  # (state, action) -> (state, reward, done)


class Experience(NamedTuple):
    """What an update learns from; leaves [rows, time, ...]."""

    observation: Any
    action: Int[Array, "b t"]
    nats: Float[Array, "b t"]  # log-probability of the action when it was taken
    advantage: Float[Array, "b t"]
    goal: Float[Array, "b t"]  # R
    reward: Float[Array, "b t"]
    done: Bool[Array, "b t"]
    keys: Key[Array, "b t"]  # what `act` drew from


class Terms(NamedTuple):
    """Of each observation, float32; `total` is to be made small."""

    total: Float[Array, "*b"]
    policy: Float[Array, "*b"]
    value: Float[Array, "*b"]  # (V - R)^2 / 2
    entropy: Float[Array, "*b"]  # nats
    clipped: Float[Array, "*b"]  # 1 where the ratio left the range
    divergence: Float[Array, "*b"]  # r - 1 - log r: nats, at least 0


def gae(
    reward: Float[Array, "*b t"],
    value: Float[Array, "*b t"],
    done: Bool[Array, "*b t"],
    last: Float[Array, "*b"],
    *,
    discount: float,
    decay: float,
) -> Float[Array, "*b t"]:
    """A_t = d_t + discount decay A_{t+1}, d_t = r_t + discount V_{t+1} - V_t.

    What follows an end counts as 0. `last` is the value after the last step.
    """
    after = jnp.concatenate([value[..., 1:], last[..., None]], -1)
    goes_on = 1.0 - done.astype(value.dtype)
    error = reward + discount * goes_on * after - value

    def back(advantage, now):
        error, goes_on = now
        advantage = error + discount * decay * goes_on * advantage
        return advantage, advantage

    by_time = (jnp.moveaxis(error, -1, 0), jnp.moveaxis(goes_on, -1, 0))
    _, found = jax.lax.scan(back, jnp.zeros_like(last), by_time, reverse=True)
    return jnp.moveaxis(found, 0, -1)


def collect(
    act: Callable,
    environment: Environment,
    keys: Key[Array, " b"],
    length: int,
    *,
    discount: float = 0.99,
    decay: float = 0.95,
) -> Experience:
    """Let `act(observation, keys) -> (logits, value)` run in a fresh world a key.

    A world that ends is followed by a new one. Advantages have mean 0 and deviation 1
    over all rows and times.
    """

    def each(index, keys):
        return jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)

    def pick(done, fresh, old):
        return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)

    def one(state, time):
        draw, choose, renew = (each(3 * time + i, keys) for i in (1, 2, 3))
        seen = jax.vmap(environment.observe)(state)
        logits, value = act(seen, draw)
        action = jax.vmap(jax.random.categorical)(choose, logits)
        state, reward, done = jax.vmap(environment.step)(state, action)
        fresh = jax.vmap(environment.reset)(renew)
        state = jax.tree.map(lambda a, b: pick(done, a, b), fresh, state)
        nats = log_probability(logits, action)
        return state, (seen, action, nats, value, reward, done, draw)

    start = jax.vmap(environment.reset)(each(0, keys))
    state, found = jax.lax.scan(one, start, jnp.arange(length))
    seen, action, nats, value, reward, done, draw = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1), found
    )
    _, last = act(jax.vmap(environment.observe)(state), each(3 * length + 1, keys))
    advantage = gae(reward, value, done, last, discount=discount, decay=decay)
    centred = advantage - advantage.mean()
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2) + 1e-8)
    goal = advantage + value
    return Experience(seen, action, nats, scaled, goal, reward, done, draw)


def log_probability(
    logits: Float[Array, "*b a"], action: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    nats = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(nats, action[..., None], -1)[..., 0]


def terms(
    logits: Float[Array, "*b a"],
    value: Float[Array, "*b"],
    seen: Experience,
    *,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> Terms:
    """The objective at each observation, from what the policy says of it now."""
    change = log_probability(logits, seen.action) - seen.nats
    ratio = jnp.exp(change)
    within = jnp.clip(ratio, 1 - clip, 1 + clip)
    policy = -jnp.minimum(ratio * seen.advantage, within * seen.advantage)
    off = (value - seen.goal) ** 2 / 2
    nats = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(nats) * nats, -1)
    total = policy + value_weight * off - entropy_weight * entropy
    clipped = (jnp.abs(ratio - 1) > clip).astype(jnp.float32)
    return Terms(total, policy, off, entropy, clipped, ratio - 1 - change)
