"""What each form of attention takes, forward and backward, and its error there.

    python scripts/benchmark.py --suite=attention_forms --record
    python scripts/attention_table.py          # writes the table of docs/attention.md

Every feature of the call, by each form, on small odd shapes: the largest difference of
the output, and of the gradients of all that is differentiable (as a share of the
largest entry of each), to the definition in float64 on the operands as rounded; or the
sentence with which the form refuses. A kernel whose hardware is absent runs in an
interpreter, which tests its arithmetic and says nothing of its speed: about 10 minutes
on 2 CPU cores, most of them for the Hopper kernel.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from narrows.models.kernels.attention import Blocks, attention
from narrows.models.kernels.attention.gpu import gpu
from narrows.models.kernels.attention.hopper import hopper
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.tpu import tpu
from narrows.models.kernels.attention.xla import xla
from rich.console import Console
from rich.table import Table

HARDWARE = {"tpu": "tpu", "gpu": "gpu", "hopper": "gpu"}  # what a kernel runs on
FORMS = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu, "hopper": hopper}
HALF = ("hopper",)  # multiplies 16-bit operands alone: measured in bfloat16, width 64


class Sizes(NamedTuple):
    b: int = 2
    t: int = 70
    s: int = 70
    n: int = 2
    k: int = 2
    h: int = 32


class Feature(NamedTuple):
    """Options of a call; `sizes` may differ from the common ones."""

    options: Callable[[np.random.Generator, Sizes], dict[str, Any]]
    sizes: dict[str, int] = {}  # noqa: RUF012 (never changed)


def _ids(rng, length, rows, documents=3):
    cuts = np.sort(rng.integers(0, length, (rows, documents - 1)), axis=1)
    ids = (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    return jnp.asarray(ids, jnp.int32)


def _normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


FEATURES = {
    "plain": Feature(lambda rng, z: {}),
    "causal": Feature(lambda rng, z: {"is_causal": True}),
    "causal, offset by row": Feature(
        lambda rng, z: {"is_causal": True, "query_offset": jnp.array([20, 3])},
        {"t": 30},
    ),
    "window": Feature(lambda rng, z: {"local_window_size": (20, 5)}),
    "lengths": Feature(
        lambda rng, z: {
            "query_seq_lengths": jnp.array([50, 70]),
            "key_value_seq_lengths": jnp.array([70, 33]),
        }
    ),
    "packed documents": Feature(
        lambda rng, z: {"is_causal": True, "segment_ids": _ids(rng, z.t, z.b)}
    ),
    "grouped heads": Feature(lambda rng, z: {"is_causal": True}, {"n": 4}),
    "one key head": Feature(lambda rng, z: {"is_causal": True}, {"n": 4, "k": 1}),
    "bias": Feature(lambda rng, z: {"bias": _normal(rng, 1, z.n, z.t, z.s)}),
    "bias of the keys": Feature(lambda rng, z: {"bias": _normal(rng, z.b, 1, 1, z.s)}),
    "soft cap": Feature(lambda rng, z: {"soft_cap": 2.0}),
    "sinks": Feature(lambda rng, z: {"is_causal": True, "sinks": _normal(rng, z.n)}),
    "mask": Feature(
        lambda rng, z: {"mask": jnp.asarray(rng.random((z.b, 1, z.t, z.s)) < 0.7)}
    ),
    "table of cells": Feature(
        lambda rng, z: {
            "mask": Blocks(jnp.asarray(rng.random((1, z.n, 2, 2)) < 0.7), 64, 64)
        }
    ),
    "function of indices": Feature(
        lambda rng, z: {"mask": lambda rows, keys: (rows - keys) % 3 < 2}
    ),
    "dropout": Feature(
        lambda rng, z: {"dropout_rate": 0.2, "dropout_key": jax.random.key(1)}
    ),
    "one query": Feature(lambda rng, z: {}, {"t": 1}),
    "head width 128": Feature(lambda rng, z: {"is_causal": True}, {"h": 128}),
    "head width 256": Feature(lambda rng, z: {"is_causal": True}, {"h": 256}),
}


def define(values: flags.FlagValues) -> None:
    for name, known in (("forms", FORMS), ("features", FEATURES)):
        flags.DEFINE_list(
            name, list(known), "attention_forms: which", flag_values=values
        )


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """One line for each form and feature."""
    if "hopper" in f.forms:  # the threads of its interpreter wait for one another
        jax.config.update("jax_num_cpu_devices", 8)
    for flag, known in (("forms", FORMS), ("features", FEATURES)):
        for name in set(f[flag].value) - set(known):
            raise ValueError(f"{flag}: {name!r} is none of {', '.join(known)}")
    for name in f.forms:
        absent = name in HARDWARE and jax.default_backend() != HARDWARE[name]
        form = FORMS[name]
        if absent:
            form = functools.partial(form, interpret=interpreter(name))
        for feature in f.features:
            line = {
                "form": name,
                "feature": feature,
                "dtype": "bfloat16" if name in HALF else "float32",
                "interpreted": absent,
                **errors(form, FEATURES[feature], name in HALF),
            }
            console.print(*line.values())
            yield line


def interpreter(name: str) -> Any:
    """What a kernel's `interpret` takes where its hardware is absent."""
    if name != "hopper":
        return True
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def errors(form: Callable, feature: Feature, half: bool) -> dict[str, Any]:
    """Errors of output and gradients, or the refusal."""
    sizes = Sizes()._replace(**feature.sizes)
    if half:
        sizes = sizes._replace(h=max(64, sizes.h))
    b, t, s, n, k, h = sizes
    rng = np.random.default_rng(0)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h)
    *operands, cotangent = (_normal(rng, *shape) for shape in shapes)
    if half:
        operands = [x.astype(jnp.bfloat16) for x in operands]
    options = feature.options(rng, sizes)
    learned = {name: options.pop(name) for name in ("bias", "sinks") if name in options}
    try:
        found = _gradients(operands, learned, cotangent, options, form)
    except NotImplementedError as refusal:
        return {"refusal": str(refusal)}
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)),
            (operands, learned, cotangent),
        )
        exact = _gradients(*wide, options, reference)
    out, *grads = jax.tree.leaves(
        jax.tree.map(
            lambda x, y: float(np.abs(np.asarray(x, np.float64) - y).max()),
            found,
            jax.tree.map(np.asarray, exact),
        )
    )
    _, *scale = (float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(exact))
    shares = (g / z if z else g for g, z in zip(grads, scale, strict=True))
    return {"forward": out, "backward": max(shares)}


def _gradients(operands, learned, cotangent, options, form):
    def call(q, k, v, learned):
        return attention(q, k, v, **learned, **options, implementation=form)

    out, pull = jax.vjp(call, *operands, learned)
    return out, pull(cotangent.astype(out.dtype))


def table(lines: Sequence[dict[str, Any]]) -> Table:
    made = Table("form", "feature", "forward", "backward")
    for line in lines:
        if "refusal" in line:
            made.add_row(line["form"], line["feature"], "refuses", line["refusal"])
        else:
            cells = (f"{line[key]:.0e}" for key in ("forward", "backward"))
            made.add_row(line["form"], line["feature"], *cells)
    return made
