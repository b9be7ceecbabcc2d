"""Which concept a person is asked for next, and what each answer gains.

A policy is `policy(model, x, prediction, truth, mask, key) -> scores [b, k]`: the
concept (or group) of the highest score is asked for next. `curve` asks one after
another, and the model sees each answer before the next question.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from . import contract
from .contract import ConceptModel, Labels, Prediction

Policy = Callable[..., Float[Array, "b k"]]


class Curve(NamedTuple):
    """After 0, 1, ... questions; shares of unmasked rows."""

    asked: Float[Array, " q"]  # mean number of concepts set
    classes: Float[Array, " q"]  # right classes
    error: Float[Array, " q"]  # standard error of that share over rows
    others: Float[
        Array, " q"
    ]  # right known concepts among those not yet set; NaN: none


def chance(model, x, prediction: Prediction, truth, mask, key):
    """Any concept, each order as likely."""
    del model, x, truth, mask
    return jax.random.uniform(key, prediction.concepts.shape)


def uncertainty(model, x, prediction: Prediction, truth, mask, key):
    """The concept of which the model is least sure: entropy in nats."""
    del model, x, truth, mask, key
    p = jnp.clip(prediction.concepts, 1e-6, 1 - 1e-6)
    return -p * jnp.log(p) - (1 - p) * jnp.log1p(-p)


def cooperative(model: ConceptModel, x, prediction: Prediction, truth, mask, key):
    """Uncertainty plus how far the answer is expected to move the class.

    H(c_i) + sum_v p(c_i = v) |p(y* | c_i = v) - p(y*)|, y* the class predicted now
    (CooP, Chauhan et al. 2023, arXiv:2212.07430, Sec. 4, with both weights 1 and equal
    costs).
    """
    absent, present, now = _answered(model, x, prediction, truth, mask)
    p = prediction.concepts
    moved = (1 - p) * jnp.abs(absent - now) + p * jnp.abs(present - now)
    return uncertainty(model, x, prediction, truth, mask, key) + moved


def gradient(model: ConceptModel, x, prediction: Prediction, truth, mask, key):
    """The concept that moves the class most, whatever its answer is likely to be.

    |p(y* | c_i = 1) - p(y* | c_i = 0)|, y* the class predicted now: the slope of the
    class over the whole step from 0 to 1, so that a concept need not be a number in
    the model to have one.
    """
    del key
    absent, present, _ = _answered(model, x, prediction, truth, mask)
    return jnp.abs(present - absent)


def _answered(model: ConceptModel, x, prediction: Prediction, truth, mask):
    """p(y*) with each concept set to 0, to 1 [b, k], and as it is [b, 1]."""
    now = jax.nn.softmax(prediction.classes)
    likeliest = jnp.argmax(now, -1, keepdims=True)

    def then(i, value):
        asked = mask | (jnp.arange(mask.shape[-1]) == i)
        guess = jnp.where(mask, truth, value)
        said = jax.nn.softmax(model(x, guess, asked).classes)
        return jnp.take_along_axis(said, likeliest, -1)[..., 0]

    each = [[then(i, value) for i in range(mask.shape[-1])] for value in (0.0, 1.0)]
    absent, present = (jnp.stack(of, -1) for of in each)
    return absent, present, jnp.take_along_axis(now, likeliest, -1)


POLICIES: Mapping[str, Policy] = {
    "random": chance,
    "uncertainty": uncertainty,
    "cooperative": cooperative,
    "gradient": gradient,
}


def curve(
    model: ConceptModel,
    x: Float[Array, "b d"],
    labels: Labels,
    policy: str,
    *,
    key: Key[Array, ""],
    groups: Sequence[Sequence[str]] | None = None,
) -> Curve:
    """Ask until every concept is set; a group's concepts are set together.

    groups: names, each concept in exactly one; default each alone. A group scores the
        mean of its concepts. What is not known is never set: a person cannot answer.
    Raises ValueError for an unknown policy, or groups that do not part the concepts.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: {policy!r}, but allowed are {', '.join(POLICIES)}")
    groups = [[name] for name in model.names] if groups is None else groups
    found = [contract.columns(model.names, group) for group in groups]
    if sorted(j for of in found for j in of) != list(range(len(model.names))):
        raise ValueError(
            f"groups: {groups}, but each of {', '.join(model.names)} must be in one"
        )
    member = np.zeros((len(found), len(model.names)), np.float32)
    for row, of in zip(member, found, strict=True):
        row[of] = 1.0
    x = jnp.where(labels.mask[:, None], jnp.asarray(x, jnp.float32), 0.0)
    known = labels.known & labels.mask[:, None]
    truth = jnp.where(known, labels.concepts, 0.0)

    def measure(prediction, mask):
        said = contract.accuracy(prediction, labels)["classes"]
        n = jnp.maximum(jnp.sum(labels.mask), 1)
        right = (prediction.concepts > 0.5) == (truth > 0.5)
        open_ = known & ~mask
        others = jnp.where(jnp.any(open_), contract.mean(right, open_), jnp.nan)
        asked = contract.mean(mask.sum(-1).astype(jnp.float32), labels.mask)
        return asked, said, jnp.sqrt(said * (1 - said) / n), others

    def ask(carry, key):
        done, mask = carry
        prediction = model(x, truth, mask)
        score = POLICIES[policy](model, x, prediction, truth, mask, key)
        score = score @ member.T / member.sum(1)
        chosen = jnp.argmax(jnp.where(done, -jnp.inf, score), -1)
        done = done | jax.nn.one_hot(chosen, len(member), dtype=bool)
        mask = mask | (jnp.asarray(member)[chosen] > 0) & known
        return (done, mask), measure(model(x, truth, mask), mask)

    @jax.jit
    def run(keys):
        nothing = jnp.zeros(known.shape, bool)
        start = measure(model(x, truth, nothing), nothing)
        done = jnp.zeros((len(x), len(member)), bool)
        _, rest = jax.lax.scan(ask, (done, nothing), keys)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, rest)

    return Curve(*run(jax.random.split(key, len(member))))
