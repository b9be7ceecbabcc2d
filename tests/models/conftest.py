"""Small models whose every parameter matters, made without compiling an initialiser."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.language_model import build
from narrows.models.transformer import TransformerConfig
from narrows.parallel.rules import name_of

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "depth": 2,
    "width": 32,
    "heads": 2,
    "max_len": 32,
}
CODEBOOK: dict[str, Any] = {"codes": 32, "code_width": 4, "window": 4}


def fill(path, leaf):
    """Random numbers by the leaf's name: scales and biases do not stay 1 and 0."""
    name = name_of(path)
    rng = np.random.default_rng(sum(map(ord, name)))
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or "counts" in name:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if name.endswith("scale"):
        return jnp.asarray(1 + 0.1 * noise)
    if name.endswith("kernel"):
        return jnp.asarray(noise / np.sqrt(SMALL["width"]))
    return jnp.asarray(0.1 * noise if name.endswith("bias") else noise)


@pytest.fixture(scope="session")
def small_model():
    """`small_model("codebook", waist_at=1, **config)`: equal names, equal numbers."""

    def make(waist="none", waist_at=None, **options):
        config = TransformerConfig(**(SMALL | options))
        more = {"waist_options": CODEBOOK} if waist == "codebook" else {}
        shapes = nnx.eval_shape(
            lambda: build(
                config, waist, waist_at=waist_at, key=jax.random.key(0), **more
            )
        )
        graph, state = nnx.split(shapes)
        filled = jax.tree_util.tree_map_with_path(fill, nnx.as_pure(state))
        return nnx.merge(graph, filled)

    return make
