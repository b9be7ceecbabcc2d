"""What compositions share: states side by side, indices one after another."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .protocol import Quantized, Quantizer, State


def bundle(states: Sequence[State]) -> State:
    return State(tuple(s.params for s in states), tuple(s.memory for s in states))


def parts_of(state: State) -> list[State]:
    return [State(*pair) for pair in zip(*state, strict=True)]


def indices_of(parts: Sequence[Quantizer], indices) -> list[jax.Array]:
    """Each part's own of the joined indices."""
    return jnp.split(indices, np.cumsum([len(q.sizes) for q in parts])[:-1], -1)


def joined(outs: Sequence[Quantized], z) -> Quantized:
    """Indices one after another, losses added by name, stats side by side."""
    losses: dict[str, jax.Array] = {}
    for out in outs:
        for name, value in out.losses.items():
            losses[name] = losses.get(name, 0.0) + value
    indices = jnp.concatenate([out.indices for out in outs], -1)
    return Quantized(z, indices, losses, tuple(out.stats for out in outs))


def composed(
    parts: Sequence[Quantizer], width: int, code_width: int, **functions
) -> Quantizer:
    """A quantiser of parts with states of their own; `functions` say how x passes."""
    weights: dict[str, float] = {}
    for q in parts:
        for name, weight in q.weights.items():
            if weights.setdefault(name, weight) != weight:
                raise ValueError(
                    f"weights: {name!r} is {weights[name]} in one part and {weight} in "
                    "another, but parts add up one loss of each name; make them equal"
                )

    def init(key: jax.Array) -> State:
        keys = jax.random.split(key, len(parts))
        return bundle([q.init(key) for q, key in zip(parts, keys, strict=True)])

    def update(state: State, stats):
        new, report = [], {}
        for q, part, sums in zip(parts, parts_of(state), stats, strict=True):
            part, said = q.update(part, sums)
            new.append(part)
            for name, value in said.items():
                report[name] = report.get(name, 0.0) + value
        return bundle(new), report

    sizes = tuple(size for q in parts for size in q.sizes)
    return Quantizer(
        width, code_width, sizes, init, weights=weights, update=update, **functions
    )
