"""What agents in a room are taught by, for the training script and the reproduction.

Rows are worlds, each with a key of its own, so batches are the same on any devices.
Losses are sums over observations, as `parallel.step` wants them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key
from narrows.data.gridworld import FIRST, NOTHING, Domain, Gridworld, Seen, World
from narrows.models.agent import Agent, AgentConfig, AgentParts
from narrows.models.rl import ppo
from narrows.parallel.layout import BATCH, constrain
from narrows.parallel.step import Loss

ON_GOAL = 0.2  # of the states shown: else nearly none would show when to act


class Shown(NamedTuple):
    """States with all that the expert might do there."""

    seen: Seen
    expert: Float[Array, "b actions"]
    keys: Key[Array, " b"]  # what the waist draws from


def config_for(room: Gridworld) -> AgentConfig:
    return AgentConfig(side=room.view)


def row_keys(key: jax.Array, rows: int) -> Key[Array, " b"]:
    """A key for each row, laid over the axes of the batch."""
    return constrain(jax.random.split(key, rows), BATCH)


def states(room: Gridworld, domain: Domain, keys: Key[Array, " b"]) -> World:
    """Rooms with the agent anywhere, ON_GOAL of them where it must act."""

    def one(key):
        start, carry, place = jax.random.split(key, 3)
        world = room.reset(start, domain)
        carries = jax.random.bernoulli(carry) & room.displace
        thing = world.ground == FIRST + world.goals[0]
        world = world._replace(
            carries=carries, ground=jnp.where(carries & thing, NOTHING, world.ground)
        )
        there = jax.random.uniform(place) < ON_GOAL
        return world._replace(agent=jnp.where(there, room.sought(world), world.agent))

    return jax.vmap(one)(keys)


def demonstrate(room: Gridworld, domain: Domain, keys: Key[Array, " b"]) -> Shown:
    world = states(room, domain, keys)
    seen = jax.vmap(room.observe)(world)
    draws = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    return Shown(seen, jax.vmap(room.expert)(world), draws)


def imitation(agent: Agent, shown: Shown) -> Loss:
    """Cross-entropy to the expert in nats; its floor is the expert's entropy."""
    out = agent(shown.seen.image, shown.seen.task, shown.keys)
    nats = optax.safe_softmax_cross_entropy(out.logits, shown.expert)
    best = jnp.argmax(out.logits, -1)
    good = jnp.take_along_axis(shown.expert, best[:, None], -1)[:, 0] > 0
    count = jnp.asarray(nats.size, jnp.float32)
    sums = {"agrees": jnp.sum(good, dtype=jnp.float32)}
    return Loss(nats.sum(), count, sums | _bits(out.waist), out.waist.stats)


def environment(room: Gridworld, domain: Domain) -> ppo.Environment:
    def step(state, action):
        state, outcome = room.step(state, action)
        return state, outcome.reward, outcome.done

    return ppo.Environment(lambda key: room.reset(key, domain), room.observe, step)


def experience(
    agent: Agent, room: Gridworld, domain: Domain, keys: Key[Array, " b"]
) -> ppo.Experience:
    """As many steps as an episode may have, in a new room for each key."""

    def act(seen: Seen, draws):
        out = agent(seen.image, seen.task, draws)
        return out.logits, out.value

    return ppo.collect(act, environment(room, domain), keys, room.limit)


def reinforcement(agent: Agent, seen: ppo.Experience, **weights: float) -> Loss:
    """The objective of `ppo.terms`, which takes the weights."""
    out = agent(seen.observation.image, seen.observation.task, seen.keys)
    found = ppo.terms(out.logits, out.value, seen, **weights)
    sums = {name: jnp.sum(x) for name, x in found._asdict().items() if name != "total"}
    sums["reward"] = seen.reward.sum()
    count = jnp.asarray(found.total.size, jnp.float32)
    return Loss(found.total.sum(), count, sums | _bits(out.waist), out.waist.stats)


def successes(
    agent: Agent, room: Gridworld, domain: Domain, keys: Key[Array, " b"]
) -> Float[Array, " b"]:
    """1 where an episode ends well. Actions are drawn, codes do not drop out."""
    world = jax.vmap(lambda key: room.reset(key, domain))(keys)

    def one(carry, time):
        world, alive, won = carry
        seen = jax.vmap(room.observe)(world)
        logits = agent(seen.image, seen.task).logits
        draws = jax.vmap(lambda key: jax.random.fold_in(key, time + 1))(keys)
        action = jax.vmap(jax.random.categorical)(draws, logits)
        world, outcome = jax.vmap(room.step)(world, action)
        won = jnp.where(alive & outcome.success, 1.0, won)
        return (world, alive & ~outcome.done, won), None

    alive = jnp.ones(keys.shape, bool)
    start = (world, alive, jnp.zeros(keys.shape))
    (_, _, won), _ = jax.lax.scan(one, start, jnp.arange(room.limit))
    return won


def advance_of(parts: AgentParts) -> Callable:
    """advance(params, rest, stats) -> (rest, report) of the waist."""

    def advance(params: Any, rest: Any, stats: Any):
        agent: Agent = nnx.merge(parts.graph, params, rest)
        said = agent.waist.update(stats)
        return nnx.as_pure(nnx.split(agent, nnx.Param, ...)[2]), said

    return advance


def loss_of(parts: AgentParts, objective: Callable[..., Loss]) -> Callable:
    """loss(params, rest, batch, key) of an objective of the agent."""

    def loss(params: Any, rest: Any, batch: Any, key: Any = None) -> Loss:
        del key  # each row brings its own
        return objective(nnx.merge(parts.graph, params, rest), batch)

    return loss


def _bits(waist) -> dict[str, Array]:
    return {"waist_bits": jnp.sum(waist.bits)}
