"""A small world of pixels: find the thing asked for among others, seen from close by.

Things of KINDS kinds lie on the floor of a square room. The agent stands on a cell,
sees the cells around it as a picture, and is told which kind to find (object-goal
navigation) or which to carry where (displacement). What the other things are and how
the room looks does not matter to the task; a `Domain` says how both are drawn.

Everything is a pure function of arrays: `jax.vmap` runs many worlds, `jax.jit` all.

>>> room = Gridworld()
>>> world = room.reset(jax.random.key(0), PLAIN)
>>> room.observe(world).image.shape, room.expert(world).shape
((20, 20, 3), (5,))
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

KINDS, STRANGE, CELL = 8, 8, 4  # kinds asked for; kinds never asked for; pixels a side
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.int32)  # then ACT
ACT = len(MOVES)
ACTIONS = ACT + 1

_SHAPES = """
 .##. #..# #.#. .##.   .... .#.. #... ####
 #..# .##. .#.# ####   #### .#.. ##.. ....
 #..# .##. #.#. ####   #### .#.. ###. ####
 .##. #..# .#.# .##.   .... .#.. #### ....
"""
_KNOWN = [(0.85, 0.25, 0.2), (0.2, 0.35, 0.85)]
_OTHER = [(0.25, 0.7, 0.3), (0.8, 0.7, 0.2)]


def _sprites() -> tuple[np.ndarray, np.ndarray]:
    """Shape [kind, 4, 4] and colour [kind, 3]: nothing, wall, kinds, strange kinds."""
    rows = [line.split() for line in _SHAPES.split("\n") if line.strip()]
    shapes = np.array(
        [[[c == "#" for c in row[i]] for row in rows] for i in range(8)], np.float32
    )
    known = [(shape, colour) for colour in _KNOWN for shape in shapes[:4]]
    other = [(shape, colour) for colour in _OTHER for shape in shapes[4:]]
    solid = np.ones((CELL, CELL), np.float32)
    every = [(0 * solid, (0, 0, 0)), (solid, (0.1, 0.1, 0.1)), *known, *other]
    return np.stack([s for s, _ in every]), np.array([c for _, c in every], np.float32)


SHAPES, COLOURS = _sprites()
NOTHING, WALL, FIRST = 0, 1, 2


class Domain(NamedTuple):
    """How rooms are drawn. Numbers, so that one compiled program serves all."""

    crowd: float  # chance that a kind not asked for is there
    strange: float  # chance that a free cell holds a thing of a strange kind
    light: float  # brightness is 1 up to plus or minus this
    tint: float  # deviation of the colour of each kind
    texture: float  # deviation of the floor's pixels


PLAIN = Domain(crowd=0.5, strange=0.0, light=0.1, tint=0.05, texture=0.05)
SHIFTED = Domain(crowd=0.8, strange=0.15, light=0.3, tint=0.1, texture=0.15)


class World(NamedTuple):
    agent: Int[Array, " 2"]  # row and column
    ground: Int[Array, "s s"]  # what lies on each cell: NOTHING, or FIRST + kind
    goals: Int[Array, " 2"]  # the kind to find; the kind to carry it to
    carries: Bool[Array, ""]
    steps: Int[Array, ""]
    floor: Float[Array, "s s p p"]  # grey pixels of the cells
    colours: Float[Array, "sprites 3"]
    light: Float[Array, ""]


class Seen(NamedTuple):
    image: Float[Array, "height width 3"]  # red, green, blue in [0, 1]
    task: Int[Array, " 3"]  # both goals, and whether the first is carried


class Outcome(NamedTuple):
    reward: Float[Array, ""]  # cells come nearer / 10 - 0.001, and 1 for success
    done: Bool[Array, ""]
    success: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Gridworld:
    """The rules of a room.

    size: cells a side. view: cells a side of the picture, odd, with the agent in its
    middle. displace: the first goal must be carried to the second, and only then is
    the task done. limit: steps of an episode.
    """

    size: int = 5
    view: int = 5
    displace: bool = False
    limit: int = 16

    def __post_init__(self):
        if self.size < 4 or self.view < 3 or self.view % 2 == 0 or self.limit < 1:
            raise ValueError(
                f"gridworld: size={self.size}, view={self.view}, limit={self.limit}, "
                "but it needs a size of at least 4, an odd view of at least 3 and a "
                "limit of at least 1 step"
            )

    def reset(self, key: jax.Array, domain: Domain) -> World:
        """A new room, with the agent anywhere."""
        keys = jax.random.split(key, 9)
        first, apart = jax.random.randint(
            keys[0], (2,), 0, np.array([KINDS, KINDS - 1])
        )
        goals = jnp.stack(
            [first, (first + 1 + apart) % KINDS if self.displace else first]
        )
        cells = self.size**2
        strange = jax.random.uniform(keys[1], (cells,)) < domain.strange
        which = jax.random.randint(keys[2], (cells,), 0, STRANGE)
        ground = jnp.where(strange, FIRST + KINDS + which, NOTHING)
        there = jax.random.uniform(keys[3], (KINDS,)) < domain.crowd
        there = there.at[goals].set(True)
        spots = jax.lax.top_k(jax.random.uniform(keys[4], (cells,)), KINDS)[1]
        kinds = jnp.where(there, FIRST + jnp.arange(KINDS), ground[spots])
        tint = jax.random.normal(keys[5], COLOURS.shape) * domain.tint
        grain = (self.size, self.size, CELL, CELL)
        return World(
            agent=jax.random.randint(keys[6], (2,), 0, self.size),
            ground=ground.at[spots].set(kinds).reshape(self.size, self.size),
            goals=goals,
            carries=jnp.zeros((), bool),
            steps=jnp.zeros((), jnp.int32),
            floor=0.55 + domain.texture * jax.random.normal(keys[7], grain),
            colours=COLOURS + tint,
            light=1 + domain.light * jax.random.uniform(keys[8], (), minval=-1.0),
        )

    def observe(self, world: World) -> Seen:
        ground, floor = self._window(world)
        shape = jnp.asarray(SHAPES)[ground][..., None]
        colour = world.colours[ground][..., None, None, :]
        cells = jnp.where(shape > 0, colour, floor[..., None]) * world.light
        image = jnp.clip(cells, 0, 1).transpose(0, 2, 1, 3, 4)
        side = self.view * CELL
        task = jnp.append(world.goals, world.carries.astype(jnp.int32))
        return Seen(image.reshape(side, side, 3), task)

    def step(self, world: World, action: Int[Array, ""]) -> tuple[World, Outcome]:
        """Move, or act: pick up the first goal, put it down on the second.

        To act anywhere else ends the episode, as does the limit. In navigation to act
        on the goal is success.
        """
        acts = action == ACT
        move = jnp.where(acts, 0, jnp.asarray(MOVES)[jnp.minimum(action, ACT - 1)])
        agent = jnp.clip(world.agent + move, 0, self.size - 1)
        right = acts & (self.distance(world) == 0)
        picks = right & ~world.carries & self.displace
        success = right & ~picks
        before = self.distance(world)
        ground = jnp.where(
            picks & (world.ground == FIRST + world.goals[0]), NOTHING, world.ground
        )
        new = world._replace(
            agent=agent,
            ground=ground,
            carries=world.carries | picks,
            steps=world.steps + 1,
        )
        nearer = jnp.where(picks, 0, before - self.distance(new))
        reward = 0.1 * nearer - 0.001 + success
        done = (acts & ~picks) | (new.steps >= self.limit)
        return new, Outcome(reward.astype(jnp.float32), done, success)

    def places(self, world: World) -> Int[Array, "k 2"]:
        """Row and column of each kind; those of one that is not there mean nothing."""
        kinds = FIRST + jnp.arange(KINDS)
        there = (world.ground == kinds[:, None, None]).reshape(KINDS, -1)
        return jnp.stack(jnp.divmod(jnp.argmax(there, -1), self.size), -1)

    def sought(self, world: World) -> Int[Array, " 2"]:
        """Row and column of the thing to go to next."""
        return self.places(world)[world.goals[world.carries.astype(jnp.int32)]]

    def distance(self, world: World) -> Int[Array, ""]:
        """Moves to the thing to go to next: nothing stands in the way."""
        return jnp.abs(self.sought(world) - world.agent).sum()

    def expert(self, world: World) -> Float[Array, " 5"]:
        """All actions that lie on a shortest path, with equal chances."""
        row, column = self.sought(world) - world.agent
        good = jnp.stack(
            [row < 0, row > 0, column < 0, column > 0, (row == 0) & (column == 0)]
        )
        return good / good.sum()

    def visible(self, world: World) -> Bool[Array, " k"]:
        """Which of the KINDS are in the picture."""
        kinds = FIRST + jnp.arange(KINDS)
        return jnp.any(self._window(world)[0] == kinds[:, None, None], (1, 2))

    def _window(self, world: World):
        """Ground and floor of the cells in view; there is a wall around the room."""
        reach = self.view // 2
        pads = ((reach, reach), (reach, reach))
        ground = jnp.pad(world.ground, pads, constant_values=WALL)
        floor = jnp.pad(world.floor, (*pads, (0, 0), (0, 0)))
        start = (world.agent[0], world.agent[1])
        seen = jax.lax.dynamic_slice(ground, start, (self.view, self.view))
        shape = (self.view, self.view, CELL, CELL)
        return seen, jax.lax.dynamic_slice(floor, (*start, 0, 0), shape)
