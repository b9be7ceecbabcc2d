"""Rows with concepts and classes, by name: what concept models are trained on.

Every task has rows to learn from, rows that only concept vectors see, and rows to test;
all of them are drawn by a seed.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from narrows.data import concepts as worlds
from narrows.data import concepts_birds, concepts_text
from narrows.data import concepts_pictures as pictures
from narrows.data.concepts import Examples
from narrows.data.images import load_images
from sklearn.datasets import load_digits


class Sizes(NamedTuple):
    learn: int
    banked: int
    test: int


class Task(NamedTuple):
    names: tuple[str, ...]  # of the concepts
    classes: int
    learn: Examples
    banked: Examples
    test: Examples


def make_task(
    name: str, folder: str | pathlib.Path | None, sizes: Sizes, *, seed: int
) -> Task:
    """One of TASKS; all but "world" and "digits" are read from the folder.

    Raises: ValueError for an unknown name, sizes that the set does not hold, or a set
    without a folder; FileNotFoundError where the folder lacks the set.
    """
    if name not in TASKS:
        raise ValueError(f"task: {name!r}, but allowed are {', '.join(TASKS)}")
    if folder is None and name not in ("world", "digits"):
        raise ValueError(f"folder: none, but {name} is read from files: name one")
    return TASKS[name](name, folder, sizes, seed)


def _world(name, folder, sizes: Sizes, seed: int) -> Task:
    del name, folder
    world = worlds.make_world(seed, coupling=0.0, field=1.5)
    parts = [worlds.draw(world, n, 10 * seed + i) for i, n in enumerate(sizes)]
    return Task(world.names, world.joint.shape[1], *parts)


def _pictures(name, folder, sizes: Sizes, seed: int) -> Task:
    """Cuts of concepts are those of the rows to learn from."""
    rng = np.random.default_rng([seed, 1])
    if name == "digits":
        bundled = load_digits()
        images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)[..., None]
        labels, first = bundled.target, len(images) - sizes.test
        order = rng.permutation(len(images))
    else:
        halves = [load_images(folder, name, part) for part in ("train", "test")]
        images, labels = (np.concatenate(both) for both in zip(*halves, strict=True))
        first = len(halves[0].labels)
        held = first + rng.permutation(len(halves[1].labels))
        order = np.concatenate([rng.permutation(first), held])
    if sizes.learn + sizes.banked > first or sizes.test > len(order) - first:
        raise ValueError(f"sizes: {tuple(sizes)}, but {name} has {len(order)} rows")
    ends = np.cumsum([sizes.learn, sizes.banked])
    parts = [*np.split(order[: ends[1]], ends[:1]), order[first : first + sizes.test]]
    cuts = pictures.cuts_of(images[parts[0]])

    def part(chosen) -> Examples:
        concepts = pictures.pixel_concepts(images[chosen], cuts)
        if name == "fashion_mnist":
            worn = pictures.garment_concepts(labels[chosen])
            concepts = np.concatenate([concepts, worn], 1)
        x = images[chosen].reshape(len(chosen), -1).astype(np.float32) / 255
        return Examples(x, concepts, labels[chosen].astype(np.int64))

    worn = tuple(pictures.GARMENTS) if name == "fashion_mnist" else ()
    return Task((*pictures.PIXEL_NAMES, *worn), 10, *map(part, parts))


def _birds(name, folder, sizes: Sizes, seed: int) -> Task:
    """All 200 classes; features are simulated (`data/concepts_birds.py`)."""
    del name
    birds = concepts_birds.load_birds(folder)
    parts = [
        concepts_birds.simulate(birds, n, seed=10 * seed + i, world=seed)
        for i, n in enumerate(sizes)
    ]
    return Task(birds.names, len(birds.classes), *parts)


def _text(name, folder, sizes: Sizes, seed: int) -> Task:
    """Passages of 200 characters; features are hashed counts, times 10."""
    del name
    n = max(sizes.learn + sizes.banked, sizes.test)
    first, last = concepts_text.load_passages(folder, n, seed=seed)

    def part(of, rows: slice) -> Examples:
        x = 10 * concepts_text.text_features(of.text[rows])
        return Examples(x, of.concepts[rows], of.labels[rows])

    parts = (
        part(first, slice(0, sizes.learn)),
        part(first, slice(sizes.learn, sizes.learn + sizes.banked)),
        part(last, slice(0, sizes.test)),
    )
    return Task(tuple(concepts_text.CONCEPTS), len(concepts_text.SOURCES), *parts)


TASKS: dict[str, Callable[..., Task]] = {
    "world": _world,
    "digits": _pictures,
    "mnist": _pictures,
    "fashion_mnist": _pictures,
    "birds": _birds,
    "text": _text,
}
