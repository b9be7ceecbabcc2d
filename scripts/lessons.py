"""Agents taught at home that go on after a shift, and what their waist tells.

The whole of teaching is compiled, CHUNK updates at a time, for one agent on one device;
`train_agent.py` teaches on any mesh.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from narrows.data.gridworld import KINDS, PLAIN, SHIFTED, Gridworld
from narrows.models.agent import agent_parts
from narrows.models.bottleneck import Bottleneck, Waist
from narrows.scripts import agents
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score

ROOM = Gridworld()
ROWS, CLIP = 128, 0.5  # rooms in a step, gradient norm
CHUNK = 25  # updates in a compiled loop, and between two looks at an adapting agent
LOOKS = 6  # at an adapting agent
EPOCHS, ROLLOUTS = 4, 64  # of PPO: updates from a rollout, rooms in it
EVALUATED, PROBED = 500, 24_000  # episodes, pictures
RATES = (3e-3, 1e-2)  # of Adam, among which each agent has its best at home
AGAIN = 3e-3  # after the shift


class Narrow(nnx.Module):
    """A waist of two linear layers, through as many numbers as a code has."""

    def __init__(self, width: int, *, passed: int = 10, rngs: nnx.Rngs):
        self.inward = nnx.Linear(width, passed, rngs=rngs)
        self.outward = nnx.Linear(passed, width, rngs=rngs)

    def __call__(self, x, mask=None) -> Waist:
        del mask
        z = self.outward(self.inward(x))
        bits = jnp.full(x.shape[:-1], 32.0 * self.inward.out_features)
        return Waist(z, jnp.zeros((), jnp.float32), bits)

    def update(self, stats: Any) -> dict[str, jax.Array]:
        del stats
        return {}


class Learner(NamedTuple):
    params: Any
    rest: Any
    opt: Any


class Probed(NamedTuple):
    """What pictures are told by the agent, and what is in them."""

    seen: Float[Array, "n d"]  # e
    passed: Float[Array, "n d"]  # z
    weights: Float[Array, "n k"] | None  # q
    goal: Int[Array, " n"]
    visible: Bool[Array, "n kinds"]
    side: Int[Array, "n kinds 2"]  # -1, 0, 1: above, level, below; left, level, right


class Programs(NamedTuple):
    start: Callable  # key -> Learner
    imitate: Callable  # (learner, key, domain, rates) -> learner
    reinforce: Callable  # the same by reward: a rate for each rollout
    success: Callable  # (learner, key, domain) -> share of episodes that end well
    look: Callable  # (learner, key, domain) -> Probed


@functools.cache
def programs(waist: Callable[..., Bottleneck]) -> Programs:
    """Of agents with a waist, given by its factory."""
    parts = agent_parts(agents.config_for(ROOM), waist)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())

    def start(key):
        params, rest = parts.init(key)
        return Learner(params, rest, tx.init(params))

    def agent(learner):
        return nnx.merge(parts.graph, learner.params, learner.rest)

    def descend(learner, objective, batch, rate):
        def mean(params):
            found = agents.loss_of(parts, objective)(params, learner.rest, batch)
            return found.total / found.weight

        slope = jax.grad(mean)(learner.params)
        updates, opt = tx.update(slope, learner.opt, learner.params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return Learner(optax.apply_updates(learner.params, updates), learner.rest, opt)

    def over(update):
        def run(learner, key, domain, rates):
            def one(learner, now):
                index, rate = now
                key_now = jax.random.fold_in(key, index)
                return update(learner, key_now, domain, rate), None

            return jax.lax.scan(one, learner, (jnp.arange(len(rates)), rates))[0]

        return jax.jit(run)

    def imitate(learner, key, domain, rate):
        shown = agents.demonstrate(ROOM, domain, agents.row_keys(key, ROWS))
        return descend(learner, agents.imitation, shown, rate)

    def reinforce(learner, key, domain, rate):
        keys = agents.row_keys(key, ROLLOUTS)
        seen = agents.experience(agent(learner), ROOM, domain, keys)

        def epoch(learner, _):
            return descend(learner, agents.reinforcement, seen, rate), None

        return jax.lax.scan(epoch, learner, length=EPOCHS)[0]

    def success(learner, key, domain):
        keys = agents.row_keys(key, EVALUATED)
        return agents.successes(agent(learner), ROOM, domain, keys).mean()

    def look(learner, key, domain):
        def one(key):
            world = ROOM.reset(key, domain)
            side = jnp.sign(ROOM.places(world) - world.agent)
            return ROOM.observe(world), world.goals[0], ROOM.visible(world), side

        seen, *known = jax.vmap(one)(agents.row_keys(key, PROBED))
        out = agent(learner)(seen.image, seen.task)
        return Probed(out.seen, out.waist.z, out.waist.assignments, *known)

    once = map(jax.jit, (start, success, look))
    start, success, look = once
    return Programs(start, over(imitate), over(reinforce), success, look)


def taught(program: Programs, how: str, seed: int, steps: int) -> Learner:
    """An agent after `steps` at home, by "imitate" or "reinforce".

    With the best of RATES: that of most success at home, in episodes of this choice.
    """
    judge = jax.random.key(2_000_000 + seed)
    tried = [at_rate(program, how, seed, steps, rate) for rate in RATES]
    return max(tried, key=lambda agent: float(program.success(agent, judge, PLAIN)))


def at_rate(program: Programs, how: str, seed: int, steps: int, peak: float) -> Learner:
    learner = program.start(jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(0, peak, 50, steps, 0.02 * peak)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
    for index in range(0, steps, CHUNK):
        key = jax.random.fold_in(jax.random.key(seed), 1 + index)
        now = rates[index : index + CHUNK]
        learner = getattr(program, how)(learner, key, PLAIN, now)
    return learner


def adapting(program: Programs, how: str, learner: Learner, seed: int) -> list[float]:
    """Success after the shift at LOOKS + 1 moments of going on there."""
    rates = np.full(CHUNK if how == "imitate" else CHUNK // 5, AGAIN, np.float32)
    learner = learner._replace(opt=jax.tree.map(jnp.zeros_like, learner.opt))
    judge = jax.random.key(1_000_000 + seed)  # not of the teaching
    found = [float(program.success(learner, judge, SHIFTED))]
    for index in range(LOOKS):
        key = jax.random.fold_in(jax.random.key(seed), 1_000_000 + index)
        learner = getattr(program, how)(learner, key, SHIFTED, rates)
        found.append(float(program.success(learner, judge, SHIFTED)))
    return found


def looks_to(share: float, curve: Sequence[float]) -> float:
    """Looks until a curve first reaches a share of its last point, interpolated."""
    wanted = share * curve[-1]
    for index, (before, after) in enumerate(itertools.pairwise(curve)):
        if before >= wanted:
            return float(index)
        if after >= wanted:
            return index + (wanted - before) / (after - before)
    return float(len(curve) - 1)


def recognised(
    x: np.ndarray, found: Probed, goal: int
) -> Iterator[tuple[str, str, float]]:
    """(whose, what, balanced accuracy of a linear probe of x), one for each question.

    Asked among the pictures in which the kind `goal` is sought: of that kind ("target")
    and of each other ("others"), whether it is in view ("presence"), and where it is in
    view on which side of the agent it lies ("side", by rows and by columns, of three).
    Half of the pictures teach a probe and half test it.
    """
    mine = found.goal == goal
    for kind in range(KINDS):
        whose = "target" if kind == goal else "others"
        visible = found.visible[:, kind]
        yield whose, "presence", probe(x[mine], visible[mine])
        for axis in (0, 1):
            rows = mine & visible
            yield whose, "side", probe(x[rows], found.side[rows, kind, axis])


def probe(x: np.ndarray, y: np.ndarray) -> float:
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-6)
    fitted = RidgeClassifier(alpha=10.0, class_weight="balanced").fit(
        x[:half], y[:half]
    )
    return float(balanced_accuracy_score(y[half:], fitted.predict(x[half:])))
