"""The rules of the small world, its pictures, and the way its expert takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data import gridworld
from narrows.data.gridworld import (
    ACT,
    ACTIONS,
    CELL,
    FIRST,
    KINDS,
    NOTHING,
    PLAIN,
    SHIFTED,
    WALL,
    Gridworld,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOMS = {
    "find": Gridworld(),
    "carry": Gridworld(displace=True, limit=24),
    "wide": Gridworld(size=7, limit=20),
}
KEYS = jax.random.split(jax.random.key(0), 200)


@functools.cache
def programs(name):
    """reset of many worlds, and a step of them with all that can be asked."""
    room = ROOMS[name]

    def look(world):
        seen = room.observe(world)
        return seen, room.expert(world), room.distance(world), room.visible(world)

    return (
        jax.jit(jax.vmap(room.reset, in_axes=(0, None))),
        jax.jit(jax.vmap(look)),
        jax.jit(jax.vmap(room.step)),
    )


def play(name, choose, domain=PLAIN):
    """Worlds and outcomes over an episode; `choose(time, expert) -> actions`."""
    reset, look, step = programs(name)
    world = reset(KEYS, domain)
    for time in range(ROOMS[name].limit):
        seen, expert, distance, _ = look(world)
        new, outcome = step(world, choose(time, expert))
        yield world, seen, distance, new, outcome
        world = new


@pytest.mark.parametrize("name", ROOMS)
def test_the_expert_succeeds_by_a_shortest_path(name):
    """As many steps as the way is long, an act for each goal."""
    rng = np.random.default_rng(0)

    def choose(_, expert):
        noise = rng.gumbel(size=expert.shape)
        return jnp.argmax(jnp.log(expert) + noise, -1)

    alive, steps, total = np.ones(len(KEYS), bool), np.zeros(len(KEYS)), 0.0
    for time, (world, _, _, _, outcome) in enumerate(play(name, choose)):
        if time == 0:
            way = shortest(world, ROOMS[name].displace)
        assert not np.any(alive & np.asarray(outcome.done & ~outcome.success))
        total += np.where(alive, outcome.reward, 0)
        steps += alive
        alive &= ~np.asarray(outcome.done)
    assert not alive.any()
    np.testing.assert_array_equal(steps, way)
    acts = 2 if ROOMS[name].displace else 1
    np.testing.assert_allclose(total, 1 + 0.1 * (way - acts) - 0.001 * steps, rtol=1e-4)


def shortest(world, displace):
    """Cells to walk and acts, counted in numpy."""
    way = []
    for ground, agent, goals in zip(
        *map(np.asarray, (world.ground, world.agent, world.goals)), strict=True
    ):
        first, second = (np.argwhere(ground == FIRST + g)[0] for g in goals)
        way.append(np.abs(first - agent).sum() + 1)
        way[-1] += (np.abs(second - first).sum() + 1) if displace else 0
    return np.array(way)


def test_actions_do_what_they_say():
    rng = np.random.default_rng(1)
    moves = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1), ACT: (0, 0)}
    for world, _, distance, new, outcome in play(
        "find", lambda *_: jnp.asarray(rng.integers(0, ACTIONS, len(KEYS)))
    ):
        del world, new
        assert jnp.all(outcome.success <= (distance == 0))
        assert jnp.all(outcome.success <= outcome.done)
    for action, move in moves.items():
        world, _, distance, new, outcome = next(
            play("find", lambda *_, a=action: jnp.full(len(KEYS), a))
        )
        expected = np.clip(np.asarray(world.agent) + move, 0, 4)
        assert np.array_equal(new.agent, expected)
        assert np.all(outcome.done == (action == ACT))
        assert np.array_equal(outcome.success, (distance == 0) & (action == ACT))
        assert np.array_equal(new.ground, world.ground)


def test_the_limit_ends_an_episode():
    done = [o.done for *_, o in play("find", lambda *_: jnp.zeros(len(KEYS), int))]
    assert not np.any(done[:-1])
    assert np.all(done[-1])


def test_what_is_carried_is_not_on_the_floor():
    reset, look, step = programs("carry")
    world = reset(KEYS, PLAIN)
    for _ in range(10):
        _, expert, distance, _ = look(world)
        before = world
        world, _ = step(world, jnp.argmax(expert, -1))
        here = jnp.any(
            world.ground == (FIRST + world.goals[:, 0])[:, None, None], (1, 2)
        )
        assert jnp.array_equal(here, ~world.carries)
        picked = world.carries & ~before.carries
        assert jnp.array_equal(picked, (distance == 0) & ~before.carries)
    seen = look(world)[0]
    assert jnp.array_equal(seen.task[:, 2], world.carries)


@pytest.mark.parametrize("domain", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_pictures_show_the_cells_around_the_agent(domain):
    """Each 4 x 4 square against the ground and colours it is drawn from, in numpy."""
    reset, look, _ = programs("find")
    world = reset(KEYS, domain)
    seen, _, _, visible = look(world)
    assert seen.image.shape == (len(KEYS), 20, 20, 3)
    assert 0 <= float(seen.image.min()) <= float(seen.image.max()) <= 1
    for n in range(20):
        one = jax.tree.map(lambda x, n=n: np.asarray(x[n]), world)
        found = set()
        for i in range(5):
            for j in range(5):
                row, column = one.agent[0] + i - 2, one.agent[1] + j - 2
                inside = 0 <= row < 5 and 0 <= column < 5
                what = one.ground[row, column] if inside else WALL
                found.add(what)
                grey = one.floor[row, column] if inside else np.zeros((CELL, CELL))
                shape = gridworld.SHAPES[what][..., None]
                square = shape * one.colours[what] + (1 - shape) * grey[..., None]
                square = np.clip(square * one.light, 0, 1)
                at = np.s_[n, CELL * i : CELL * (i + 1), CELL * j : CELL * (j + 1)]
                np.testing.assert_allclose(seen.image[at], square, atol=1e-6)
        assert [FIRST + k in found for k in range(KINDS)] == list(visible[n])
        for kind, place in enumerate(
            ROOMS["find"].places(jax.tree.map(lambda x, n=n: x[n], world))
        ):
            spots = np.argwhere(one.ground == FIRST + kind)
            assert spots.size == 0 or np.array_equal(spots, [place])


def test_a_domain_says_what_is_drawn():
    reset, *_ = programs("find")
    for domain in (PLAIN, SHIFTED):
        keys = jax.random.split(jax.random.key(5), 2000)
        world = reset(keys, domain)
        kinds = FIRST + np.arange(KINDS)
        there = np.any(world.ground[..., None] == kinds, (1, 2))
        goal = np.arange(KINDS) == world.goals[:, :1]
        assert there[goal].all()
        share = there[~goal].mean()  # of 14 000 drawn: five deviations are 0.02
        assert share == pytest.approx(domain.crowd, abs=0.025)
        strange = np.mean(world.ground >= FIRST + KINDS)
        cells = 1 - (1 + 7 * domain.crowd) / 25
        assert strange == pytest.approx(domain.strange * cells, abs=0.015)
        assert world.light.std() == pytest.approx(domain.light / 3**0.5, rel=0.1)
        assert world.floor.std() == pytest.approx(domain.texture, rel=0.05)


def test_every_kind_looks_different():
    looks = {
        (shape.tobytes(), colour.tobytes())
        for shape, colour in zip(gridworld.SHAPES, gridworld.COLOURS, strict=True)
    }
    assert len(looks) == FIRST + KINDS + gridworld.STRANGE
    assert not gridworld.SHAPES[NOTHING].any()


def test_one_key_gives_one_world_and_one_program_serves_all_domains():
    reset, _, _ = programs("wide")
    one, two = reset(KEYS, PLAIN), reset(KEYS, PLAIN)
    assert all(map(jnp.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))
    reset(KEYS, SHIFTED)
    assert reset._cache_size() == 1


@pytest.mark.parametrize("wrong", [{"size": 3}, {"view": 4}, {"limit": 0}])
def test_bad_rooms_are_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        dataclasses.replace(Gridworld(), **wrong)
