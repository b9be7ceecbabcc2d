"""Low rank: a matrix as the product of two thin ones, after one power iteration.

Vogels et al. 2019, arXiv:1905.13727, Algorithm 1, with a fresh random start from the
key instead of the factor of the step before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .compression import Compressor, Promise, Shape, size, unit


class Factors(NamedTuple):
    left: Float[Array, "m r"]  # float32, orthonormal columns
    right: Float[Array, "w r"]  # float32


def low_rank(rank: int = 4) -> Compressor:
    """P P^T M for P an orthonormal basis of M Q, Q Gaussian with `rank` columns.

    M is x with its rows along the last axis. Exact for matrices of at most that rank.
    delta = rank / min(m, w) in expectation: M Q Q^+ lies in the range of P, and loses
    no more than a random projection of M does. Zero rows stay exactly zero.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank}, but it must be at least 1")

    def encode(key, x):
        matrix, power = unit(_matrix(x))
        rows, columns = matrix.shape
        r = min(rank, rows, columns)
        if rows < columns:  # start on the shorter side, whose dimension bounds delta
            start = matrix.T @ jax.random.normal(key, (rows, r))
            matrix_q = matrix @ jnp.linalg.qr(start)[0]
        else:
            matrix_q = matrix @ jax.random.normal(key, (columns, r))
        left = jnp.linalg.qr(matrix_q)[0]
        left = jnp.where(jnp.any(matrix != 0, -1, keepdims=True), left, 0.0)
        return Factors(left, (matrix.T @ left) * power)

    def decode(payload, shape):
        return (payload.left @ payload.right.T).reshape(shape)

    def promise(shape: Shape) -> Promise:
        rows, columns = size(shape[:-1]), shape[-1]
        return Promise(delta=min(1.0, rank / min(rows, columns)))

    return Compressor(encode, decode, promise, random=True)


def _matrix(x: Float[Array, "*s w"]) -> Float[Array, "m w"]:
    if x.ndim == 0:
        raise ValueError("x: is a scalar, but rows are asked for; reshape it to (1,)")
    return x.reshape(-1, x.shape[-1])
