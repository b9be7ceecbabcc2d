"""What one joint energy over concepts and classes answers (arXiv:2401.14142, Sec. 3).

Exact answers sum over all 2^k patterns of concepts by log-sum-exp. `infer` searches the
likeliest state by the gradient of the relaxed energy, for any number of concepts.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from . import contract


class Found(NamedTuple):
    """A minimum of the energy; the state is hard, the probabilities are relaxed."""

    concepts: Float[Array, "*b k"]  # probabilities; the truth where it was set
    classes: Float[Array, "*b m"]  # probabilities
    odds: Float[Array, "*b k"]  # the searched logits of the concepts
    state: Int[Array, "*b k"]  # 0 or 1
    label: Int[Array, "*b"]
    energy: Float[Array, "*b"]  # of state and label


def patterns(k: int) -> Int[np.ndarray, "patterns k"]:
    """All 2^k concept vectors, the last concept turning fastest."""
    return np.array(list(itertools.product((0, 1), repeat=k)), np.int32)


def mix(v: Float[Array, "2 k h"], concepts: Float[Array, "*b k"]):
    """(1 - c_k) v[0, k] + c_k v[1, k]: an embedding itself where c_k is 0 or 1."""
    return v[0] + concepts[..., None] * (v[1] - v[0])


def log_joint(model, x: Float[Array, "*b d"]) -> Float[Array, "*b patterns m"]:
    """log p(c, y | x) in nats."""
    energy = model.joint_energy(x)
    return -energy - jax.nn.logsumexp(-energy, (-2, -1), keepdims=True)


def clamp(
    table: Float[Array, "*b patterns m"],
    truth: Float[Array, "*b k"] | None,
    mask: Bool[Array, "*b k"] | None,
) -> Float[Array, "*b patterns m"]:
    """log p(c, y | x, concepts set) (Prop. 3.1): the patterns that agree, rescaled."""
    if (truth is None) != (mask is None):
        raise ValueError("truth and mask: one without the other, but they go together")
    if truth is None or mask is None:
        return table
    every = jnp.asarray(patterns(truth.shape[-1]))
    agree = (every == (truth[..., None, :] > 0.5)) | ~mask[..., None, :]
    table = jnp.where(jnp.all(agree, -1)[..., None], table, -jnp.inf)
    return table - jax.nn.logsumexp(table, (-2, -1), keepdims=True)


def marginals(table: Float[Array, "*b patterns m"]):
    """p(c_k = 1) [*b, k] and log p(y) [*b, m] of a log joint."""
    each = jnp.exp(jax.nn.logsumexp(table, -1))
    every = patterns(int(np.log2(table.shape[-2]))).astype(np.float32)
    return jnp.clip(each @ every, 0.0, 1.0), jax.nn.logsumexp(table, -2)


def likeliest(table: Float[Array, "*b patterns m"]) -> Float[Array, "*b k"]:
    """argmax_c p(c): the pattern that is most often right as a whole, of 0 and 1.

    Concepts that are each likelier than not need not go together: where no single
    pattern is likely, thresholds of marginals make one that never occurs.
    """
    every = jnp.asarray(patterns(int(np.log2(table.shape[-2]))), jnp.float32)
    return every[jnp.argmax(jax.nn.logsumexp(table, -1), -1)]


def population(
    model, x: Float[Array, "n d"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, "patterns m"]:
    """p(c, y): the mean of p(c, y | x) over unmasked rows (Prop. 3.2)."""
    if mask is None:
        return jnp.exp(log_joint(model, x)).mean(0)
    each = jnp.exp(log_joint(model, jnp.where(mask[:, None], x, 0.0)))
    keep = mask.astype(jnp.float32)
    return jnp.einsum("npm,n->pm", each, keep) / jnp.maximum(keep.sum(), 1.0)


def conditional(
    table: Float[Array, "patterns m"],
    names: tuple[str, ...],
    event: dict[str, int],
    given: dict[str, int] | None = None,
) -> Float[Array, ""]:
    """p(event | given), both by name, of a joint p(c, y) (Prop. 3.2 to 3.5).

    The name "class" stands for y. NaN where what is given has no probability.
    Raises ValueError for an unknown name or value, or a name in both.

    >>> table = jnp.asarray([[0.1, 0.2], [0.3, 0.4]])
    >>> round(float(conditional(table, ("wing",), {"wing": 1}, {"class": 0})), 3)
    0.75
    """
    given = given or {}
    twice = event.keys() & given.keys()
    if twice:
        raise ValueError(f"event and given: {sorted(twice)} stand in both")
    condition = _where(table, names, given)
    both = _where(table, names, event) & condition
    return jnp.sum(table * both) / jnp.sum(table * condition)


def infer(
    model,
    x: Float[Array, "*b d"],
    truth: Float[Array, "*b k"] | None = None,
    mask: Bool[Array, "*b k"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    steps: int = 100,
    learning_rate: float = 0.2,
    restarts: int = 8,
) -> Found:
    """Minimise E(x, c, y) over relaxed c and y by Adam, all together (Sec. 3.3).

        c = sigmoid(a), y = softmax(s);  min over a, s of E(x, mix(v, c), y u)

    Concepts that are set stay at their truth and pull the others through E_global. Each
    restart ends in the nearest hard state, and a row keeps the one of least energy. The
    first starts at a = s = 0; others where x by itself would draw concepts and class:
    at the log odds of E_k and the logits of E_class, with logistic and Gumbel noise by
    the key (default: key 0), so that all that E_global may prefer is visited.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(
            f"steps, restarts: {steps}, {restarts}, but both must be at least 1"
        )
    x = x.astype(jnp.float32)
    rows, k, m = x.shape[:-1], len(model.names), model.class_embedding.shape[0]
    one, two = model.by_class(x), model.by_concept(x)
    units, u = model.concept_units(), model.class_units()
    a, b, g = model.weights

    def energy(c, y):
        each = model.concept_energies(two, mix(units, c)).sum(-1)
        mixed = y @ u
        together = model.global_energy(mix(model.concept_embedding[...], c), mixed)
        return a * model.class_energy(one, mixed) + b * each + g * together

    def relaxed(logits):
        c = contract.intervene(jax.nn.sigmoid(logits[0]), truth, mask)
        return c, jax.nn.softmax(logits[1])

    tx = optax.adam(learning_rate)

    def step(carry, _):
        logits, state = carry
        # Rows do not touch, so that the sum's gradient is each row's own.
        gradient = jax.grad(lambda l: energy(*relaxed(l)).sum())(logits)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), None

    def search(start):
        (logits, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, steps)
        c, y = relaxed(logits)
        hard = jnp.round(c)
        label = jnp.argmax(y, -1)
        reached = energy(hard, jax.nn.one_hot(label, m))
        return Found(c, y, logits[0], hard.astype(jnp.int32), label, reached)

    keys = jax.random.split(jax.random.key(0) if key is None else key)
    by_class, by_concept = model.parts(x)
    odds = b * (by_concept[..., 0] - by_concept[..., 1])
    odds = odds + 2.0 * jax.random.logistic(keys[0], (restarts, *rows, k))
    logits = jax.random.gumbel(keys[1], (restarts, *rows, m)) - a * by_class
    starts = (odds.at[0].set(0.0), logits.at[0].set(0.0))
    found = jax.lax.map(search, starts)
    best = jnp.argmin(found.energy, 0)
    return jax.tree.map(lambda leaf: _pick(leaf, best), found)


def _pick(leaf, best):
    index = best.reshape(1, *best.shape, *[1] * (leaf.ndim - 1 - best.ndim))
    return jnp.take_along_axis(leaf, index, 0)[0]


def _where(table, names, said: dict[str, int]) -> Bool[np.ndarray, "patterns m"]:
    every, m = patterns(len(names)), table.shape[-1]
    chosen = np.ones(table.shape, bool)
    for name, value in said.items():
        allowed = range(m) if name == "class" else range(2)
        if value not in allowed:
            raise ValueError(
                f"{name}: {value}, but allowed are 0 to {len(allowed) - 1}"
            )
        if name == "class":
            chosen &= np.arange(m) == value
        else:
            column = contract.columns(names, name)[0]
            chosen &= (every[:, column] == value)[:, None]
    return chosen
