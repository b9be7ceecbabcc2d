"""Training of small regressors under information-bottleneck objectives, many at once.

An encoder of two hidden layers gives a code, a decoder of one reads it. A whole run is
one `lax.scan`; runs of one method differ in data, seed and what is tuned (weight of the
penalty, learning rate, widths of kernels), which are numbers, so that a whole search is
one program: `train` maps it over all of them. The epoch with the least squared error on
the validation part is kept. Studies of several papers share this.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from narrows.data.tables import Split
from narrows.ib.divergences import cs_qmi
from narrows.ib.kernels import spread
from narrows.ib.objectives.protocol import Objective, Sample, draw, loss_of

Params = dict[str, Any]
Arrays = Array | np.ndarray
LEAST_SCALE = 1e-3  # of a code's noise
MEASURED = 512  # training rows on which information is measured


class Network(NamedTuple):
    width: int  # of hidden layers
    code: int


class Shape(NamedTuple):
    network: Network
    batch: int
    epochs: int
    together: int = 5  # runs that share one matrix product; results do not depend on it
    absolute: bool = False  # validate by absolute error, where labels have long tails


class Dials(NamedTuple):
    """What may be tuned of a run, numbers or arrays of runs; `Method` says what of."""

    beta: Any
    learning_rate: Any
    first: Any = 1.0  # a width of kernels, or whatever else the method has
    second: Any = 1.0


Method = Callable[[Dials], Objective]  # what noise it needs may not depend on dials


class Task(NamedTuple):
    """Parts of a split as arrays, features padded with zeros to a common number."""

    x: Float[Arrays, "n d"]
    y: Float[Arrays, "n 1"]
    valid_x: Float[Arrays, "m d"]
    valid_y: Float[Arrays, "m 1"]
    test_x: Float[Arrays, "l d"]
    test_y: Float[Arrays, "l 1"]


class Run(NamedTuple):
    """What is kept of one run; leading axis: runs."""

    params: Params  # of the best epoch
    valid: Float[Array, " r"]  # squared or absolute error, of standardised labels
    test_mse: Float[Array, " r"]
    train_mse: Float[Array, " r"]
    compression: Float[Array, " r"]  # the objective's own, on training rows, its unit
    cs_information: Float[Array, " r"]  # I_CS(x; code) of the same rows, nats
    epoch: Array


def task_of(split: Split, features: int, test_rows: int) -> Task:
    """Raises: ValueError where the split has more features than that."""
    if split.train.x.shape[1] > features:
        raise ValueError(
            f"features: {features}, but the split has {split.train.x.shape[1]}"
        )

    def padded(x):
        return np.pad(x, ((0, 0), (0, features - x.shape[1])))

    test = split.test.x[:test_rows], split.test.y[:test_rows]
    return Task(
        padded(split.train.x),
        split.train.y,
        padded(split.valid.x),
        split.valid.y,
        padded(test[0]),
        test[1],
    )


def stacked(tasks: Sequence[Task]) -> Task:
    """Tasks of one size as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def _layers(key, sizes) -> dict[str, tuple[Array, Array]]:
    """He initialisation; zero biases. Layers by number, the last is "out"."""
    keys = jax.random.split(key, len(sizes) - 1)
    names = (*map(str, range(len(sizes) - 2)), "out")
    return {
        name: (jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o))
        for name, k, i, o in zip(names, keys, sizes, sizes[1:], strict=False)
    }


def _mlp(layers, x):
    for number in range(len(layers) - 1):
        w, b = layers[str(number)]
        x = jax.nn.relu(x @ w + b)
    w, b = layers["out"]
    return x @ w + b


def init(key, features: int, network: Network, objective: Objective) -> Params:
    keys = jax.random.split(key, 3)
    width, code = network
    codes = code * (2 if objective.noise == "own" else 1)
    encoder = _layers(keys[0], (features, width, width, codes))
    # Codes start at the size of the noise: a mixture bound far above it has no slope.
    encoder["out"] = jax.tree.map(lambda a: a * code**-0.5, encoder["out"])
    params: Params = {
        "encoder": encoder,
        "decoder": _layers(keys[1], (code, width, 1)),
        "noise": jnp.full((), 0.5413),  # softplus: a scale of 1
    }
    if objective.backward:
        params["backward"] = _layers(keys[2], (1, width, 2 * code))
    return params


def _law(raw, noise):
    """Mean and scale; an input far from all others would bring the scale to 0."""
    mean, scale = jnp.split(raw, 2, -1)
    return mean, jnp.maximum(jax.nn.softplus(scale + noise), LEAST_SCALE)


def encode(params: Params, x, objective: Objective):
    """Mean and scale of the code's law; None without noise."""
    raw = _mlp(params["encoder"], x)
    if objective.noise == "own":
        return _law(raw, params["noise"])
    scale = jax.nn.softplus(params["noise"]) if objective.noise == "shared" else None
    return raw, scale


