"""The agent: its encoder, what reaches its policy, arms that differ by the waist."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data.gridworld import ACTIONS, PLAIN, Gridworld
from narrows.models.agent import Agent, AgentConfig, Frozen, agent_parts, patches
from narrows.models.rl import ppo
from narrows.models.waists import make_waist

CONFIG = AgentConfig(features=8, compressed=(6, 4), joined=(6, 4), hidden=(12,))
WAIST = functools.partial(make_waist, "task_codebook", codes=8, code_width=3)
IMAGE = jax.random.uniform(jax.random.key(0), (6, 20, 20, 3))
pytestmark = pytest.mark.usefixtures("quick_compilation")
TASK = jnp.array([[k, k, 0] for k in range(6)])


@pytest.fixture(scope="module")
def arms(quick_jit):
    """name -> the agent with that waist."""
    made = {}
    for name, waist in {"open": None, "waist": WAIST}.items():
        parts = agent_parts(CONFIG, *([] if waist is None else [waist]))
        params, rest = quick_jit(parts.init)(jax.random.key(3))
        made[name] = nnx.merge(parts.graph, params, rest)
    return made


def test_patches_are_a_convolution_whose_stride_is_its_size():
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 3, 7))
    expected = jax.lax.conv_general_dilated(
        IMAGE, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = patches(IMAGE, 4) @ kernel.reshape(-1, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_arms_differ_by_their_waist_alone(arms):
    one, two = (nnx.as_pure(nnx.state(arms[name])) for name in ("open", "waist"))
    shared = set(one) & set(two)
    assert shared == set(one)
    assert set(two) - shared == {"waist"}
    for name in shared - {"waist"}:
        for a, b in zip(*map(jax.tree.leaves, (one[name], two[name])), strict=True):
            assert jnp.array_equal(a, b)
    seen = [arms[name](IMAGE, TASK).seen for name in ("open", "waist")]
    assert jnp.array_equal(*seen)


def test_the_task_and_the_picture_reach_the_policy_by_the_waist_alone(arms, quick_jit):
    agent = arms["waist"]
    out = quick_jit(lambda agent: agent(IMAGE, TASK))(agent)
    assert out.logits.shape == (6, ACTIONS)
    assert out.value.shape == (6,)
    assert out.seen.shape == out.waist.z.shape == (6, CONFIG.width)
    centred = np.asarray(out.waist.z - agent.waist.outward.bias[...])
    assert np.linalg.svd(centred, compute_uv=False)[3] < 1e-5
    other = agent(IMAGE, TASK[::-1])
    assert jnp.all(jnp.abs(other.logits - out.logits).max(-1) > 0)
    agent = nnx.clone(agent)
    agent.waist.outward.kernel.set_value(jnp.zeros((3, CONFIG.width)))
    blind = agent(IMAGE, TASK)  # U = 0: nothing passes
    assert jnp.all(blind.logits == blind.logits[0])
    assert jnp.all(blind.value == blind.value[0])


def test_the_encoder_is_frozen(arms):
    frozen = nnx.state(arms["waist"], Frozen)
    assert [x.size for x in jax.tree.leaves(frozen)] == [48 * CONFIG.features]
    assert "encoder" not in nnx.state(arms["waist"], nnx.Param)


def test_ratios_are_one_before_the_first_step_though_codes_drop_out(arms, quick_jit):
    """An update draws what the rollout drew; without its keys it would not."""
    room, agent = Gridworld(), arms["waist"]
    world = ppo.Environment(
        lambda key: room.reset(key, PLAIN), room.observe, lambda s, a: step(room, s, a)
    )

    def act(seen, keys):
        out = agent(seen.image, seen.task, keys)
        return out.logits, out.value

    keys = jax.random.split(jax.random.key(0), 4)
    seen = quick_jit(lambda keys: ppo.collect(act, world, keys, 5))(keys)
    found = ppo.terms(*act(seen.observation, seen.keys), seen)
    np.testing.assert_allclose(found.policy, -seen.advantage, rtol=1e-4, atol=1e-5)
    assert found.divergence.max() < 1e-6
    calm = ppo.terms(*act(seen.observation, None), seen)
    assert calm.divergence.max() > 1e-6


def step(room, state, action):
    state, outcome = room.step(state, action)
    return state, outcome.reward, outcome.done


def test_bad_pictures_are_named(arms):
    with pytest.raises(
        ValueError, match=r"image: \(24, 24, 3\), but its sides must be 5"
    ):
        arms["open"](jnp.zeros((1, 24, 24, 3)), TASK[:1])
    with pytest.raises(ValueError, match="image: 18 x 20 pixels do not divide"):
        patches(jnp.zeros((18, 20, 3)), 4)


def test_it_takes_any_waist_of_its_width(quick_jit):
    waist = make_waist("fsq", CONFIG.width, codes=64, rngs=nnx.Rngs(0))
    agent = Agent(CONFIG, waist, rngs=nnx.Rngs(1))
    out = agent(IMAGE, TASK)
    assert out.logits.shape == (6, ACTIONS)
    assert out.waist.bits.shape == (6,)
