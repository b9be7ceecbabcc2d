"""Concept models of several seeds at once: what the reproductions of them share.

Models, rows and labels carry a leading axis of seeds, and one compiled program trains
or asks all of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from narrows.models.concepts import contract, intervention, queries
from narrows.models.concepts.contract import Labels, make_labels
from narrows.models.concepts.fit import fit


class Trained(NamedTuple):
    """Models of one structure, a seed a row of `state`."""

    graph: Any
    state: Any

    def one(self, index: int):
        """The model of one seed."""
        return nnx.merge(self.graph, jax.tree.map(lambda a: a[index], self.state))


def stacked(parts: Sequence) -> Any:
    """One tree of arrays with a leading axis, of trees of equal shapes."""
    return jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *parts)


def labelled(draws: Sequence) -> tuple[jax.Array, Labels]:
    """Rows and labels of several draws with fields x, concepts and labels."""
    x = jnp.asarray(np.stack([draw.x for draw in draws]), jnp.float32)
    return x, stacked([make_labels(draw.concepts, draw.labels) for draw in draws])


def fit_seeds(
    make: Callable[[nnx.Rngs], nnx.Module],
    losses: Callable,
    x,
    labels: Labels,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    weights: Mapping[str, float],
    steps: int,
    **options,
) -> list[Trained]:
    """`fit` of a model for each seed on its own rows [seeds, n, d], at each rate.

    A rate is where a cosine schedule down to 0 begins.
    """
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

    def one(key, x, labels, rate):
        born, taught = jax.random.split(key)
        model, _ = fit(
            *(make(nnx.Rngs(born)), losses, x, labels),
            key=taught,
            weights=weights,
            steps=steps,
            learning_rate=optax.cosine_decay_schedule(rate, steps),
            **options,
        )
        return nnx.split(model)[1]

    every = jax.vmap(jax.vmap(one, (0, 0, 0, None)), (None, None, None, 0))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    states = jax.jit(every)(keys, x, labels, jnp.asarray(rates, jnp.float32))
    return [
        Trained(graph, jax.tree.map(lambda a, i=i: a[i], states))
        for i in range(len(rates))
    ]


def asking(function: Callable) -> Callable:
    """asks(trained, *arguments) -> function(model, *arguments) of each seed, in numpy.

    Arguments have an axis of seeds. Compiled once for each shape.
    """

    def one(graph, state, *of):
        return function(nnx.merge(graph, state), *of)

    @functools.partial(jax.jit, static_argnums=0)
    def every(graph, states, *of):
        # One after another: the tables of all seeds at once would fill the memory.
        return jax.lax.map(lambda a: one(graph, *a), (states, *of))

    def asks(trained: Trained, *of):
        return jax.tree.map(np.asarray, every(trained.graph, trained.state, *of))

    return asks


def best_of(trained: Sequence[Trained], scores: Sequence[np.ndarray]) -> Trained:
    """For each seed the model of the highest score, scores as [seeds] for each."""
    chosen = np.argmax(np.stack(scores), 0)
    rows = np.arange(len(chosen))
    state = jax.tree.map(
        lambda *leaves: jnp.stack(leaves)[chosen, rows], *[t.state for t in trained]
    )
    return Trained(trained[0].graph, state)


def pulled(model, pull):
    """The same energies with another weight of E_global; other models as they are."""
    if hasattr(model, "weights"):
        model = nnx.clone(model)
        model.weights = nnx.data((1.0, 1.0, pull))
    return model


def scored(model, pull, x, labels) -> dict[str, jax.Array]:
    """Accuracies. Of an exact energy the likeliest pattern answers for all at once."""
    model = pulled(model, pull)
    out = model(x)
    said = contract.accuracy(out, labels)
    if getattr(model, "inference", "") == "exact":
        whole = queries.likeliest(queries.log_joint(model, x))
        out = out._replace(concepts=whole)
        said["all_concepts"] = contract.accuracy(out, labels)["all_concepts"]
    return said


def corrected(model, pull, x, labels, near) -> dict[str, jax.Array]:
    """What concepts coupled to a corrected one gain in accuracy; classes as asked."""
    model = pulled(model, pull)
    truth = labels.concepts > 0.5
    right = (model(x).concepts > 0.5) == truth

    def after(one):
        mask = jnp.broadcast_to(one, truth.shape)
        then = (model(x, labels.concepts, mask).concepts > 0.5) == truth
        return (then.astype(jnp.float32) - right).mean(0)

    moved = jax.lax.map(after, jnp.eye(len(near), dtype=bool))
    key = jax.random.key(0)
    curve = intervention.curve(model, x, labels, "random", key=key).classes
    said = {f"classes after {i}": curve[i] for i in range(len(near) + 1)}
    return said | {"gain of neighbours": (moved * near).sum() / near.sum()}
