"""Class-incremental comparisons behind our own encoders: data, streams, and arms.

An encoder is trained once for each data set and scale, without labels and on other
pictures than the stream's; all seeds share it, as papers share a pretrained backbone.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from narrows.data.images import load_images, padded
from narrows.data.streams import class_incremental, halves, minibatches
from narrows.scripts import learners, pretrain, results
from narrows.scripts.claims import DATA_DIR, NotMeasured

BOOKS, PAIRS, WIDTH = 64, 1024, 8
BATCH = 50


class Size(NamedTuple):
    channels: str  # of the encoder
    steps: int  # of its training
    train: int  # rows of each class
    check: int
    test: int
    epochs: int


SIZES = {
    "quick": Size("32,64", 150, 400, 100, 200, 2),
    "full": Size("32,64", 800, 2000, 200, 1000, 5),
    "paper": Size("64,128", 8000, 5500, 500, 1000, 20),
}


class Bed(NamedTuple):
    """One data set behind its encoder: standardised features, 2 x 2 positions each."""

    pool: np.ndarray  # of labelled training pictures
    labels: np.ndarray
    test: np.ndarray
    truth: np.ndarray
    unlabelled: np.ndarray  # of pictures that the encoder was trained on


@functools.cache
def bed(name: str, scale: str) -> Bed:
    folder = DATA_DIR.get()
    needed = {"fashion_mnist": ("fashion_mnist", "mnist", "cifar10_subset")}
    if folder is None:
        raise NotMeasured("there is no --data_dir")
    for each in needed.get(name, (name,)):
        if not (folder / each).is_dir():
            raise NotMeasured(f"{each}/ is not in --data_dir")
    size = SIZES[scale]
    train, test = (load_images(folder, name, split) for split in ("train", "test"))
    if name == "fashion_mnist":
        sets, options = ["mnist", "cifar10_subset"], {"to_grey": True, "limit": 10_000}
        more = ["--grey", "--limit=10000"]
    else:
        sets, options, more = [name], {"half": True}, ["--half"]
        stream = halves(train.labels, seed=0)[1]
        train = type(train)(train.images[stream], train.labels[stream])
    with _encoder_folder(f"{name}-{scale}") as workdir:
        code = pretrain.main(
            [
                "pretrain",
                f"--workdir={workdir}",
                f"--data_dir={folder}",
                f"--sets={','.join(sets)}",
                f"--channels={size.channels}",
                f"--steps={size.steps}",
                *more,
            ],
            jax.devices()[:1],
        )
        if code:
            raise RuntimeError(f"pretrain ended with exit code {code}")
        encode = pretrain.encoder_of(workdir)
    rng = np.random.default_rng(0)
    pool = _balanced(train.labels, size.train + size.check, rng)
    held = _balanced(test.labels, size.test, rng)
    other = pretrain.pictures(folder, sets, **options)
    other = other[rng.permutation(len(other))[: len(pool)]]

    def features(images: np.ndarray) -> np.ndarray:
        maps = encode(padded(images))
        n, t, s, d = maps.shape
        halved = maps.reshape(n, 2, t // 2, 2, s // 2, d).mean((2, 4))
        return halved.reshape(n, -1)

    unlabelled = features(other)
    mean, spread = unlabelled.mean(0), unlabelled.std(0) + 1e-3
    return Bed(
        (features(train.images[pool]) - mean) / spread,
        train.labels[pool],
        (features(test.images[held]) - mean) / spread,
        test.labels[held],
        (unlabelled - mean) / spread,
    )


@contextlib.contextmanager
def _encoder_folder(name: str) -> Iterator[str]:
    """Kept for the next process at this very commit, where the code is that of it."""
    now = results.provenance()
    if now["commit"] and not now["dirty"]:
        yield str(results.ROOT / ".cache" / now["commit"] / name)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _balanced(labels: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """`each` rows of every class, or all of a class that has fewer."""
    rows = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in range(10)]
    return np.concatenate(rows)


class Drawn(NamedTuple):
    """A seed's split, order of classes, and the streams in both orders."""

    samples: learners.Samples
    checked: np.ndarray  # labels of the held-out rows that choose rates, which are
    truth: np.ndarray  # first, and of those that are reported
    stream: jax.Array  # [tasks, steps, batch]
    shuffled: jax.Array


def draw(found: Bed, scale: str, seed: int) -> Drawn:
    rng = np.random.default_rng([seed, 3])
    fewest = np.bincount(found.labels).min()
    check = min(SIZES[scale].check, fewest // 5)
    rows = [rng.permutation(np.flatnonzero(found.labels == c)) for c in range(10)]
    check_rows = np.concatenate([r[:check] for r in rows])
    train_rows = np.concatenate([r[check:fewest] for r in rows])
    labels = found.labels[train_rows]
    tasks = class_incremental(labels, per_task=2, seed=seed)
    options: dict[str, Any] = {"batch_size": BATCH, "seed": seed}
    options["epochs"] = SIZES[scale].epochs
    stream = minibatches(tasks, **options).reshape(5, -1, BATCH)
    mixed = minibatches([np.arange(len(labels))], **options)
    mixed = mixed[: stream.shape[0] * stream.shape[1]].reshape(stream.shape)
    held_out = np.concatenate([found.pool[check_rows], found.test])
    return Drawn(
        learners.Samples(
            jnp.asarray(found.pool[train_rows]),
            jnp.asarray(labels),
            jnp.asarray(held_out),
        ),
        found.labels[check_rows],
        found.truth,
        jnp.asarray(stream),
        jnp.asarray(mixed),
    )


def points(drawn: Drawn, logits: jax.Array) -> tuple[float, float]:
    """Per cent right of the rows that choose rates, and of the test."""
    guess = np.asarray(logits.argmax(-1))
    cut = len(drawn.checked)
    return (
        100 * float((guess[:cut] == drawn.checked).mean()),
        100 * float((guess[cut:] == drawn.truth).mean()),
    )


def fits(drawn: Drawn, found: Bed, seed: int, **shape) -> dict[str, Callable]:
    """Arm -> fit(rate, rows) -> logits; EWC's takes (rate, penalty)."""
    sizes: dict[str, int] = {"books": BOOKS, "pairs": PAIRS, "width": WIDTH} | shape
    start, key = jax.random.split(jax.random.key(seed))
    held = learners.remember(
        start, drawn.samples, jnp.asarray(found.unlabelled), classes=10, **sizes
    )

    def memory(rate, rows):
        return learners.key_value(held, drawn.samples, rate, rows).written

    def network(rate, rows, hidden=(128,), **penalty):
        options = {"hidden": hidden, "classes": 10} | penalty
        return learners.probe(drawn.samples, rate, rows, key, **options)

    return {
        "method": memory,
        "linear probe": functools.partial(network, hidden=()),
        "MLP probe": network,
        "EWC": lambda both, rows: network(both[0], rows, penalty=jnp.float32(both[1])),
    }
