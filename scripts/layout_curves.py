"""Loss curves of a small model on several layouts: the claim that none changes it."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import make_optimizer, warmup_cosine
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.parallel.step import create_state, make_step
from narrows.scripts.claims import NotMeasured

STEPS, ROWS, LENGTH = 20, 8, 16
DECODER = TransformerConfig(vocab_size=256, depth=4, width=32, heads=4, mlp_width=64)


class Curves(NamedTuple):
    learned: float  # last loss over first, on one device
    gap: float  # largest relative difference of any layout, any step


def mesh_of(layout: Layout) -> Mesh:
    """Raises NotMeasured where there are too few devices."""
    if len(jax.devices()) < layout.size:
        raise NotMeasured(
            f"{layout.size} devices: set JAX_NUM_CPU_DEVICES={layout.size}"
        )
    return make_mesh(layout, jax.devices()[: layout.size])


@functools.cache
def _prepared(config: TransformerConfig, text: str, steps: int):
    layout = Layout.parse(text)
    mesh = mesh_of(layout)
    parts = model_parts(config, microbatches=2 * layout.stage)
    tx = make_optimizer("adamw", warmup_cosine(0.01, steps=steps, warmup=steps // 5))
    return mesh, parts, tx, make_step(parts.loss, tx, layout, mesh)


def _batches(config: TransformerConfig, seed: int, steps: int):
    """Runs that count up; an encoder must fill in every seventh or so."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        start = rng.integers(0, 200, (ROWS, 1)).astype(np.int32)
        rows = start + np.arange(LENGTH + 1, dtype=np.int32)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if not config.causal:
            hidden = rng.random(tokens.shape) < 0.15
            tokens, targets = np.where(hidden, 255, tokens).astype(np.int32), tokens
        yield {"tokens": tokens, "targets": targets}


def curve(
    config: TransformerConfig,
    text: str,
    seed: int,
    *,
    steps: int = STEPS,
    batches: Iterable[Mapping[str, np.ndarray]] | None = None,
    rounded: int | None = None,
) -> np.ndarray:
    """Loss of each step.

    batches: whole ones of ROWS x LENGTH, `steps` of them; default: runs that count up.
    rounded: move every parameter at the start by at most one rounding of float32, drawn
    with this seed: what a curve owes to rounding alone.
    """
    mesh, parts, tx, step = _prepared(config, text, steps)
    state, losses = create_state(parts.init, tx, seed, mesh), []
    if rounded is not None:
        state = state._replace(params=_rounded(state.params, rounded))
    index, count = process_rows(mesh, ROWS)
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    for batch in _batches(config, seed, steps) if batches is None else batches:
        batch = {name: rows[mine] for name, rows in batch.items()}
        state, metrics = step.fused(state, place_batch(batch, mesh))
        losses.append(metrics["loss"])
    return np.array(jax.device_get(losses))


def _rounded(params, seed: int):
    """Each number one float32 up, down or as it is, with equal chance."""
    rng = np.random.default_rng(seed)

    def move(x):
        x = np.asarray(x)
        up = np.array([-np.inf, 0, np.inf])[rng.integers(0, 3, x.shape)]
        return np.where(up == 0, x, np.nextafter(x, up.astype(x.dtype)))

    return jax.tree.map(move, params)


def compare(
    config: TransformerConfig, layouts: Sequence[str], seed: int, *, steps: int = STEPS
) -> Curves:
    """The curves of some layouts beside one device's."""
    one = curve(config, "data=1", seed, steps=steps)
    gaps = [
        np.abs(curve(config, text, seed, steps=steps) / one - 1).max()
        for text in layouts
    ]
    return Curves(float(one[-1] / one[0]), float(max(gaps)))
