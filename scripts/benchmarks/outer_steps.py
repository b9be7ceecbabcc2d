"""The rounds that the suite `outer` times, on the mesh of the running processes.

All that is returned is agreed on: times are the longest of any process.
"""

import statistics
import threading
import time
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from narrows.data.text import batches, load_corpus
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.local_updates.outer import OUTERS, make_outer
from narrows.optim.local_updates.rounds import local_updates
from narrows.optim.local_updates.step import make_local_step
from narrows.optim.one_bit_adam import one_bit_adam
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.parallel.step import create_state, make_step

DENSE, ONE_BIT = "data parallel", "one_bit_adam"
EVERY_STEP = (DENSE, ONE_BIT)  # they exchange in every step
METHODS = (*EVERY_STEP, *OUTERS)


class Bench:
    """A transformer of `depth` on real text, trained by each method on one mesh."""

    def __init__(self, mesh: str, depth: int, rows: int, length: int):
        self.layout = Layout.parse(mesh, devices=len(jax.devices()))
        self.mesh = make_mesh(self.layout)
        if self.layout.data < 2:
            raise ValueError(f"mesh: {self.layout}, but data must be 2 or more")
        corpus = load_corpus()
        config = TransformerConfig(vocab_size=corpus.vocab_size, depth=depth, scan=True)
        self.parts = model_parts(config, "none")
        self.inner = optax.adamw(1e-3)
        shard = process_rows(self.mesh, rows)
        options = {"batch_size": rows, "seq_len": length, "seed": 0}
        self.stream = batches(corpus, "train", shard=shard, **options)
        self.shapes = jax.eval_shape(self.parts.init, jax.random.key(0))[0]
        self.made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def facts(self) -> dict[str, Any]:
        size = sum(x.size for x in jax.tree.leaves(self.shapes))
        return {"workers": self.layout.data, "parameters": size}

    def _step(self, method: str, every: int):
        """The step of a method, and its state; every step of it is dispatched once."""
        if (method, every) not in self.made:
            step: Any
            tx: Any = self.inner
            if method == DENSE:
                step = make_step(self.parts.loss, tx, self.layout, self.mesh)
            elif method == ONE_BIT:  # compressed from its second step on
                tx = one_bit_adam(1e-3, workers=self.layout.data, freeze_step=1)
                step = make_step(
                    self.parts.loss, tx, self.layout, self.mesh, gradients="local"
                )
            else:
                tx = local_updates(
                    self.inner,
                    make_outer(method),
                    workers=self.layout.data,
                    every=every,
                )
                step = make_local_step(self.parts.loss, tx, self.layout, self.mesh)
            state = create_state(self.parts.init, tx, 0, self.mesh)
            state, _ = step.fused(state, self._batch())
            if method not in EVERY_STEP:
                state = step.meet(state, 0)
            self.made[method, every] = step, jax.block_until_ready(state)
        return self.made[method, every]

    def _batch(self):
        return place_batch(next(self.stream), self.mesh)

    def pace(self, tries: int) -> dict[str, float]:
        """Seconds of a step that meets nobody, and of a meeting that is waited for."""
        step, state = self._step("local_sgd", 10**6)
        steps, meetings = [], []
        for _ in range(tries):
            batch = self._batch()
            multihost_utils.sync_global_devices("pace")
            clock = time.perf_counter()
            state, _ = step.fused(state, batch)
            jax.block_until_ready(state)
            steps.append(_longest(time.perf_counter() - clock))
            clock = time.perf_counter()
            state = jax.block_until_ready(step.meet(state, 0))
            meetings.append(_longest(time.perf_counter() - clock))
        self.made["local_sgd", 10**6] = step, state
        return {
            "step": statistics.median(steps),
            "meeting": statistics.median(meetings),
        }

    def round(self, method: str, every: int, steps: int) -> dict[str, Any]:
        """Seconds of a round: `steps` steps of a method that meets once in `every`.

        A stale method runs two rounds and the second is timed: the exchange that the
        first one sent travels beside its steps, and its meeting waits for what has not
        arrived. `events` of this process: (what, begin, end) in seconds, of each step
        and each exchange of a stale method, from its dispatch to its arrival.
        """
        step, state = self._step(method, every)
        if method not in EVERY_STEP:  # begin with a round: the first meeting ends one
            zero = jax.device_put(np.int32(0), state.step.sharding)
            state = state._replace(step=zero)
        stale = method in OUTERS and OUTERS[method].stale
        events: list[tuple[str, float, float]] = []
        watchers = []
        many = [self._batch() for _ in range(min(steps, 4))]
        jax.block_until_ready(many)
        multihost_utils.sync_global_devices("round")
        start = begun = time.perf_counter()

        def watch(array, begin):
            jax.block_until_ready(array)
            events.append(("exchange", begin, time.perf_counter() - start))

        def wait():  # but not for what may still be on its way
            own = method in EVERY_STEP
            jax.block_until_ready(state if own else (state.params, state.opt.own))

        for n in range(2 * steps if stale else steps):
            if n == steps:
                wait()
                begun = time.perf_counter()
            begin = time.perf_counter() - start
            state, metrics = step.fused(state, many[n % len(many)])
            if stale and (n + 1) % every == 0:
                sent = time.perf_counter() - start
                arriving = jax.tree.leaves(state.opt.arriving)
                watchers.append(threading.Thread(target=watch, args=(arriving, sent)))
                watchers[-1].start()
            jax.block_until_ready(metrics)
            events.append(("step", begin, time.perf_counter() - start))
        wait()
        seconds = time.perf_counter() - begun
        for watcher in watchers:
            watcher.join()
        self.made[method, every] = step, state
        return {"seconds": _longest(seconds), "events": sorted(events, key=_begin)}


def _begin(event: tuple[str, float, float]) -> float:
    return event[1]


def _longest(seconds: float) -> float:
    return float(np.max(multihost_utils.process_allgather(np.float32(seconds))))
