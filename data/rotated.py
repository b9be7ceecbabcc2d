"""Digits turned by a known angle, which is to be told: pictures for regression."""

import pathlib

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from .images import load_images

LARGEST = 60.0  # degrees to either side; a 6 stays a 6


def rotated_digits(
    folder: str | pathlib.Path, *, seed: int, rows: int = 10_000, side: int = 14
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """`rows` training pictures of MNIST, each turned by its own angle; and the angles.

    Angles are uniform in +-60 degrees, counter-clockwise; grey values in [0, 1], linear
    between pixels, then means of squares of 28 / side pixels, flattened. Pictures and
    angles follow from the seed, pictures without replacement.
    Raises: ValueError for a side that does not divide 28, or more rows than pictures.
    """
    if side < 1 or 28 % side:
        raise ValueError(f"side: {side}, but it must divide 28")
    images = load_images(folder, "mnist", "train").images[..., 0]
    if not 1 <= rows <= len(images):
        raise ValueError(f"rows: {rows}, but there are {len(images)} pictures")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[:rows]
    angles = rng.uniform(-LARGEST, LARGEST, rows)
    turned = np.stack(
        [
            turn(image, angle)
            for image, angle in zip(images[chosen] / 255.0, angles, strict=True)
        ]
    )
    blocks = turned.reshape(rows, side, 28 // side, side, 28 // side)
    return blocks.mean((2, 4)).reshape(rows, -1), angles


def turn(image: Float[np.ndarray, "h w"], degrees: float) -> Float[np.ndarray, "h w"]:
    """The picture turned about its middle, black beyond its edges."""
    return ndimage.rotate(image, degrees, reshape=False, order=1, mode="constant")
