"""What it costs to compress and decompress a gradient, beside the step that makes it.

    python scripts/benchmark.py --suite=compressors
    python scripts/benchmark.py --suite=compressors --compressors=sign,int8 --record

One device trains the 10.8 M-parameter transformer on 8 rows of 256 tokens by dense
Adam; in turn with its steps, a tree of random numbers in the shape of its gradient is
encoded and decoded again. Each line holds the time of that over the time of a step, and
the bits a parameter that would travel. About 2 minutes on 2 CPU cores.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from narrows.data.text import batches, load_corpus
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compression import bits, compress
from narrows.optim.compressors import COMPRESSORS, make_compressor
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.step import create_state, make_step
from narrows.scripts.benchmarks.timing import alternate, ratio
from rich.console import Console
from rich.table import Table

CHOSEN = ("sign", "int8", "int4", "top_k", "threshold_top_k", "natural", "low_rank")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_list(
        "compressors",
        list(CHOSEN),
        "compressors: " + ", ".join(COMPRESSORS),
        flag_values=values,
    )
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    integer("compressed_depth", 6, "compressors: blocks; 6 has 10.8 M", 1)
    integer("compressed_rows", 8, "compressors: of the step", 1)
    integer("compressed_length", 256, "compressors: tokens of a row", 1)


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """A line for each compressor, all in turn with the dense step."""
    made = {name: make_compressor(name) for name in f.compressors}
    train, shapes = dense_step(
        f.compressed_depth, f.compressed_rows, f.compressed_length
    )
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    sides: dict[str, Any] = {"dense step": train}
    for name, compressor in made.items():
        sides[name] = functools.partial(there_and_back(compressor), gradient)
    times = alternate(sides, rounds=f.rounds, calls=f.calls, console=console)
    step = times.pop("dense step")
    size = sum(x.size for x in jax.tree.leaves(shapes))
    for name, taken in times.items():
        sent = sum(bits(made[name], x.shape) for x in jax.tree.leaves(shapes))
        line: dict[str, Any] = {"compressor": name, "parameters": size}
        line |= {"rows": f.compressed_rows, "length": f.compressed_length}
        line["bits_a_parameter"] = sent / size
        for clock in ("cpu", "wall"):
            spread = ratio(getattr(step, clock), getattr(taken, clock))
            line[f"over_step_{clock}"] = spread._asdict()
        yield line


def dense_step(depth: int, rows: int, length: int):
    """A call that trains one step on one device, and the shapes of the parameters."""
    corpus = load_corpus()
    config = TransformerConfig(vocab_size=corpus.vocab_size, depth=depth, scan=True)
    parts = model_parts(config, "none")
    layout = Layout.parse("data=1", devices=1)
    mesh = make_mesh(layout, jax.devices()[:1])
    tx = optax.adam(1e-3)
    state = create_state(parts.init, tx, 0, mesh)
    step = make_step(parts.loss, tx, layout, mesh, advance=parts.advance)
    stream = batches(corpus, "train", batch_size=rows, seq_len=length, seed=0)
    batch = place_batch(next(stream), mesh)
    shapes = jax.eval_shape(lambda: state.params)

    def run():
        nonlocal state
        state, _ = step.fused(state, batch)
        return jax.block_until_ready(state)

    return run, shapes


def there_and_back(compressor):
    """gradient -> what the receiver sees, compiled; done when it returns."""

    @jax.jit
    def program(gradient):
        leaves, treedef = jax.tree.flatten(gradient)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return treedef.unflatten([compress(compressor, key, x) for key, x in pairs])

    return lambda gradient: jax.block_until_ready(program(gradient))


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Time of compressing over that of a dense step, by processor time and wall."""
    made = Table("compressor", "bits a parameter", "cpu, of a step", "wall, of a step")
    for line in lines:
        cells = [
            "{median:.1%} ({low:.1%} to {high:.1%})".format(
                **line[f"over_step_{clock}"]
            )
            for clock in ("cpu", "wall")
        ]
        bits_each = np.round(line["bits_a_parameter"], 2)
        made.add_row(line["compressor"], f"{bits_each:g}", *cells)
    return made
