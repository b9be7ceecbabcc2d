"""A game of a transformer against an adversary of its embeddings, on real text.

min over parameters, max over delta in a ball, of the mean loss where the same delta
[t, d] is added to the embeddings of every row: a saddle point that workers share, as
the claims about variational inequalities measure it. All parameters are one vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from narrows.data.text import load_corpus
from narrows.models.bottleneck import Open, Waist
from narrows.models.language_model import token_nats
from narrows.models.transformer import Transformer, TransformerConfig

LENGTH, WIDTH, ROWS, WORKERS = 32, 32, 8, 4
RADIUS = 1.0  # of the ball of every position's delta; an embedding has norm 5.7
CONFIG = TransformerConfig(
    depth=1, width=WIDTH, heads=1, mlp_width=64, max_len=LENGTH, vocab_size=256
)


class Adversary(nnx.Module):
    """A waist that adds to every row of embeddings the same delta [t, d]."""

    def __init__(self, length: int, width: int):
        self.delta = nnx.Param(jnp.zeros((length, width)))
        self.open = Open()

    def __call__(self, x, mask=None) -> Waist:
        return self.open(x + self.delta[...], mask)

    def update(self, stats):
        return {}


def build(key):
    adversary = Adversary(LENGTH, WIDTH)
    return Transformer(CONFIG, waist=adversary, waist_at=0, rngs=nnx.Rngs(key))


def start(key):
    """(all parameters in one vector, delta), the two players, and their tree.

    Embeddings start with unit variance. At the model's own 0.02, behind a norm, their
    curvature is 2500 times as large, and plain gradient steps of any use diverge.
    """
    params = nnx.as_pure(nnx.split(build(key), nnx.Param, ...)[1])
    params["embed"]["embedding"] = params["embed"]["embedding"] / 0.02
    delta = params.pop("waist")["delta"]
    flat, unravel = ravel_pytree(params)
    return (flat, delta), unravel


@functools.cache
def objective():
    """(parameters, delta, windows [rows, t + 1]) -> mean nats of the next byte."""
    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]
    _, unravel = start(jax.random.key(0))

    def nats(flat, delta, windows):
        params = unravel(flat) | {"waist": {"delta": delta}}
        logits = nnx.merge(graph, params)(windows[:, :-1]).logits
        return token_nats(logits, windows[:, 1:]).mean()

    return nats


def in_ball(delta):
    norm = jnp.linalg.norm(delta, axis=-1, keepdims=True)
    return delta * jnp.minimum(1, RADIUS / jnp.maximum(norm, 1e-12))


@functools.cache
def _losses():
    nats = objective()

    def of(flat, windows):
        def ascend(_, delta):
            g = jax.grad(nats, argnums=1)(flat, delta, windows)
            norm = jnp.maximum(jnp.linalg.norm(g, axis=-1, keepdims=True), 1e-12)
            return in_ball(delta + RADIUS / 4 * g / norm)

        zero = jnp.zeros((LENGTH, WIDTH))
        delta = jax.lax.fori_loop(0, 20, ascend, zero)
        return nats(flat, delta, windows), nats(flat, zero, windows)

    return jax.jit(lambda flats, windows: jax.lax.map(lambda x: of(x, windows), flats))


def losses_of(flats, windows):
    """Of parameters [k, d]: against the delta of twenty steps of ascent, and clean."""
    return _losses()(flats, windows)


def deal(rng: np.random.Generator):
    """(windows [workers, rows, t + 1] of each one's part, and 32 drawn from all)."""
    tokens = load_corpus().splits["train"]
    part = len(tokens) // WORKERS
    starts = rng.integers(part - LENGTH, size=(WORKERS, ROWS))
    starts += np.arange(WORKERS)[:, None] * part
    other = rng.integers(len(tokens) - LENGTH, size=32)
    window = np.arange(LENGTH + 1)
    return (
        jnp.asarray(tokens[x[..., None] + window], jnp.int32) for x in (starts, other)
    )
