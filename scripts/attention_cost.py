"""What forms of attention cost here: processor time in turns, bytes of temporaries.

Shared by the reproductions that compare them; one call is [1, n, 8, 64] in float32
unless said otherwise.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from narrows.scripts.benchmarks.timing import alternate
from rich.console import Console

HEADS, WIDTH = 8, 64
# Ours, our definition, and JAX's: the cheaper of the last two is the baseline.
SIDES = {"method": "xla", "our plain": "reference", "jax.nn": "jax.nn"}


def normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def operands(seed: int, n: int) -> list[jax.Array]:
    rng = np.random.default_rng([seed, n])
    return [normal(rng, 1, n, HEADS, WIDTH) for _ in "qkv"]


@functools.cache
def side(name: str, *, backward: bool = False, causal: bool = True) -> Callable:
    """A compiled form of attention; its three gradients if asked."""
    from narrows.models.kernels.attention import attention

    if name == "jax.nn":
        form = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    else:
        form = functools.partial(attention, implementation=name)

    def run(q, k, v):
        return form(q, k, v, is_causal=causal)

    if not backward:
        return jax.jit(run)
    return jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2)))


@functools.cache
def masked(cell: int) -> Callable:
    """(q, k, v, table of cells) -> attention over the cells kept."""
    from narrows.models.kernels.attention import Blocks, attention

    @jax.jit
    def run(q, k, v, table):
        return attention(q, k, v, mask=Blocks(table, cell, cell), implementation="xla")

    return run


def processor_time(
    sides: Mapping[str, Callable[[], Any]], rounds: int = 3
) -> dict[str, float]:
    """Median seconds of processor time of a call, the sides taking turns."""
    timed = {
        name: lambda run=run: jax.block_until_ready(run())
        for name, run in sides.items()
    }
    found = alternate(timed, rounds=rounds, calls=1, console=Console(quiet=True))
    return {name: float(np.median(x.cpu)) for name, x in found.items()}


def temporaries(call: Callable, n: int, **options: Any) -> int:
    """Bytes of temporaries of a compiled call of n tokens; nothing is run."""
    x = jax.ShapeDtypeStruct((1, n, HEADS, WIDTH), jnp.float32)
    compiled = jax.jit(functools.partial(call, **options)).lower(x, x, x).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
