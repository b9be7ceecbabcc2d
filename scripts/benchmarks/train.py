"""Tokens per second of a training step: nanoGPT's "baby" model, ours beside its own.

Both have its exact shape (6 layers, 6 heads, width 384, context 256, batch 12,
learned positions, gelu, layer norm, no bias, tied embedding, float32), AdamW and
clipping, no dropout, and read the same tokens. The peer runs eagerly and compiled; the
better counts. Ours runs on one device and, where there are several, on all of them with
parameters and optimizer state spread (fsdp): on a CPU, one device a core keeps each
core at work through the parts that are not matrix products:

    JAX_NUM_CPU_DEVICES=2 python scripts/benchmark.py --suite=train --peer=<checkout>
"""

import importlib.util
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.step import create_state, make_step
from narrows.scripts.benchmarks.timing import alternate, ratio
from rich.console import Console
from rich.table import Table

ROWS, LENGTH, VOCABULARY, DEPTH, WIDTH = 12, 256, 65, 6, 384
PRODUCTS = 8
HOW = (
    "no peer: check out karpathy/nanoGPT, pip install torch, and give "
    "--peer=<the checkout>"
)


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("peer", None, "train: the peer's folder", flag_values=values)


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """One line: ratios to each peer, and the share of the attainable rate."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16, ROWS, LENGTH + 1))
    narrow = tokens.astype(np.int32)
    plain, parameters = our_step(narrow, Layout())
    ours = {"": plain}
    count = len(jax.devices())
    if count > 1 and ROWS % count == 0:
        ours[f"{count}_devices_"] = our_step(narrow, Layout(fsdp=count))[0]
    sides: dict[str, Callable[[], object]] = {"matmul": matmul(), **ours}
    if f.peer is None:
        console.print(HOW)
    else:
        sides |= peer_steps(pathlib.Path(f.peer), tokens)
    times = alternate(sides, rounds=f.rounds, calls=f.calls, console=console)
    found: dict[str, Any] = {"parameters": parameters, "rounds": f.rounds}
    work = step_operations(parameters)
    product_work = PRODUCTS * 2 * ROWS * LENGTH * WIDTH * (4 * WIDTH)
    for prefix, clock in itertools.product(ours, ("cpu", "wall")):
        mine, product = (getattr(times[name], clock) for name in (prefix, "matmul"))
        # theirs / ours, where theirs is the time that the step's operations would take
        # at the rate of the matrix product
        attained = ratio(mine, product * work / product_work)
        found[f"{prefix}attained_{clock}"] = attained._asdict()
        for name in sides.keys() - ours.keys() - {"matmul"}:
            theirs = getattr(times[name], clock)
            found[f"{prefix}{name}_{clock}"] = ratio(mine, theirs)._asdict()
    yield found


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """How many times as fast as each side ours is, and its share of the attainable."""
    made = Table("times as fast as", "median", "quartiles over rounds")
    for line in lines:
        for name, spread in line.items():
            if isinstance(spread, dict):
                quartiles = f"{spread['low']:.3f} to {spread['high']:.3f}"
                made.add_row(name, f"{spread['median']:.3f}", quartiles)
    return made


def our_step(tokens: np.ndarray, layout: Layout) -> tuple[Callable[[], object], int]:
    """A call that trains one step on the layout's devices; the parameters' count."""
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        depth=DEPTH,
        width=WIDTH,
        max_len=LENGTH,
        norm="layer",
        position="learned",
        mlp="gelu",
        tied=True,
    )
    parts = model_parts(config, "none")
    mesh = make_mesh(layout, jax.devices()[: layout.fsdp])
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, b1=0.9, b2=0.99, weight_decay=0.1),
    )
    state = create_state(parts.init, tx, 0, mesh)
    step = make_step(parts.loss, tx, layout, mesh, advance=parts.advance)
    batches = [
        place_batch({"tokens": rows[:, :-1], "targets": rows[:, 1:]}, mesh)
        for rows in tokens
    ]
    turn = 0

    def run():
        nonlocal state, turn
        state, metrics = step.fused(state, batches[turn % len(batches)])
        turn += 1
        return jax.block_until_ready((state, metrics))

    return run, sum(x.size for x in jax.tree.leaves(state.params))


def peer_steps(folder: pathlib.Path, tokens: np.ndarray) -> dict[str, Callable]:
    """nanoGPT's own model and optimizer, eager and compiled."""
    if not (folder / "model.py").is_file():
        raise ValueError(f"peer: {folder} holds no model.py; {HOW}")
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"peer: torch is not installed; {HOW}") from error
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    torch.set_num_threads(os.cpu_count() or 1)
    batches = [torch.from_numpy(rows) for rows in tokens]

    def side(compiled: bool) -> Callable:
        torch.manual_seed(0)
        config = module.GPTConfig(
            block_size=LENGTH,
            vocab_size=VOCABULARY,
            n_layer=DEPTH,
            n_head=WIDTH // 64,
            n_embd=WIDTH,
            dropout=0.0,
            bias=False,
        )
        model = module.GPT(config)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
        forward = torch.compile(model) if compiled else model
        turn = 0

        def run():
            nonlocal turn
            rows = batches[turn % len(batches)]
            turn += 1
            _, loss = forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run

    return {"nanogpt_eager": side(False), "nanogpt_compiled": side(True)}


def matmul() -> Callable[[], object]:
    """The widest matrix products of the model, there and back: what a machine attains.

    In one compiled loop, so that neither dispatch nor fresh memory is counted.
    """
    x = jnp.ones((ROWS * LENGTH, WIDTH), jnp.float32)
    w = jnp.full((WIDTH, 4 * WIDTH), 1 / (2 * WIDTH), jnp.float32)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, PRODUCTS // 2, lambda _, x: (x @ w) @ w.T, x)

    return lambda: jax.block_until_ready(products(x))


def step_operations(parameters: int) -> float:
    """Floating-point operations of a step: 6 per parameter and token, and attention.

    Learned positions take part in no product. Scores and mixing are 2 products of
    t x t x width a layer, halved by the causal mask, tripled by the backward pass.
    """
    tokens = ROWS * LENGTH
    products = 6 * (parameters - LENGTH * WIDTH) * tokens
    return products + 3 * DEPTH * 2 * (2 * LENGTH * WIDTH) / 2 * tokens
