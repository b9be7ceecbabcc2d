"""What a split classifier costs, and what it is compared with: bytes and operations."""

import io
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from narrows.models import bottlefit
from narrows.models.bottlefit import Parts
from narrows.scripts import splits


def jpegs(
    pictures: np.ndarray, qualities: Sequence[int]
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Each quality: mean bytes without tables, and the decoded pictures.

    Huffman codes are fitted to each picture, though their tables are not counted.
    Raises: ImportError without Pillow.
    """
    from PIL import Image

    for quality in qualities:
        sizes, decoded = [], []
        for picture in pictures:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=quality, optimize=True)
            sizes.append(len(without_tables(file.getvalue())))
            decoded.append(np.asarray(Image.open(file)))
        yield quality, float(np.mean(sizes)), np.stack(decoded)


def without_tables(jpeg: bytes) -> bytes:
    """A JPEG file without its tables (DQT, DHT) and application data (APPn, COM)."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        marker, size = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker not in (0xDB, 0xC4, 0xFE) and not 0xE0 <= marker <= 0xEF:
            kept += jpeg[at : at + 2 + size]
        at += 2 + size
    return kept + jpeg[at:]


def costs(
    split: splits.Split, taught: Parts, ours: float, theirs: float
) -> Iterator[tuple[str, str, float]]:
    """Weights, operations and break-even bandwidths of a device of 1 GFLOP/s.

    With device and server rates d and s, T_split = head / d + bytes / b + rest / s;
    T_offload = bytes_in / b + teacher / s; T_local = teacher / d. They break even at
    b = (bytes_in - bytes) / (head / d + (rest - teacher) / s) from above and
    b = bytes / ((teacher - head) / d - rest / s) from below. Here s = 100 d.
    """
    graphs = split.graphs | splits.graphs_of(split.recipe, False)
    image = np.zeros((1, splits.SIDE, splits.SIDE, 1), np.float32)

    def flops(names, parts, x):
        def go(x):
            for name in names:
                x = bottlefit.call(
                    graphs[name], parts.params[name], parts.stats[name], x
                )
                x = x[0]
            return x

        return jax.jit(go).lower(x).cost_analysis()["flops"], jax.eval_shape(go, x)

    head, z = flops(("encoder",), split.parts, image)
    rest, _ = flops(("decoder", "tail"), split.parts, np.zeros(z.shape, np.float32))
    local, _ = flops(("front", "tail"), taught, image)
    yield "operations", "head", head
    yield "operations", "rest of the student", rest
    yield "operations", "teacher", local
    for arm, parts, names in (
        ("head", split.parts, ("encoder",)),
        ("teacher", taught, ("front", "tail")),
    ):
        weights = sum(
            x.size for name in names for x in jax.tree.leaves(parts.params[name])
        )
        yield "weights", arm, weights
    device, server = 1e9, 1e11
    above = (theirs - ours) / (head / device + (rest - local) / server)
    below = ours / ((local - head) / device - rest / server)
    yield "break-even kbit/s", "against offloading", 8e-3 * above
    yield "break-even kbit/s", "against local", 8e-3 * below
