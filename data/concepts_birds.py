"""Attributes of 200 kinds of birds: Caltech-UCSD Birds 200-2011 (Wah et al. 2011).

`load_birds` reads what is known of each class. Where the pictures are absent,
`simulate` draws rows from those numbers: attributes are real, features are not.
`read_archive` reads the pictures' own labels from the unpacked archive.
"""

import gzip
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from .concepts import Examples


class Birds(NamedTuple):
    names: tuple[str, ...]  # of the attributes that concept models keep
    classes: tuple[str, ...]
    share: Float[np.ndarray, "m 312"]  # of annotators who saw an attribute, in [0, 1]
    kept: Integer[np.ndarray, " k"]  # where the named attributes stand among the 312

    def concepts(self) -> Integer[np.ndarray, "m k"]:
        """What most annotators saw, 0 or 1: the labels that concept models learn."""
        return (self.share[:, self.kept] >= 0.5).astype(np.int64)


class Archive(NamedTuple):
    """Every picture of the archive, in the order of its list."""

    paths: tuple[str, ...]  # below images/
    labels: Integer[np.ndarray, " n"]  # in [0, 200)
    train: Bool[np.ndarray, " n"]  # the official split
    present: Bool[np.ndarray, "n a"]  # what the annotator of this picture saw
    known: Bool[np.ndarray, "n a"]  # False where the attribute was not visible


def load_birds(folder: str | pathlib.Path) -> Birds:
    """Of `<folder>/cub_concepts`; the 112 attributes of the concept bottleneck papers.

    Raises FileNotFoundError where the folder lacks the set.
    """
    place = pathlib.Path(folder) / "cub_concepts"
    raw = gzip.decompress(
        (place / "class_attribute_labels_continuous.txt.gz").read_bytes()
    )
    share = np.loadtxt(raw.decode().splitlines()) / 100
    kept = np.loadtxt(place / "selected112.txt", dtype=int)
    every = _second(place / "attributes.txt")
    return Birds(
        tuple(every[i] for i in kept),
        tuple(_second(place / "classes.txt")),
        share,
        kept,
    )


def simulate(
    birds: Birds,
    n: int,
    *,
    seed: int,
    world: int = 0,
    classes: int = 200,
    width: int = 64,
    noise: float = 0.5,
) -> Examples:
    """n rows of the first classes; features are simulated, and no picture's.

        a_j ~ Bernoulli(share[y, j]),  x = (a - mean share) R + noise N(0, 1)

    with y uniform and R [312, width] of normal numbers of variance 1 / width, drawn by
    the seed `world`: a row shows what an annotator of one picture would have seen. Its
    concepts are those of its class, by most annotators, as in the papers.
    Raises ValueError for fewer than 2 classes, or more than there are.
    """
    if not 2 <= classes <= len(birds.classes):
        raise ValueError(
            f"classes: {classes}, but must be from 2 to {len(birds.classes)}"
        )
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    a = rng.random((n, birds.share.shape[1])) < birds.share[y]
    mix = np.random.default_rng(world).normal(size=(birds.share.shape[1], width))
    x = (a - birds.share.mean(0)) @ mix / np.sqrt(width)
    x += noise * rng.normal(size=x.shape)
    return Examples(x, birds.concepts()[y], y)


def read_archive(folder: str | pathlib.Path) -> Archive:
    """The unpacked CUB_200_2011 folder, by its own lists alone.

    An attribute that was "not visible" (certainty 1) is not known, rather than absent.
    Raises FileNotFoundError with the file that is missing, and ValueError for an
    attribute or a picture without a label.
    """
    place = pathlib.Path(folder)
    paths = _second(place / "images.txt")
    n = len(paths)
    labels = np.array(_second(place / "image_class_labels.txt"), int) - 1
    train = np.array(_second(place / "train_test_split.txt"), int) == 1
    lines = (place / "attributes" / "image_attribute_labels.txt").read_text()
    # Some lines of the official file have a number too many: the first four count.
    cells = np.array([line.split()[:4] for line in lines.splitlines()], int)
    picture, attribute, seen, certainty = cells.T
    count = int(attribute.max())
    if len(cells) != n * count or len(labels) != n or len(train) != n:
        raise ValueError(
            f"folder: {len(cells)} attribute labels, {len(labels)} class labels and "
            f"{len(train)} split marks of {n} pictures and {count} attributes"
        )
    present, known = np.zeros((2, n, count), bool)
    present[picture - 1, attribute - 1] = seen == 1
    known[picture - 1, attribute - 1] = certainty > 1
    return Archive(tuple(paths), labels, train, present, known)


def by_class(archive: Archive) -> Integer[np.ndarray, "m a"]:
    """What most pictures of a class show, of those that show either; a tie is present.

    (Koh et al. 2020, arXiv:2007.04612, Sec. 4.2.) Uses the training pictures alone.
    """
    said = []
    for label in range(archive.labels.max() + 1):
        rows = archive.train & (archive.labels == label)
        yes = (archive.present & archive.known)[rows].sum(0)
        said.append(2 * yes >= np.maximum(archive.known[rows].sum(0), 1))
    return np.array(said, np.int64)


def _second(path: pathlib.Path) -> list[str]:
    """The second word of each line."""
    return [line.split()[1] for line in path.read_text().splitlines() if line.strip()]
