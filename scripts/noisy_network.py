"""A convolutional network with noise before every layer, looked at as it trains.

What the reproduction of the lossy analysis trains: 8, 16 and 32 channels of 3 x 3 with
pooling, then 32 units, on grey pictures of 28 x 28.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from narrows.ib import lossy

CLASSES = 10
SIGMA = 0.1  # noise over the root mean square of what enters a layer


def windows(x):
    """The 3 x 3 places around each inner place: [n, h - 2, w - 2, 9 channels].

    With a dense layer of these, a convolution; so few channels take XLA's own
    convolutions on a CPU three times as long.
    """
    h, w = x.shape[1] - 2, x.shape[2] - 2
    shifted = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1)


def halved(x):
    """The largest of 2 x 2 places; an odd last row or column is left out."""
    n, h, w, channels = x.shape
    even = x[:, : h // 2 * 2, : w // 2 * 2]
    return even.reshape(n, h // 2, 2, w // 2, 2, channels).max((2, 4))


class Noisy(nnx.Module):
    """Three convolutions and two dense layers, noise before each of them."""

    def __init__(self, *, rngs: nnx.Rngs):
        sizes = (1, 8, 16, 32)
        self.convolutions = nnx.List(
            [nnx.Linear(9 * i, o, rngs=rngs) for i, o in itertools.pairwise(sizes)]
        )
        self.dense = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x, key, sigma):
        """Logits, and what each layer passes on, noise and all: [n, features] each."""
        layers = []

        def noisy(h):
            return lossy.inject(jax.random.fold_in(key, len(layers)), h, sigma)

        x = noisy(x)
        layers.append(x.reshape(len(x), -1))
        for layer in self.convolutions:
            x = noisy(jax.nn.leaky_relu(halved(layer(windows(x)))))
            layers.append(x.reshape(len(x), -1))
        x = noisy(jax.nn.leaky_relu(self.dense(layers[-1])))
        layers.append(x)
        logits = self.out(x)
        return logits, [*layers[1:], logits]


@functools.partial(jax.jit, static_argnames=("batch", "looks"))
def train(key, x, y, *, batch: int, looks: tuple[int, ...]):
    """Parameters at every look, and the mean loss of the steps to the next one.

    The last loss is 0: nothing follows.
    """
    first, second = jax.random.split(key)
    graph, params = nnx.split(Noisy(rngs=nnx.Rngs(first)))
    tx = optax.adam(1e-3)

    def loss(params, rows, key):
        logits, _ = nnx.merge(graph, params)(x[rows], key, SIGMA)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(i, carry):
        params, moments, total = carry
        choose, noise = jax.random.split(jax.random.fold_in(second, i))
        rows = jax.random.randint(choose, (batch,), 0, len(x))
        value, slope = jax.value_and_grad(loss)(params, rows, noise)
        updates, moments = tx.update(slope, moments, params)
        return optax.apply_updates(params, updates), moments, total + value

    def stretch(carry, ends):
        params, moments = carry
        start = (params, moments, jnp.zeros(()))
        *carry, total = jax.lax.fori_loop(ends[0], ends[1], step, start)
        return tuple(carry), (params, total / jnp.maximum(ends[1] - ends[0], 1))

    ends = jnp.array([looks, (*looks[1:], looks[-1])]).T
    return jax.lax.scan(stretch, (params, tx.init(params)), ends)[1]


@jax.jit
def layers_of(params, key, x, sigma):
    graph = nnx.split(nnx.eval_shape(lambda: Noisy(rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graph, params)(x, key, sigma)
