"""One bit an entry once Adam's second moment has settled, and the loss of Adam.

Paper: H. Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with
Adam's Convergence Speed", ICML 2021, arXiv:2102.02888 (code: DeepSpeed's OneBitAdam).
Claim: error feedback repairs what is linear in the gradient. Adam's second moment is
not, so gradients compressed from the start spoil it; with that moment frozen after a
warm-up, the momentum can go in one bit, and the run sends up to 5 times less at the
same loss.

    python scripts/reproduce.py --system=one_bit_adam

Expected: 1/31 of the bytes in the compressed phase, 5.6 times less over a run, losses
within 1 % of Adam's; on inputs of unlike scales compressed gradients and no feedback
end above Adam.
Hardware and time: two CPU cores; quick 2 minutes, full 12 minutes. Eight workers are
simulated on one device; the wire is read off a program compiled for eight.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from narrows.data.text import batches, load_corpus, windows
from narrows.models.language_model import Parts, model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compressed_mean import PLAIN, Way, compressed_mean
from narrows.optim.compressed_sgd import exchange
from narrows.optim.one_bit_adam import one_bit_adam
from narrows.optim.signs import sign
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.state import simulate
from narrows.parallel.step import create_state, make_step
from narrows.parallel.wire import collectives
from narrows.scripts.claims import Claim, Law, Ordering, Ratio, Row, System
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="one_bit_adam",
    title="1-bit Adam: Communication Efficient Large-Scale Training with "
    "Adam's Convergence Speed",
    paper="arXiv:2102.02888, ICML 2021",
    room="optim/",
    module="narrows.optim.one_bit_adam",
    summary="Adam whose momentum is sent in one bit an entry once v is frozen",
)
WORKERS = 8
WARM_TEXT, WARM_NETWORK = 0.15, 0.2  # shares of the steps that are dense
SIZES = (64, 64, 64, 10)  # of the note's network
ROWS, NETWORK_RATE = 32, 1e-3  # a worker's batch
TEXT_ROWS, TEXT_LENGTH = 4, 64
WARM_BRANCH = "branch_0_fun"  # in names of instructions: a condition that is false


def make(arm: str, rate, warm: int, b2: float, scale: str) -> Any:
    """An optimizer on local gradients. `scale` is that of the signs: l1 or rms."""
    signs = sign(scale)  # type: ignore[arg-type]
    fed, bare = Way("feedback", signs), Way("plain", signs)
    adam = optax.adam(rate, b2=b2)
    if arm == "Adam":
        return optax.chain(exchange(compressed_mean(PLAIN, workers=WORKERS)), adam)
    if arm == "naive":  # compressed gradients, with feedback, into both moments
        return optax.chain(exchange(compressed_mean(fed, fed, workers=WORKERS)), adam)
    way = {"method": fed, "no feedback": bare, "only frozen": PLAIN}[arm]
    options = {"workers": WORKERS, "freeze_step": warm, "b2": b2}
    return one_bit_adam(rate, up=way, down=way, **options)


def train(
    loss: Callable, params, batch_of: Callable, tx, steps: int
) -> tuple[Any, jax.Array]:
    """Last parameters and every step's loss, of WORKERS workers on one device.

    loss(params, batch); batch_of(step) has a leading axis of workers.
    """

    def step(carry, i):
        params, state = carry
        losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(
            params, batch_of(i)
        )
        updates, state = simulate(
            lambda g, s: tx.update(g, s, params), workers=WORKERS, axis_name="data"
        )(grads, state)
        first = jax.tree.map(lambda u: u[0], updates)  # equal on all workers
        return (optax.apply_updates(params, first), state), losses.mean()

    carry = params, tx.init(params)
    (params, _), losses = jax.lax.scan(step, carry, jnp.arange(steps))
    return params, losses


def layers(key, gain: float = 1.0) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": gain * jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def tanh_network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@functools.partial(jax.jit, static_argnames=("arm", "scale", "steps"))
def network_loss(seed, *, arm: str, scale: str, steps: int) -> jax.Array:
    """Mean loss, nats, of the last 5 % of the steps.

    A network learns the classes that another gives to standard normal points, and sees
    their 64 coordinates scaled by 1 to 0.01. One scale for all of a worker's signs of a
    chunk: the parameters are one vector, as in the paper.
    """
    points, teach, begin = jax.random.split(jax.random.key(seed), 3)
    teacher = layers(teach, gain=2.0)
    flat, unravel = ravel_pytree(layers(begin))

    def batch_of(step):
        key = jax.random.fold_in(points, step)
        z = jax.random.normal(key, (WORKERS, ROWS, SIZES[0]))
        label = jnp.argmax(tanh_network(teacher, z), -1)
        return z * jnp.logspace(0, -2, SIZES[0]), label

    def loss(flat, batch):
        logits = tanh_network(unravel(flat), batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    rate = optax.linear_schedule(NETWORK_RATE, 0.0, steps)
    tx = make(arm, rate, int(WARM_NETWORK * steps), 0.999, scale)
    losses = train(loss, flat, batch_of, tx, steps)[1]
    return losses[-(steps // 20) :].mean()


def network(scale: str, seed: int) -> Iterator[Row]:
    """The note's network, by signs of either scale."""
    steps = 600 if scale == "quick" else 2000
    run = functools.partial(network_loss, steps=steps)
    adam = float(run(seed, arm="Adam", scale="rms"))
    yield Row("final loss", adam, "Adam")
    yield Row("final loss", float(run(seed, arm="only frozen", scale="rms")), "frozen")
    for kind in ("rms",) if scale == "quick" else ("rms", "l1"):
        for arm in ("method", "naive", "no feedback"):
            name = arm if kind == "rms" else f"{arm}, l1"
            found = float(run(seed, arm=arm, scale=kind))
            yield Row("final loss", found, name)
            yield Row("final loss over Adam's", found - adam, name)
    yield Row("final loss", adam + 0.1, "Adam + 0.1")
    yield Row("final loss", adam + 0.4, "Adam + 0.4")


