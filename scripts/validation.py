"""The loss on text that training never sees, with the training step's own objective."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh
from narrows.data.text import Corpus, windows
from narrows.parallel.layout import place_batch


def validation_nats(
    evaluate: Callable,
    state,
    corpus: Corpus,
    mesh: Mesh,
    *,
    seq_len: int,
    batch_size: int,
    rows: int,
    shard: tuple[int, int],
) -> float:
    """Nats per token over the first `rows` windows of the validation split.

    evaluate(state, batch) -> (sums, weight), see `parallel.step.Step`; shard: this
    process's share (index, count) of the rows of each batch.
    """
    index, count = shard
    mine = slice(index * batch_size // count, (index + 1) * batch_size // count)
    nats = weight = 0.0
    for batch in windows(
        corpus, "validation", seq_len, batch_size=batch_size, limit=rows
    ):
        local = {name: rows[mine] for name, rows in batch.items()}
        sums, scored = jax.device_get(evaluate(state, place_batch(local, mesh)))
        nats, weight = nats + float(sums["nats"]), weight + float(scored)
    return nats / weight
