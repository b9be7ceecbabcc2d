"""Named concepts of pictures, computed from their pixels or from a garment's class.

Pixels decide seven questions by a number and a cut: on its side of the cut a concept is
present. Cuts are medians of the pictures that `cuts_of` was given, so that each concept
holds for half of them; "holed" has a cut of its own. GARMENTS says what follows from a
class of Fashion-MNIST by the meaning of its name.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Integer, UInt8
from scipy import ndimage

PIXEL_NAMES = ("bright", "tall", "top_heavy", "slanted", "hollow", "mirrored")
PIXEL_NAMES = (*PIXEL_NAMES, "busy", "holed")
GARMENTS: Mapping[str, frozenset[int]] = {  # classes of Fashion-MNIST
    "footwear": frozenset({5, 7, 9}),
    "upper_body": frozenset({0, 2, 3, 4, 6}),
    "long_sleeves": frozenset({2, 4}),
    "reaches_the_legs": frozenset({1, 3, 4}),
    "opens_in_front": frozenset({4, 6}),
    "covers_the_ankle": frozenset({1, 9}),
    "open_toe": frozenset({5}),
    "has_a_handle": frozenset({8}),
}


def pixel_scores(images: UInt8[np.ndarray, "n h w 1"]) -> Float[np.ndarray, "n 8"]:
    """The numbers behind PIXEL_NAMES, ink being what is bright.

    bright: mean ink. tall: spread of ink down less across. top_heavy: ink of the upper
    third less that of the lower, a share of it. slanted: covariance of down and across.
    hollow: ink of the border less that of the middle. mirrored: likeness to its mirror
    image. busy: mean step between neighbouring pixels, a share of the ink. holed: areas
    of ground that ink above a fifth encloses, of a 196th of the picture or more.
    Lengths are shares of a side.
    Raises ValueError for pictures of more than one channel.
    """
    if images.ndim != 4 or images.shape[-1] != 1:
        raise ValueError(f"images: shape {images.shape}, but [n, h, w, 1] is needed")
    x = images[..., 0].astype(np.float64) / 255
    _, h, w = x.shape
    ink = np.maximum(x.sum((1, 2)), 1e-9)
    down, across = np.linspace(-1, 1, h), np.linspace(-1, 1, w)
    at_down, at_across = (x.sum(2) @ down) / ink, (x.sum(1) @ across) / ink
    down, across = down - at_down[:, None], across - at_across[:, None]
    rows, columns = x.sum(2) / ink[:, None], x.sum(1) / ink[:, None]
    spread_down = np.sqrt((rows * down**2).sum(1))
    spread_across = np.sqrt((columns * across**2).sum(1))
    tilt = np.einsum("nhw,nh,nw->n", x, down, across) / ink
    inner = x[:, h // 3 : h - h // 3, w // 3 : w - w // 3].mean((1, 2))
    steps = np.abs(np.diff(x, axis=1)).sum((1, 2)) + np.abs(np.diff(x)).sum((1, 2))
    scores = (
        x.mean((1, 2)),
        spread_down - spread_across,
        (x[:, : h // 3].sum((1, 2)) - x[:, h - h // 3 :].sum((1, 2))) / ink,
        tilt,
        x.mean((1, 2)) - inner,
        -np.abs(x - x[:, :, ::-1]).sum((1, 2)) / ink,
        steps / ink,
        np.array([_holes(picture > 0.2) for picture in x], np.float64),
    )
    return np.stack(scores, 1)


def _holes(ink: np.ndarray) -> int:
    ground, count = ndimage.label(~np.pad(ink, 1))
    sizes = np.bincount(ground.reshape(-1), minlength=count + 1)[2:]
    return int((sizes >= ink.size / 196).sum())  # label 1 is the ground around


def cuts_of(images: UInt8[np.ndarray, "n h w 1"]) -> Float[np.ndarray, " 8"]:
    """The medians of the scores; of holes, between none and one."""
    cuts = np.median(pixel_scores(images), 0)
    cuts[-1] = 0.5
    return cuts


def pixel_concepts(
    images: UInt8[np.ndarray, "n h w 1"], cuts: Float[np.ndarray, " 8"]
) -> Integer[np.ndarray, "n 8"]:
    """Which of PIXEL_NAMES hold, 0 or 1: the scores above their cuts."""
    return (pixel_scores(images) > cuts).astype(np.int64)


def garment_concepts(labels: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, "n 8"]:
    """What GARMENTS says of classes of Fashion-MNIST: never a picture's own.

    >>> garment_concepts(np.array([9]))[0].tolist()
    [1, 0, 0, 0, 0, 1, 0, 0]
    """
    return np.stack([np.isin(labels, [*of]) for of in GARMENTS.values()], 1).astype(int)
