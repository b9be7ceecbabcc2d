"""Sampling text from a transformer, one position at a time through its cache."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .transformer import Transformer


def sample_logits(
    key: jax.Array,
    logits: Float[Array, "b v"],
    *,
    temperature: float | Array = 1.0,
    top_k: int = 0,
    top_p: float | Array = 1.0,
) -> Int[Array, " b"]:
    """Draw from softmax(logits / temperature) among the likeliest tokens.

    temperature 0 takes the likeliest. top_k > 0 keeps that many. top_p keeps the
    smallest set of tokens whose probability reaches top_p, always the likeliest one.
    """
    logits = logits.astype(jnp.float32)
    order = jnp.argsort(logits, axis=-1, descending=True)  # stable: ties to the first
    ranked = jnp.take_along_axis(logits, order, -1) / jnp.maximum(temperature, 1e-6)
    rank = jnp.arange(ranked.shape[-1])
    if top_k:
        ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    share = jax.nn.softmax(ranked, -1)
    before = jnp.cumsum(share, -1) - share  # probability of all likelier tokens
    keep = (before < top_p) | (rank == 0)
    drawn = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf), -1)
    drawn = jnp.where(temperature == 0, 0, drawn)
    return jnp.take_along_axis(order, drawn[:, None], -1)[:, 0].astype(jnp.int32)


def generate(
    model: Transformer,
    prompt: Int[Array, "b t"],
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> Int[Array, "b length"]:
    """`length` tokens after each prompt, by one compiled program.

    vocab_size masks what lies above it (the padding of a rounded-up vocabulary). Raises
    ValueError for options out of range and where learned positions have no room.
    """
    if length < 1 or prompt.shape[1] < 1:
        raise ValueError(
            f"length: {length} tokens after a prompt of {prompt.shape[1]}, but both "
            "must be at least 1"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}, but allowed are "
            "temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
        )
    size = model.config.vocab_size
    if vocab_size is not None and not 1 <= vocab_size <= size:
        raise ValueError(
            f"vocab_size: {vocab_size}, but the model knows 1..{size} tokens"
        )
    graph, state = nnx.split(model)
    return _generate(
        graph,
        nnx.as_pure(state),
        prompt,
        key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        length=length,
        top_k=top_k,
        vocab_size=vocab_size or size,
    )


@functools.partial(jax.jit, static_argnames=("graph", "length", "top_k", "vocab_size"))
def _generate(
    graph, state, prompt, key, temperature, top_p, *, length, top_k, vocab_size
):
    model = nnx.merge(graph, state)
    cache = model.empty_cache(prompt.shape[0], prompt.shape[1] + length)

    def draw(key, logits):
        logits = logits[..., :vocab_size]
        return sample_logits(
            key, logits, temperature=temperature, top_k=top_k, top_p=top_p
        )

    out = model(prompt, cache=cache)
    token = draw(jax.random.fold_in(key, 0), out.logits[:, -1])

    def step(carry, index):
        token, cache = carry
        out = model(token[:, None], cache=cache)
        new = draw(jax.random.fold_in(key, index), out.logits[:, -1])
        return (new, out.cache), token

    last, tokens = jax.lax.scan(step, (token, out.cache), jnp.arange(1, length))
    return jnp.concatenate([tokens.T, last[0][:, None]], axis=1)