def predict(params: Params, x, objective: Objective) -> Float[Array, "n 1"]:
    """At the code's mean: noise is for training."""
    return _mlp(params["decoder"], encode(params, x, objective)[0])


def sample(params: Params, x, y, key, objective: Objective) -> Sample:
    mean, scale = encode(params, x, objective)
    code = draw(key, mean, scale)
    seen = jax.lax.stop_gradient(code) if objective.detached else code
    backward = None
    if objective.backward:
        backward = _law(_mlp(params["backward"], y), jnp.zeros(()))
    return Sample(x, y, _mlp(params["decoder"], seen), code, mean, scale, backward)


def _run(task: Task, dials: Dials, seed, *, shape: Shape, method: Method) -> Run:
    objective = method(dials)
    rows, features = task.x.shape
    steps = rows // shape.batch
    tx = optax.adam(dials.learning_rate)
    key = jax.random.key(seed)
    params = init(key, features, shape.network, objective)

    def mse(params, x, y):
        return jnp.mean(jnp.square(predict(params, x, objective) - y))

    def step(carry, inputs):
        params, state = carry
        index, key = inputs

        def loss(params):
            batch = sample(params, task.x[index], task.y[index], key, objective)
            return loss_of(objective, batch, dials.beta).loss

        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, inputs):
        params, state, best, best_error, best_epoch = carry
        number, key = inputs
        one, two = jax.random.split(key)
        index = jax.random.permutation(one, rows)[: steps * shape.batch]
        index = index.reshape(steps, shape.batch)
        keys = jax.random.split(two, steps)
        (params, state), _ = jax.lax.scan(step, (params, state), (index, keys))
        error = predict(params, task.valid_x, objective) - task.valid_y
        valid = jnp.mean(jnp.abs(error) if shape.absolute else jnp.square(error))
        better = valid < best_error  # never for a NaN
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, best)
        best_error = jnp.where(better, valid, best_error)
        best_epoch = jnp.where(better, number, best_epoch)
        return (params, state, best, best_error, best_epoch), None

    keys = jax.random.split(jax.random.fold_in(key, 1), shape.epochs)
    none = jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
    start = (params, tx.init(params), params, *none)
    count = jnp.arange(shape.epochs, dtype=jnp.int32)
    end, _ = jax.lax.scan(epoch, start, (count, keys))
    best = end[2]
    x, y = task.x[:MEASURED], task.y[:MEASURED]
    seen = sample(best, x, y, jax.random.fold_in(key, 2), objective)
    return Run(
        params=best,
        valid=end[3],
        test_mse=mse(best, task.test_x, task.test_y),
        train_mse=mse(best, task.x, task.y),
        compression=objective.compression(seen),
        cs_information=cs_qmi(seen.x, seen.code, width_t=spread()),
        epoch=end[4],
    )


@functools.partial(jax.jit, static_argnames=("shape", "method"))
def train(tasks: Task, which, dials: Dials, seeds, *, shape: Shape, method: Method):
    """Run i on tasks[which[i]] with dials[i] and seeds[i]: a `Run` with a leading axis.

    Leaves of tasks and of dials have a leading axis, too: of tasks, of runs.
    """

    def one(inputs):
        index, dials, seed = inputs
        task = jax.tree.map(lambda leaf: leaf[index], tasks)
        return _run(task, dials, seed, shape=shape, method=method)

    return jax.lax.map(one, (which, dials, seeds), batch_size=shape.together)


def attack(
    params: Params, x, y, objective: Objective, *, radius, step, steps: int
) -> Float[Array, "n d"]:
    """Inputs within `radius` (maximum norm) of x, `steps` signed gradient steps away.

    One step of the radius itself is FGSM, more of them PGD; of squared error, nothing
    is clipped. Columns that are constant are padding and stay.
    """
    moved = (x.std(0) > 0).astype(x.dtype)

    def loss(z):
        return jnp.square(predict(params, z, objective) - y).sum()

    def once(_, z):
        z = z + step * jnp.sign(jax.grad(loss)(z)) * moved
        return x + jnp.clip(z - x, -radius, radius)

    return jax.lax.fori_loop(0, steps, once, x)


@functools.partial(jax.jit, static_argnames=("objective", "steps"))
def attacked_mse(
    params: Params, tasks: Task, which, radii, *, objective: Objective, steps: int = 1
) -> Float[Array, "r e"]:
    """Test squared error of each run under each radius; params with a leading axis."""

    def one(inputs):
        params, index = inputs
        task = jax.tree.map(lambda leaf: leaf[index], tasks)

        def of(radius):
            size = radius if steps == 1 else radius / 4
            z = attack(
                params,
                task.test_x,
                task.test_y,
                objective,
                radius=radius,
                step=size,
                steps=steps,
            )
            return jnp.mean(jnp.square(predict(params, z, objective) - task.test_y))

        return jax.lax.map(of, radii)

    return jax.lax.map(one, (params, which))
