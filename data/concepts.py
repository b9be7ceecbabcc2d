"""A small world of named concepts whose every probability is known.

    p(c | y) ∝ exp(sum_j field[y, j] s_j + coupling sum_j s_j s_{j+1}),  s = 2 c - 1
    x = s A + direct e_y B + noise

with y uniform, A and B of orthonormal rows, and e_y the label's own corner. Concepts
form a chain: neighbours are coupled given the class, and independent where the coupling
is 0. `direct` is a planted leak: what x tells of y past the concepts.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

NAMES = ("wing", "beak", "crest", "stripe", "tail", "claw", "spot", "ring")


class World(NamedTuple):
    """The generator; `joint` lists patterns in the order of `patterns(k)`."""

    names: tuple[str, ...]
    joint: Float[np.ndarray, "patterns m"]  # p(c, y), sums to 1
    concept_map: Float[np.ndarray, "k d"]  # A
    class_map: Float[np.ndarray, "m d"]  # B
    noise: Float[np.ndarray, " k"]  # standard deviation along each concept's direction
    direct: float


class Examples(NamedTuple):
    """Rows of a draw."""

    x: Float[np.ndarray, "n d"]
    concepts: Integer[np.ndarray, "n k"]  # 0 or 1
    labels: Integer[np.ndarray, " n"]  # in [0, m)


def patterns(k: int) -> Integer[np.ndarray, "patterns k"]:
    """All 2^k concept vectors, the last concept turning fastest.

    >>> patterns(2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    return np.array(list(itertools.product((0, 1), repeat=k)), np.int64)


def make_world(
    seed: int = 0,
    *,
    concepts: int = 6,
    classes: int = 4,
    width: int = 32,
    coupling: float = 1.0,
    field: float = 1.0,
    noise: float | tuple[float, ...] = 0.5,
    direct: float = 0.0,
) -> World:
    """A world by its seed.

    Raises ValueError for sizes that do not fit: 1 to 8 concepts (as many as there are
    names), at least 2 classes, and a width that holds both.

    >>> world = make_world(concepts=3, classes=2, width=8)
    >>> world.names, world.joint.shape, round(float(world.joint.sum()), 6)
    (('wing', 'beak', 'crest'), (8, 2), 1.0)
    """
    if not 1 <= concepts <= len(NAMES):
        raise ValueError(f"concepts: {concepts}, but must be from 1 to {len(NAMES)}")
    if classes < 2:
        raise ValueError(f"classes: {classes}, but must be at least 2")
    if width < concepts + classes:
        raise ValueError(
            f"width: {width}, but {concepts} concepts and {classes} classes need "
            f"{concepts + classes} directions"
        )
    rng = np.random.default_rng(seed)
    fields = field * rng.normal(size=(classes, concepts))
    s = 2.0 * patterns(concepts) - 1
    energy = s @ fields.T + coupling * (s[:, :-1] * s[:, 1:]).sum(1, keepdims=True)
    given = np.exp(energy - energy.max(0))
    basis = np.linalg.qr(rng.normal(size=(width, concepts + classes)))[0].T
    return World(
        NAMES[:concepts],
        given / given.sum(0) / classes,
        basis[:concepts],
        basis[concepts:],
        np.broadcast_to(np.asarray(noise, float), (concepts,)).copy(),
        direct,
    )


def unlinked(world: World, seed: int, *, field: float = 1.0) -> World:
    """The same world with concepts that are fair coins, and a class drawn given them.

        p(c) = 2^-k,  p(y | c) ∝ exp(sum_j field[y, j] s_j)

    Concepts tell nothing of one another here, and all of them of the class.
    """
    k, m = len(world.names), world.joint.shape[1]
    s = 2.0 * patterns(k) - 1
    energy = s @ (field * np.random.default_rng(seed).normal(size=(m, k))).T
    given = np.exp(energy - energy.max(1, keepdims=True))
    joint = given / given.sum(1, keepdims=True) / len(s)
    return world._replace(joint=joint)


def posterior(
    world: World, x: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n patterns m"]:
    """p(c, y | x), exact, of a world without a direct way from y to x.

    What the best answer to any question about a row rests on. Raises ValueError for a
    world with `direct` above 0.
    """
    if world.direct:
        raise ValueError(f"world: direct is {world.direct}, but it must be 0 here")
    s = 2.0 * patterns(len(world.names)) - 1
    z = (x @ world.concept_map.T)[:, None] - s
    with np.errstate(divide="ignore"):
        log = -0.5 * ((z / world.noise) ** 2).sum(-1)[..., None] + np.log(world.joint)
    p = np.exp(log - log.max((1, 2), keepdims=True))
    return p / p.sum((1, 2), keepdims=True)


def draw(world: World, n: int, seed: int) -> Examples:
    """n independent rows of the world."""
    rng = np.random.default_rng(seed)
    k, d = world.concept_map.shape
    cell = rng.choice(world.joint.size, size=n, p=world.joint.reshape(-1))
    pattern, y = np.divmod(cell, world.joint.shape[1])
    c = patterns(k)[pattern]
    along = 2.0 * c - 1 + world.noise * rng.normal(size=(n, k))
    x = along @ world.concept_map + world.direct * world.class_map[y]
    rest = 0.1 * rng.normal(size=(n, d))
    rest -= rest @ world.concept_map.T @ world.concept_map
    return Examples(x + rest, c, y)


def hide(
    concepts: Integer[np.ndarray, "n k"], share: float, seed: int
) -> Bool[np.ndarray, "n k"]:
    """Which labels are known when a share of them, chosen by chance, is missing."""
    if not 0 <= share < 1:
        raise ValueError(f"share: {share}, but must be in [0, 1)")
    return np.random.default_rng(seed).random(concepts.shape) >= share


def best_accuracy(world: World) -> float:
    """Of the Bayes classifier that sees the true concepts."""
    return float(world.joint.max(1).sum())
