"""Rows of real sets dealt to clients so that the clients are unlike."""

import gzip
from typing import Literal

import numpy as np
from jaxtyping import Float
from narrows.scripts.claims import DATA_DIR, NotMeasured
from sklearn import datasets

By = Literal["label", "norm"]


def dealt(
    name: str, clients: int, rng: np.random.Generator, *, by: By
) -> tuple[Float[np.ndarray, "n m d"], Float[np.ndarray, "n m"]]:
    """(points with a last feature of 1, labels +-1) of `clients` equal clients.

    Features are standardised. By "label" a client has one class or nearly so; by "norm"
    the clients' losses are of unlike curvature. Rows that do not divide are left out.
    """
    x, y = rows_of(name, rng)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    x = np.c_[x, np.ones(len(x))]
    order = rng.permutation(len(x))[: len(x) // clients * clients]
    rank = {"label": y, "norm": np.linalg.norm(x, axis=1)}[by]
    order = order[np.argsort(rank[order], kind="stable")]
    return x[order].reshape(clients, -1, x.shape[1]), y[order].reshape(clients, -1)


def rows_of(name: str, rng: np.random.Generator):
    """breast_cancer, wine (the second kind or not), digits (even or odd), or mnist.

    mnist: 1000 threes and eights at half the resolution, from --data_dir.
    """
    if name != "mnist":
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return x, 1.0 - 2 * (y % 2)
    folder = DATA_DIR.get()
    if folder is None or not (folder / "mnist").is_dir():
        raise NotMeasured("mnist/ is not in --data_dir")
    pictures = _bytes(folder / "mnist" / "train-images-idx3-ubyte.gz", 16)
    labels = _bytes(folder / "mnist" / "train-labels-idx1-ubyte.gz", 8)
    chosen = rng.choice(np.flatnonzero(np.isin(labels, (3, 8))), 1000, replace=False)
    x = pictures.reshape(-1, 14, 2, 14, 2)[chosen].mean((2, 4)).reshape(-1, 196) / 255
    return x, np.where(labels[chosen] == 3, 1.0, -1.0)


def _bytes(path, offset: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
