"""Rows whose concepts go together, or do not, and what needs no training beside them.

Worlds of known joint, eight concepts and ten classes: `chain`, where neighbours are
coupled; `classes`, where a class fixes its pattern; `unlinked`, where concepts tell
nothing of one another. Of the same shape, the garments of Fashion-MNIST, so that one
program trains all of them; and CUB's attributes with simulated features.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from narrows.data import concepts as worlds
from narrows.data import concepts_birds
from narrows.data.concepts import Examples
from narrows.data.concepts_pictures import GARMENTS, garment_concepts
from narrows.data.images import load_images
from narrows.models.concepts import activation, queries
from narrows.models.concepts.post_hoc import post_hoc
from narrows.scripts.concept_study import Trained, asking, pulled
from sklearn.decomposition import PCA

WORLDS: dict[str, dict[str, Any]] = {
    "chain": {"coupling": 2.0, "field": 1.0, "noise": 2.0},
    "classes": {"coupling": 0.0, "field": 10.0, "noise": 2.0},
    "unlinked": {"noise": 1.0},
}
SHAPE: dict[str, Any] = {"concepts": 8, "classes": 10, "width": 32}
LEARN, HELD = 10_000, 1000


class Setting(NamedTuple):
    """Rows of a seed to learn, choose and test from; `near` couples concepts."""

    names: tuple[str, ...]
    parts: tuple[Examples, ...]
    near: np.ndarray  # [k, k]: whose accuracy counts when one is corrected
    world: worlds.World | None = None


def rendered(kind: str, seed: int) -> Setting:
    world = worlds.make_world(seed, **SHAPE, **WORLDS[kind])
    world = worlds.unlinked(world, seed) if kind == "unlinked" else world
    sizes = (LEARN, HELD, HELD)
    parts = [worlds.draw(world, n, 10 * seed + i) for i, n in enumerate(sizes)]
    apart = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    near = apart == 1 if kind == "chain" else apart > 0
    return Setting(world.names, tuple(parts), near, world)


@functools.cache
def components(folder: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST's two splits by 32 principal components of unit mean variance."""
    parts = [load_images(folder, "fashion_mnist", s) for s in ("train", "test")]
    flat = [p.images.reshape(len(p.images), -1).astype(np.float32) / 255 for p in parts]
    reduce = PCA(SHAPE["width"], svd_solver="covariance_eigh").fit(flat[0][:10_000])
    unit = np.sqrt(reduce.explained_variance_.mean())
    return [
        (reduce.transform(x) / unit, p.labels) for x, p in zip(flat, parts, strict=True)
    ]


def garments(folder: pathlib.Path, seed: int) -> Setting:
    """Concepts follow from the class."""
    rng, drawn = np.random.default_rng([seed, 3]), []
    (x, y), (held_x, held_y) = components(folder)
    order, held = rng.permutation(len(y)), rng.permutation(len(held_y))[:HELD]
    for rows in (order[:LEARN], order[LEARN : LEARN + HELD]):
        drawn.append(Examples(x[rows], garment_concepts(y[rows]), y[rows]))
    drawn.append(Examples(held_x[held], garment_concepts(held_y[held]), held_y[held]))
    names = tuple(GARMENTS)
    return Setting(names, tuple(drawn), ~np.eye(8, dtype=bool))


def birds(folder: pathlib.Path, seed: int, *, classes: int) -> Setting:
    """CUB's real attributes of classes, with simulated features."""
    read = concepts_birds.load_birds(folder)
    parts = [
        concepts_birds.simulate(
            read,
            n,
            seed=10 * seed + i,
            world=seed,
            classes=classes,
        )
        for i, n in enumerate((5000, 100, 300))
    ]
    return Setting(read.names, tuple(parts), ~np.eye(112, dtype=bool))


def by_projection(setting: Setting) -> dict[str, float]:
    """PCBM: concept vectors from the training rows and a sparse head."""
    learn, test = setting.parts[0], setting.parts[2]
    few = slice(0, 3000)
    bank = activation.bank_from_examples(
        setting.names, learn.x[few], learn.concepts[few]
    )
    model = post_hoc(bank, learn.x[few], learn.labels[few])
    logits = model(jnp.asarray(test.x, jnp.float32)).classes
    # A projection says which side of its hyperplane a row is on.
    right = (np.asarray(activation.project(bank, test.x)) > 0) == test.concepts
    return {
        "classes": float(np.mean(np.argmax(logits, -1) == test.labels)),
        "concepts": float(np.mean(right)),
        "all_concepts": float(np.mean(np.all(right, -1))),
    }


def known_patterns(odds: np.ndarray, setting: Setting) -> float:
    """A CBM read as a whole: the likeliest of the patterns seen in training."""
    seen = np.unique(setting.parts[0].concepts, axis=0)
    found = seen[np.argmax(odds @ seen.T, 1)]
    return float(np.mean(np.all(found == setting.parts[2].concepts, 1)))


def agreement(best: Trained, pull, x) -> dict[str, Any]:
    """Share of optima that the gradient misses; composed queries less plain sums."""

    def searched(model, pull, x):
        model = pulled(model, pull)
        found = queries.infer(model, x)
        truth = jnp.ones((20, len(model.names)))
        out = model(x[:20], truth, (truth > 0).at[:, 1:].set(False))
        energy = model.joint_energy(x)
        missed = jnp.mean(found.energy > energy.min((-2, -1)) + 1e-3)
        return missed, out.concepts, jnp.exp(out.classes), energy[:20]

    missed, *said = asking(searched)(best, pull, x)
    gaps = []
    for concepts, classes, energy in zip(*said, strict=True):
        every = queries.patterns(concepts.shape[1])
        least = energy.min((1, 2), keepdims=True)
        weight = np.exp(least - energy.astype(np.float64)) * (every[:, :1] == 1)
        weight /= weight.sum((1, 2), keepdims=True)
        gap = np.abs(weight.sum(2) @ every - concepts).max()
        gaps.append(max(gap, np.abs(weight.sum(1) - classes).max()))
    return {"optima missed": missed, "gap of composed queries": gaps}


def known_answers(best: Trained, pull, settings) -> dict[str, list[float]]:
    """The worst gap of p(c_k | c_l) and p(c_k | y) to the generator's."""
    known = [s.world for s in settings if s.world is not None]
    wide = [worlds.draw(world, LEARN, 99).x for world in known]
    x = jnp.asarray(np.stack(wide), jnp.float32)

    def population(model, pull, x):
        model = pulled(model, pull)
        parts = x.reshape(10, -1, x.shape[-1])  # a table of all rows would be large
        return jax.lax.map(lambda x: queries.population(model, x), parts).mean(0)

    gaps = []
    for table, world in zip(asking(population)(best, pull, x), known, strict=True):
        every = queries.patterns(len(world.names)).T
        worst = 0.0
        for given in [*(every == 1), *np.eye(table.shape[1], dtype=bool)]:
            # Over patterns and classes: where one concept is 1, or one class is.
            on = given[:, None] if len(given) == len(table) else given[None]
            ours, true = ((t * on).sum(1) for t in (table, world.joint))
            gap = every @ ours / ours.sum() - every @ true / true.sum()
            worst = max(worst, float(np.abs(gap).max()))
        gaps.append(worst)
    return {"conditional gap": gaps}
