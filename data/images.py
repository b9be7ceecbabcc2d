"""Small sets of real pictures, read from a folder that holds them.

>>> train = load_images(folder, "fashion_mnist", "train")  # doctest: +SKIP
>>> train.images.shape, train.images.dtype                 # doctest: +SKIP
((60000, 28, 28, 1), dtype('uint8'))
"""

import gzip
import io
import lzma
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

IDX = {"train": "train", "test": "t10k"}  # how the idx files name the splits
NAMES = ("mnist", "fashion_mnist", "cifar10_subset")


class Images(NamedTuple):
    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]


def load_images(folder: str | pathlib.Path, name: str, split: str) -> Images:
    """The split "train" or "test" of one of NAMES; grey pictures have one channel.

    Raises: ValueError for an unknown name or split, FileNotFoundError where the folder
    lacks the set.
    """
    if name not in NAMES:
        raise ValueError(f"name: {name!r}, but allowed are {', '.join(NAMES)}")
    if split not in IDX:
        raise ValueError(f"split: {split!r}, but allowed are {', '.join(IDX)}")
    place = pathlib.Path(folder) / name
    if name == "cifar10_subset":
        packed = (place / f"{split}_images.npy.xz").read_bytes()
        images = np.load(io.BytesIO(lzma.decompress(packed))).transpose(0, 2, 3, 1)
        labels = np.load(place / f"{split}_labels.npy")
    else:
        images = _idx(place / f"{IDX[split]}-images-idx3-ubyte.gz")[..., None]
        labels = _idx(place / f"{IDX[split]}-labels-idx1-ubyte.gz")
    return Images(np.ascontiguousarray(images), labels.astype(np.int32))


def grey(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w 1"]:
    """Brightness as of ITU-R BT.601; grey pictures stay as they are."""
    if images.shape[-1] == 1:
        return images
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(images @ weights).astype(np.uint8)[..., None]


def padded(
    images: UInt8[np.ndarray, "n h w c"], side: int = 32
) -> UInt8[np.ndarray, "n side side c"]:
    """In the middle of black squares.

    Raises: ValueError for pictures larger than `side`.
    """
    spare = [side - length for length in images.shape[1:3]]
    if min(spare) < 0:
        raise ValueError(f"side: {side}, but pictures are {images.shape[1:3]}")
    edges = [(gap // 2, gap - gap // 2) for gap in spare]
    return np.pad(images, ((0, 0), *edges, (0, 0)))


def _idx(path: pathlib.Path) -> np.ndarray:
    """An idx file of bytes: two zeros, type 8, axes, then their sizes, big-endian."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name}: begins with {raw[:3]!r}, but must be idx bytes")
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)
