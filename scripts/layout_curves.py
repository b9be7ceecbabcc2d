"""Loss curves of a small model on several layouts: the claim that none changes it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import make_optimizer, warmup_cosine
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.step import create_state, make_step
from narrows.scripts.claims import NotMeasured

STEPS, ROWS, LENGTH = 20, 8, 16
TX = make_optimizer("adamw", warmup_cosine(0.01, steps=STEPS, warmup=4))


class Curves(NamedTuple):
    learned: float  # last loss over first, on one device
    gap: float  # largest relative difference of any layout, any step


def mesh_of(layout: Layout) -> Mesh:
    """Raises NotMeasured where there are too few devices."""
    if len(jax.devices()) < layout.size:
        raise NotMeasured("8 devices: set JAX_NUM_CPU_DEVICES=8")
    return make_mesh(layout, jax.devices()[: layout.size])


@functools.cache
def _prepared(config: TransformerConfig, text: str):
    layout = Layout.parse(text)
    mesh = mesh_of(layout)
    parts = model_parts(config, microbatches=2 * layout.stage)
    return mesh, parts, make_step(parts.loss, TX, layout, mesh)


def _batches(config: TransformerConfig, seed: int):
    """Runs that count up; an encoder must fill in every seventh or so."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        start = rng.integers(0, 200, (ROWS, 1)).astype(np.int32)
        rows = start + np.arange(LENGTH + 1, dtype=np.int32)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if not config.causal:
            hidden = rng.random(tokens.shape) < 0.15
            tokens, targets = np.where(hidden, 255, tokens).astype(np.int32), tokens
        yield {"tokens": tokens, "targets": targets}


def curve(config: TransformerConfig, text: str, seed: int) -> np.ndarray:
    """Loss of each of 20 steps."""
    mesh, parts, step = _prepared(config, text)
    state, losses = create_state(parts.init, TX, seed, mesh), []
    for batch in _batches(config, seed):
        state, metrics = step.fused(state, place_batch(batch, mesh))
        losses.append(metrics["loss"])
    return np.array(jax.device_get(losses))


def compare(config: TransformerConfig, layouts: Sequence[str], seed: int) -> Curves:
    """The curves of some layouts beside one device's."""
    one = curve(config, "data=1", seed)
    gaps = [np.abs(curve(config, text, seed) / one - 1).max() for text in layouts]
    return Curves(float(one[-1] / one[0]), float(max(gaps)))
