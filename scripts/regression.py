"""What `train_regression.py` trains: many regressors in one program, on any mesh.

Runs differ in weight, learning rate and seed and lie along the first axis of every
array; they share data and batches. A loss that compares the rows of a batch sees the
global batch, for jit shards the rows and not the loss.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from narrows.data.tables import Part
from narrows.ib.divergences import cs_qmi
from narrows.ib.kernels import median, spread
from narrows.ib.objectives.protocol import Objective, loss_of
from narrows.ib.objectives.table import make_objective
from narrows.parallel.rules import Rule
from narrows.parallel.step import Loss
from narrows.scripts.bottleneck_study import Network, init, predict, sample

# Widths over fsdp; what is as wide as the labels, biases and numbers are whole.
_PART = r"(best/)?(encoder|decoder|backward)/"
RULES = (
    Rule(_PART + r"\d/0", (None, None, "fsdp")),
    Rule(_PART + r"\d/1", None),
    Rule(_PART + "out/[01]", None),
    Rule(r"(best/)?noise|best_(mse|step)", None),
)
WIDTHS = {"spread": spread, "median": median}
WORDS = ("space", "inputs")


class Runs(NamedTuple):
    """One entry a run."""

    beta: Float[np.ndarray, " r"]
    learning_rate: Float[np.ndarray, " r"]
    seed: Any  # int32

    @property
    def number(self) -> int:
        return len(self.seed)


def grid(betas, rates, seeds: int, first: int = 0) -> Runs:
    """All of betas x learning rates x seeds, the seeds last."""
    cells = list(itertools.product(betas, rates, range(first, first + seeds)))
    columns = list(zip(*cells, strict=True))
    return Runs(
        np.array(columns[0], np.float32),
        np.array(columns[1], np.float32),
        np.array(columns[2], np.int32),
    )


def option_of(text: str) -> tuple[str, Any]:
    """`name=value`: a number, true, false, a rule of width such as spread:0.5, a word.

    Raises: ValueError for anything else.

    >>> option_of("normalized=false")
    ('normalized', False)
    """
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    if value in WORDS:
        return name, value
    rule, _, factor = value.partition(":")
    try:
        if rule in WIDTHS:
            return name, WIDTHS[rule](float(factor or 1))
        return name, float(value)
    except ValueError:
        raise ValueError(
            f"option: {text!r}, but it must be name=value with a number, true, false, "
            f"spread:factor, median:factor, {' or '.join(WORDS)}"
        ) from None


def objective_of(name: str, options: list[str]) -> Objective:
    """Raises: ValueError for another name or an option that the objective lacks."""
    given = dict(map(option_of, options))
    try:
        return make_objective(name, **given)
    except TypeError as error:
        raise ValueError(f"option: {name} takes no such option ({error})") from error


def start(runs: Runs, features: int, network: Network, objective: Objective):
    """init(key) -> (params, rest) of all runs; rest holds the best epoch's params."""

    def begin(key):
        def one(seed):
            return init(jax.random.fold_in(key, seed), features, network, objective)

        params = jax.vmap(one)(jnp.asarray(runs.seed))
        rest = {
            "best": jax.tree.map(jnp.zeros_like, params),
            "best_mse": jnp.full(runs.number, jnp.inf, jnp.float32),
            "best_step": jnp.zeros(runs.number, jnp.int32),
        }
        return params, rest

    return begin


def optimizer(runs: Runs) -> optax.GradientTransformation:
    """Adam with a learning rate for each run; runs do not see each other."""
    rates = jnp.asarray(runs.learning_rate)

    def scaled(updates, _):
        return jax.tree.map(
            lambda u: -rates.reshape(-1, *[1] * (u.ndim - 1)) * u, updates
        )

    return optax.chain(optax.scale_by_adam(), optax.stateless(scaled))


def loss(runs: Runs, objective: Objective) -> Callable:
    """The step's loss: the sum over runs of each one's loss of the global batch."""

    def of(params, rest, batch, key) -> Loss:
        del rest

        def one(params, beta, seed):
            drawn = jax.random.fold_in(key, seed)
            seen = sample(params, batch["x"], batch["y"], drawn, objective)
            return loss_of(objective, seen, beta)

        terms = jax.vmap(one)(params, runs.beta, runs.seed)
        rows = jnp.asarray(batch["y"].shape[0], jnp.float32)
        sums = {
            "prediction": terms.prediction.sum() * rows,
            "compression": terms.compression.sum() * rows,
        }
        return Loss(terms.loss.sum() * rows, rows, sums)

    return of


def judge(params, part: Part, objective: Objective) -> dict[str, Array]:
    """Errors of all runs on a part, at the code's mean.

    mse of standardised labels; correlation; I(t;y) = log2(Var y / mse) / 2 in bits,
    what a Gaussian error of this size leaves of the labels.
    """

    def one(params):
        found = predict(params, part.x, objective)
        mse = jnp.mean(jnp.square(found - part.y))
        a, b = found - found.mean(), part.y - part.y.mean()
        scale = jnp.sqrt(jnp.square(a).sum() * jnp.square(b).sum())
        return {
            "mse": mse,
            "correlation": (a * b).sum() / jnp.maximum(scale, 1e-12),
            "bits_label": 0.5 * jnp.log2(jnp.square(b).mean() / mse),
        }

    return jax.vmap(one)(params)


def informed(params, part: Part, key, objective: Objective) -> dict[str, Array]:
    """I(x;t) of all runs on a part: by the objective's own measure, and I_CS, nats."""

    def one(params):
        seen = sample(params, part.x, part.y, key, objective)
        return {
            "information": objective.compression(seen),
            "cs_information": cs_qmi(seen.x, seen.code, width_t=spread()),
        }

    return jax.lax.map(one, params)


def keep_best(rest: dict[str, Any], params, mse, step) -> dict[str, Any]:
    """rest with the params of those runs that have never validated better."""
    better = mse < rest["best_mse"]  # never for a NaN

    def choose(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return {
        "best": jax.tree.map(choose, params, rest["best"]),
        "best_mse": jnp.where(better, mse, rest["best_mse"]),
        "best_step": jnp.where(better, step, rest["best_step"]),
    }
