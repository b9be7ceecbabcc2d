"""A dependency over more than 1024 tokens, and one layer of attention that may see it.

A row holds 64 pairs (key, value), then 1472 other keys without a value, then 512
questions: keys whose value is asked for. Guessing one of 16 values costs log 16 nats.
A layer that sees all 2048 tokens can look the pair up; one that sees the last 512 sees
questions alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

KEYS, VALUES, QUESTIONS, LENGTH = 64, 16, 512, 2048
WIDTH, HEADS, BATCH = 64, 2, 2
SHAPES = {
    "key": (KEYS, WIDTH),
    "role": (3, WIDTH),
    "value": (VALUES + 1, WIDTH),
    "Q": (WIDTH, HEADS, WIDTH),
    "K": (WIDTH, HEADS, WIDTH),
    "V": (WIDTH, HEADS, WIDTH),
    "out": (HEADS * WIDTH, VALUES),
}


def draw(key):
    """Keys, roles (pair, other, question), shown values [LENGTH]; answers."""
    of_order, of_values, of_others, of_questions = jax.random.split(key, 4)
    others = LENGTH - KEYS - QUESTIONS
    order = jax.random.permutation(of_order, KEYS)
    values = jax.random.randint(of_values, (KEYS,), 0, VALUES)  # of order[i]
    between = jax.random.randint(of_others, (others,), 0, KEYS)
    asked = jax.random.randint(of_questions, (QUESTIONS,), 0, KEYS)
    role = jnp.concatenate(
        [jnp.full(n, i) for i, n in enumerate((KEYS, others, QUESTIONS))]
    )
    shown = jnp.where(role == 0, jnp.pad(values, (0, LENGTH - KEYS)), VALUES)
    answer = values[jnp.argsort(order)][asked]
    return jnp.concatenate([order, between, asked]), role, shown, answer


def loss(params, key, context: int):
    """Mean cross-entropy of the answers in nats, from the last `context` tokens."""
    from narrows.models.kernels.attention import attention

    keys, role, shown, answer = jax.vmap(draw)(jax.random.split(key, BATCH))
    x = params["key"][keys] + params["role"][role] + params["value"][shown]
    x = x[:, -context:]
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[name]) for name in "QKV")
    out = attention(q, k, v, is_causal=True, implementation="xla")
    logits = out[:, -QUESTIONS:].reshape(BATCH, QUESTIONS, -1) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()


@functools.cache
def trained(context: int, steps: int) -> Callable[[int], jax.Array]:
    """seed -> loss on fresh rows, in nats, after `steps` steps of Adam."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def run(seed):
        key = jax.random.key(seed)
        params = {}
        for i, (name, shape) in enumerate(SHAPES.items()):
            scale = shape[0] ** -0.5 if name in ("Q", "K", "V", "out") else 1.0
            of_name = jax.random.fold_in(key, i)
            params[name] = scale * jax.random.normal(of_name, shape)

        def step(carry, i):
            params, state = carry
            gradient = jax.grad(loss)(params, jax.random.fold_in(key, 100 + i), context)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        (params, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
        fresh = jax.random.split(jax.random.fold_in(key, 99), 8)
        return jax.lax.map(lambda key: loss(params, key, context), fresh).mean()

    return run
