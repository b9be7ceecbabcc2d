"""Fashion-MNIST with a mark that goes with one class, then with the others.

The backbone's rows carry the mark and the garment independently; at home the mark goes
with the pullovers in 95 % of rows, and after the shift with everything else.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from narrows.data import concepts as worlds
from narrows.data import concepts_pictures as pictures
from narrows.data.images import load_images
from narrows.scripts.concept_tasks import Sizes

UPPER = (0, 2, 3, 4, 6)  # classes of Fashion-MNIST that are worn above
MARKED = 1  # the pullovers go with the mark
SHARES = {  # of rows with the mark: of the others, of the pullovers
    "even": (0.5, 0.5),
    "home": (0.05, 0.95),
    "flipped": (0.95, 0.05),
    "none": (0.0, 0.0),
}


class Parts(NamedTuple):
    """Disjoint rows, but for the last three: the same garments of the test split."""

    names: tuple[str, ...]  # of concepts, the mark last
    seen: worlds.Examples  # by the backbone
    home: worlds.Examples
    apart: worlds.Examples  # for the bank
    target: worlds.Examples  # labelled rows after the shift
    at_home: worlds.Examples
    shifted: worlds.Examples
    plain: worlds.Examples  # without a mark


def marked(images, present) -> np.ndarray:
    """A bright stripe of three columns at the left edge, where present."""
    images = images.copy()
    images[present, 2:26, 1:4] = 200
    return images


def marked_pictures(folder: pathlib.Path, sizes: Sizes, seed: int) -> Parts:
    """Rows of five classes with concepts of pixels and the mark, drawn by the seed."""
    n, banked, held = sizes
    rng = np.random.default_rng([seed, 2])
    first, last = (load_images(folder, "fashion_mnist", s) for s in ("train", "test"))
    worn = [
        rng.permutation(np.flatnonzero(np.isin(s.labels, UPPER))) for s in (first, last)
    ]
    ends = np.cumsum([n, n, banked])
    train = np.split(worn[0][: ends[-1] + banked], ends)
    cuts = pictures.cuts_of(first.images[np.isin(first.labels, UPPER)][:2000])

    def part(of, chosen, how) -> worlds.Examples:
        labels = np.searchsorted(UPPER, of.labels[chosen])
        share = np.array(SHARES[how])[(labels == MARKED).astype(int)]
        there = rng.random(len(chosen)) < share
        pixels = of.images[chosen]
        concepts = np.concatenate(
            [pictures.pixel_concepts(pixels, cuts), there[:, None]], 1
        )
        x = marked(pixels, there).reshape(len(chosen), -1) / 255.0
        return worlds.Examples(x.astype(np.float32), concepts.astype(int), labels)

    hows = ("even", "home", "even", "flipped")
    learnt = [part(first, rows, how) for rows, how in zip(train, hows, strict=True)]
    tests = [part(last, worn[1][:held], how) for how in ("home", "flipped", "none")]
    return Parts((*pictures.PIXEL_NAMES, "mark"), *learnt, *tests)
