"""Small networks that learn the symmetric rule, many at once, looked at as they train.

A whole run is one `lax.scan` over the stretches between looks; networks of several
seeds are one program. What the reproduction of the information plane trains.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array
from narrows.ib.information_plane import gradient_phase, layer_outputs

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}
PROBES = 16  # batches whose gradients are compared


class Size(NamedTuple):
    steps: int
    batch: int
    learning_rate: float
    times: int
    rows: int  # patterns that stand for the law where pairs of rows are compared


class Dense(nnx.Module):
    """A layer after its activation, so that its output is what the plane shows."""

    def __init__(self, i: int, o: int, activation, *, rngs: nnx.Rngs):
        draw = jax.nn.initializers.truncated_normal(i**-0.5)
        self.linear = nnx.Linear(i, o, kernel_init=draw, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.activation(self.linear(x))


class Network(nnx.Module):
    def __init__(self, hidden: Sequence[int], activation, *, rngs: nnx.Rngs):
        sizes = (12, *hidden)
        pairs = itertools.pairwise(sizes)
        self.hidden = nnx.List([Dense(i, o, activation, rngs=rngs) for i, o in pairs])
        self.out = nnx.Linear(sizes[-1], 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = layer(x)
        return self.out(x)


class History(NamedTuple):
    """Leading axes: seeds, times."""

    layers: list[Array]  # outputs of the hidden layers on all patterns
    accuracy: Array  # on patterns that were not trained on
    phases: dict[str, Array]  # signal to noise of each hidden layer's gradients


@functools.partial(
    jax.jit, static_argnames=("hidden", "activation", "size", "share", "steps")
)
def train(keys, x, labels, *, hidden, activation, size, share, steps) -> History:
    """One network a key on `share` of the patterns; looked at before chosen steps."""
    known = int(share * len(x))
    tx = optax.adam(size.learning_rate)

    def one(key, y):
        first, second, third = jax.random.split(key, 3)
        order = jax.random.permutation(first, len(x))
        made = Network(hidden, ACTIVATIONS[activation], rngs=nnx.Rngs(second))
        graph, params = nnx.split(made)

        def loss(params, rows):
            logits = nnx.merge(graph, params)(x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, y[rows]
            ).mean()

        def rows_of(key):
            return order[jax.random.randint(key, (size.batch,), 0, known)]

        def step(i, carry):
            params, moments = carry
            rows = rows_of(jax.random.fold_in(third, i))
            updates, moments = tx.update(jax.grad(loss)(params, rows), moments, params)
            return optax.apply_updates(params, updates), moments

        def look(params, key):
            model = nnx.merge(graph, params)
            right = model(x).argmax(1) == y
            kept = order[known:] if known < len(x) else order
            probes = jax.vmap(lambda k: jax.grad(loss)(params, rows_of(k)))(
                jax.random.split(key, PROBES)
            )
            at = {
                str(i): gradient_phase(
                    probes["hidden"][i]["linear"]["kernel"][...],
                    params["hidden"][i]["linear"]["kernel"][...],
                ).signal_to_noise
                for i in range(len(hidden))
            }
            outputs = layer_outputs(model, x)
            layers = [outputs[f"hidden/{i}"] for i in range(len(hidden))]
            return History(layers, right[kept].mean(), at)

        def stretch(carry, ends):
            seen = look(carry[0], jax.random.fold_in(second, ends[0]))
            return jax.lax.fori_loop(ends[0], ends[1], step, carry), seen

        ends = jnp.array([steps, (*steps[1:], steps[-1])]).T
        return jax.lax.scan(stretch, (params, tx.init(params)), ends)[1]

    return jax.vmap(one)(keys, labels)