def language_model(depth: int, vocab_size: int) -> Parts:
    config = TransformerConfig(vocab_size=vocab_size, depth=depth, width=64, heads=2)
    return model_parts(config, "none")


@functools.partial(jax.jit, static_argnames=("arm", "depth", "steps"))
def text_run(seed, data, held, rate, *, arm: str, depth: int, steps: int):
    """Validation loss, nats a token, and the losses of training."""
    parts = language_model(depth, 256)
    params, rest = parts.init(jax.random.key(seed))

    def loss(params, batch):
        found = parts.loss(params, rest, batch, None)
        return found.total / found.weight

    shape = optax.warmup_cosine_decay_schedule(0, 1.0, steps // 20, steps)
    tx = make(arm, lambda n: rate * shape(n), int(WARM_TEXT * steps), 0.99, "l1")
    params, losses = train(
        loss, params, lambda i: jax.tree.map(lambda x: x[i], data), tx, steps
    )
    scored = jax.lax.map(lambda batch: loss(params, batch), held)
    return scored.mean(), losses


def text(scale: str, seed: int) -> Iterator[Row]:
    """A small transformer on Python's library; at full, each arm's best of 3 rates."""
    steps = 200 if scale == "quick" else 1000
    depth = 1 if scale == "quick" else 2
    corpus = load_corpus()
    size = {"batch_size": WORKERS * TEXT_ROWS, "seq_len": TEXT_LENGTH}
    stream = batches(corpus, "train", seed=seed, **size)
    drawn = [next(stream) for _ in range(steps)]
    data = jax.tree.map(
        lambda *x: np.stack(x).reshape(steps, WORKERS, TEXT_ROWS, TEXT_LENGTH), *drawn
    )
    passed = list(windows(corpus, "validation", 64, batch_size=64, limit=512))
    held = jax.tree.map(lambda *x: np.stack(x), *passed)
    rates = (6e-3,) if scale == "quick" else (3e-3, 6e-3, 1.2e-2)
    for arm in ("method", "Adam"):
        run = functools.partial(text_run, arm=arm, depth=depth, steps=steps)
        found = [float(run(seed, data, held, rate)[0]) for rate in rates]
        for rate, nats in zip(rates, found, strict=True):
            yield Row(f"validation nats rate={rate:g}", nats, arm)
        yield Row("validation nats", min(found), arm)
    shapes = jax.eval_shape(language_model(depth, 256).init, jax.random.key(0))[0]
    dense, small = bytes_of(shapes)
    warm = int(WARM_TEXT * steps)
    yield Row("megabytes a worker", 1e-6 * steps * dense, "Adam")
    yield Row(
        "megabytes a worker", 1e-6 * (warm * dense + (steps - warm) * small), "method"
    )


def bytes_of(shapes) -> tuple[float, float]:
    """That a worker sends in a step, by a float32 ring and by one bit both ways."""
    dense = sum(4 * x.size for x in jax.tree.leaves(shapes))
    one_bit = Way("feedback", sign())
    mean = compressed_mean(one_bit, one_bit, workers=WORKERS)
    return 2 * (WORKERS - 1) / WORKERS * dense, mean.sent_bits(shapes) / 8


def wire(scale: str, seed: int) -> Iterator[Row]:
    """What the compressed phase sends, read off the program of a mesh of 8 devices."""
    del seed
    depth = 2 if scale == "quick" else 6
    code = (
        "import json, sys\n"
        "from narrows.scripts.reproductions.one_bit_adam import compiled_wire\n"
        "print(json.dumps(compiled_wire(int(sys.argv[1]))))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(WORKERS)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", code, str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    for metric, value in json.loads(done.stdout.splitlines()[-1]).items():
        yield Row(metric, value)


def compiled_wire(depth: int) -> dict[str, float]:
    """Of the training step's two branches, the one that is taken once v is frozen."""
    layout = Layout(data=WORKERS)
    mesh = make_mesh(layout)
    config = TransformerConfig(vocab_size=256, depth=depth, scan=True)
    parts = model_parts(config, "none")
    tx = one_bit_adam(1e-3, workers=WORKERS, freeze_step=1, clip=1.0)
    state = create_state(parts.init, tx, 0, mesh)
    step = make_step(
        parts.loss, tx, layout, mesh, gradients="local", advance=parts.advance
    )
    tokens = np.zeros((WORKERS, 16), np.int32)
    batch = place_batch({"tokens": tokens, "targets": tokens}, mesh)

    every = collectives(step.fused.lower(state, batch).compile(), mesh)
    found = [c for c in every if WARM_BRANCH not in c.op_name]
    if not 0 < len(found) < len(every):
        raise RuntimeError(f"no {WARM_BRANCH} among {[c.op_name for c in every]}")
    floats = [np.prod(s) for c in found if "float" in c.dtype for s in c.shapes]
    sent = sum(c.count * c.wire_bytes for c in found)
    dense, counted = bytes_of(state.params)
    packed = sum(c.count * c.wire_bytes for c in found if c.dtype == "uint8")
    return {
        "longest float collective over workers": float(max(floats)) / WORKERS,
        "bytes over the dense all-reduce": sent / dense,
        "packed bytes off the formula": packed - counted,
    }


NETWORK = "64-64-64-10 tanh network, inputs scaled by 1 to 0.01, 8 workers x 32, signs "
CLAIMS = (
    Claim(
        "no_dense",
        "the compiled compressed phase holds no collective of floats longer than the "
        "number of workers",
        "compressed all-reduce of the momentum, Sec. 4.2",
        Law("longest float collective over workers", 1.0),
        wire,
    ),
    Claim(
        "thirtieth",
        "all it sends is at most 1/30 of the float32 all-reduce",
        "32 times less than float32 (16 than float16)",
        Law("bytes over the dense all-reduce", 1 / 30),
        wire,
    ),
    Claim(
        "formula",
        "the packed bytes of the program are those of the formula",
        "not claimed",
        Law("packed bytes off the formula", 0.5),
        wire,
    ),
    Claim(
        "volume",
        "a run with 15 % warm-up sends at least 5 times fewer bytes than Adam",
        "up to 5 times less communication volume end to end",
        Ratio("megabytes a worker", "Adam", "method", at_least=5.0),
        text,
    ),
    Claim(
        "same_loss",
        "and its validation loss on text is at most 1 % above Adam's",
        "the same sample-wise convergence as Adam",
        Ratio("validation nats", "method", "Adam", at_most=1.01),
        text,
    ),
    Claim(
        "network_same",
        NETWORK + "of the rms scale, 20 % warm-up: within 2 % of Adam",
        "the same convergence as Adam",
        Ratio("final loss", "method", "Adam", at_most=1.02),
        network,
    ),
    Claim(
        "naive",
        "there gradients compressed with feedback into both moments end above Adam "
        "+ 0.1 nats",
        "compressed gradients in both moments do not converge as Adam does, Sec. 3",
        Ordering("final loss", "Adam + 0.1", "naive"),
        network,
    ),
    Claim(
        "no_feedback",
        "there 1-bit Adam without feedback ends above Adam + 0.4 nats",
        "error feedback is needed",
        Ordering("final loss", "Adam + 0.4", "no feedback"),
        network,
    ),
    Claim(
        "frozen",
        "there a frozen v costs nothing by itself: within 2 % of Adam",
        "v is stable after the warm-up, Sec. 3.3",
        Ratio("final loss", "frozen", "Adam", at_most=1.02),
        network,
    ),
)


def losses_figure(rows: Sequence[Recorded]) -> Figure:
    """Final losses on the note's network over Adam's, a point for each seed."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    mine = [
        r for r in rows if r.scale == scale and r.metric == "final loss over Adam's"
    ]
    arms = list(dict.fromkeys(r.arm for r in mine))
    names = ["1-bit Adam" + a[6:] if a.startswith("method") else a for a in arms]
    for place, arm in enumerate(arms):
        values = [r.value for r in mine if r.arm == arm]
        axes.plot(values, [place] * len(values), "o", alpha=0.7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(arms)), names)
    axes.invert_yaxis()
    axes.set_xlabel("final loss over Adam's, nats")
    return figure


FIGURES = {"one_bit_adam": losses_figure}
