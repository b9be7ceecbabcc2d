"""The steps that the suite `exchange` times, on the mesh of the running processes.

All that is returned is agreed on: times are the longest of any process.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from narrows.data.text import batches, load_corpus
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compressed_mean import PLAIN, CompressedMean, Way, compressed_mean
from narrows.optim.compressed_sgd import FOUR_BITS, compressed_sgd, exchange
from narrows.optim.one_bit_adam import ONE_BIT, one_bit_adam
from narrows.optim.one_bit_lamb import one_bit_lamb
from narrows.optim.quantizers import blocks
from narrows.optim.sparse import top_k
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.parallel.state import simulate
from narrows.parallel.step import Step, create_state, make_step

INT8 = Way("feedback", blocks(8))
TOP_K = Way("feedback", top_k(0.01))
SGD_RATE = 30.0  # of Adam's rate
LEAST_SECONDS, LEAST, MOST = 0.5, 2**17, 2**26  # of a timed message; its bytes


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # (rate, freeze_step, **options)
    topology: Literal["dense", "two_phase", "gather"]
    ways: tuple[Way, Way] = (PLAIN, PLAIN)

    def mean(self, workers: int) -> CompressedMean:
        """What is exchanged in a step, once it is compressed."""
        return compressed_mean(*self.ways, workers=workers, topology=self.topology)


def _int8_adam(rate, freeze_step, **options):
    del freeze_step
    mean = compressed_mean(INT8, INT8, **options)
    return optax.chain(exchange(mean), optax.adam(rate, b2=0.99))


def _sgd(rate, freeze_step, **options):
    del freeze_step
    return compressed_sgd(lambda count: SGD_RATE * rate(count), **options)


METHODS: dict[str, Method] = {
    "adam": Method(lambda rate, *_, **__: optax.adam(rate, b2=0.99), "dense"),
    "one_bit_adam": Method(
        lambda rate, freeze_step, **options: one_bit_adam(
            rate, freeze_step=freeze_step, b2=0.99, **options
        ),
        "two_phase",
        (ONE_BIT, ONE_BIT),
    ),
    "one_bit_lamb": Method(
        lambda rate, freeze_step, **options: one_bit_lamb(
            rate, freeze_step=freeze_step, b2=0.99, **options
        ),
        "two_phase",
        (ONE_BIT, ONE_BIT),
    ),
    "int8_adam": Method(_int8_adam, "two_phase", (INT8, INT8)),
    "four_bit_sgd": Method(_sgd, "two_phase", (FOUR_BITS, FOUR_BITS)),
    "top_k_sgd": Method(
        functools.partial(_sgd, up=TOP_K, topology="gather"), "gather", (TOP_K, PLAIN)
    ),
}


class Run:
    """A method's program and state on the mesh."""

    def __init__(self, method: Method, parts, layout: Layout, mesh, schedule):
        rate, steps = schedule
        tx = method.make(rate, max(1, steps // 5), workers=layout.data)
        self.step: Step = make_step(
            parts.loss,
            tx,
            layout,
            mesh,
            gradients="mean" if method.topology == "dense" else "local",
            advance=parts.advance,
        )
        self.state = create_state(parts.init, tx, 0, mesh)

    def fused(self, batch) -> float:
        """The loss of a step, once all of it is done."""
        self.state, metrics = self.step.fused(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


class Bench:
    """A transformer of `depth` on real text, trained by each method on one mesh."""

    def __init__(self, mesh: str, depth: int, rows: int, length: int, steps: int):
        self.layout = Layout.parse(mesh, devices=len(jax.devices()))
        self.mesh = make_mesh(self.layout)
        if self.layout.data < 2:
            raise ValueError(f"mesh: {self.layout}, but data must be 2 or more")
        self.corpus = load_corpus()
        config = TransformerConfig(
            vocab_size=self.corpus.vocab_size, depth=depth, scan=True
        )
        self.parts = model_parts(config, "none")
        self.rows, self.length, self.steps = rows, length, steps
        self.shapes = jax.eval_shape(self.parts.init, jax.random.key(0))[0]
        rate = optax.cosine_decay_schedule(3e-3 if depth < 4 else 1e-3, steps, 0.1)
        self.schedule = (rate, steps)
        self.runs: dict[str, Run] = {}
        self.stream = self._stream()

    def _stream(self):
        shard = process_rows(self.mesh, self.rows)
        options = {"batch_size": self.rows, "seq_len": self.length, "seed": 0}
        return batches(self.corpus, "train", shard=shard, **options)

    def facts(self) -> dict[str, Any]:
        size = sum(x.size for x in jax.tree.leaves(self.shapes))
        return {"workers": self.layout.data, "parameters": size, "mesh": str(self.mesh)}

    def sent(self, method: str) -> float:
        """Bytes that a worker sends in a step, once compressed."""
        workers = self.layout.data
        if method == "adam":
            dense = sum(4 * x.size for x in jax.tree.leaves(self.shapes))
            return 2 * (workers - 1) / workers * dense
        return METHODS[method].mean(workers).sent_bits(self.shapes) / 8

    def learn(self, method: str) -> list[float]:
        """Losses, nats, of the first `steps` steps; the method goes on from there."""
        run = Run(METHODS[method], self.parts, self.layout, self.mesh, self.schedule)
        self.runs[method], stream = run, self._stream()
        return [
            run.fused(place_batch(next(stream), self.mesh)) for _ in range(self.steps)
        ]

    def turn(self, method: str) -> dict[str, float]:
        """Seconds of one step, and bytes that left this process's namespace."""
        batch = place_batch(next(self.stream), self.mesh)
        multihost_utils.sync_global_devices("turn")
        before, clock = left(), time.perf_counter()
        self.runs[method].fused(batch)
        seconds = time.perf_counter() - clock
        return {"seconds": _longest(seconds), "left": left() - before}

    def local(self, method: str, rounds: int) -> float:
        """Seconds of a step that sends nothing, every worker on its own rows.

        Each compresses in full, as if it were the only worker.
        """
        tx = METHODS[method].make(self.schedule[0], 1, workers=1, axis_name="alone")
        loss, key = self.parts.loss, jax.random.key(0)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(P(), P(), P(), P("data")),
            out_specs=P(),
            check_vma=False,  # workers part: nothing is sent
            axis_names={"data"},
        )
        def step(params, state, rest, batch):
            grads = jax.grad(lambda p: loss(p, rest, batch, key).total)(params)
            grads = jax.tree.map(lambda g: g[None], grads)
            updates, state = simulate(
                lambda g, s: tx.update(g, s, params), workers=1, axis_name="alone"
            )(grads, state)
            updates = jax.tree.map(lambda u: u[0], updates)
            return optax.apply_updates(params, updates), state

        whole = jax.NamedSharding(self.mesh, P())
        params, rest = jax.jit(self.parts.init, out_shardings=whole)(key)
        state = jax.jit(tx.init, out_shardings=whole)(params)
        found = []
        for _ in range(rounds + 2):  # the first compiles, and is dense
            batch = place_batch(next(self.stream), self.mesh)
            multihost_utils.sync_global_devices("local")
            clock = time.perf_counter()
            params, state = step(params, state, rest, batch)
            jax.block_until_ready((params, state))
            found.append(_longest(time.perf_counter() - clock))
        return float(np.median(found[2:]))

    def link(self) -> dict[str, dict[str, float]]:
        """Bytes a second that a worker sends by each topology, and seconds of none."""
        return {name: self._speed(name) for name in ("dense", "two_phase", "gather")}

    def _speed(self, topology: str) -> dict[str, float]:
        n, size = self.layout.data, LEAST
        seconds, delay = self._time(topology, size), self._time(topology, 64 * n)
        while seconds < LEAST_SECONDS and size < MOST:
            size *= 4
            seconds = self._time(topology, size)
        share = {"dense": 2 / n, "two_phase": 2 / n, "gather": 1}[topology]
        sent = share * (n - 1) * size
        return {"bytes_s": sent / max(seconds - delay, 1e-9), "delay_s": delay}

    def _time(self, topology: str, size: int) -> float:
        """Seconds of an exchange of `size` bytes a worker, the second time."""
        n = self.layout.data

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=False,
        )
        def sent(x):
            if topology == "dense":
                return lax.psum(x, "data")
            x = x[0]
            if topology == "two_phase":
                x = lax.all_to_all(x.reshape(n, -1), "data", 0, 0, tiled=True)[0]
            return lax.all_gather(x, "data").reshape(1, -1)

        dtype = jnp.float32 if topology == "dense" else jnp.uint8
        width = size // jnp.dtype(dtype).itemsize // n * n
        place = jax.NamedSharding(self.mesh, P("data"))
        make = jax.jit(lambda: jnp.zeros((n, width), dtype), out_shardings=place)
        go, x = jax.jit(sent), make()
        jax.block_until_ready(go(x))
        multihost_utils.sync_global_devices("link")
        clock = time.perf_counter()
        jax.block_until_ready(go(x))
        return _longest(time.perf_counter() - clock)


def _longest(seconds: float) -> float:
    return float(np.max(multihost_utils.process_allgather(np.float32(seconds))))


def left(device: str = "cable") -> int:
    """Bytes sent over a network device of this namespace; 0 where it is not there."""
    lines = pathlib.Path("/proc/net/dev")
    if not lines.exists():
        return 0
    for line in lines.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[8])
    return 0
