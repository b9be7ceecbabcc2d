"""A network that is trained end to end and then gives its features, unchanged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from narrows.models.concepts import contract
from narrows.models.concepts.cbm import Perceptron
from narrows.models.concepts.fit import fit
from narrows.scripts.concept_tasks import Task

WIDTH = 128  # features


class Frozen(NamedTuple):
    """A trained network, and the features that it gives to each part of a task."""

    network: Perceptron
    learn: np.ndarray
    banked: np.ndarray
    test: np.ndarray


def class_nats(model, x, labels, key):
    del key
    return {"classes": contract.class_loss(model(x), labels)}


def freeze(task: Task, steps: int, seed: int, targets=None, classes=None) -> Frozen:
    """Train a network of WIDTH ReLUs end to end; its ReLUs are the frozen features."""
    x = task.learn.x
    y = task.learn.labels if targets is None else targets
    network, _ = fit(
        Perceptron(
            x.shape[1], classes or int(y.max()) + 1, hidden=WIDTH, rngs=nnx.Rngs(seed)
        ),
        class_nats,
        x,
        contract.make_labels(np.zeros((len(x), 1)), y),
        key=jax.random.key(seed),
        weights={"classes": 1.0},
        steps=steps,
        learning_rate=3e-3,
    )
    parts = [features(network, of.x) for of in (task.learn, task.banked, task.test)]
    return Frozen(network, *parts)


def features(network: Perceptron, x) -> np.ndarray:
    return np.asarray(jax.nn.relu(network.inward(jnp.asarray(x, jnp.float32))))


def share(logits, labels) -> float:
    return float(np.mean(np.argmax(np.asarray(logits), -1) == labels))
