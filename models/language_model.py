"""The language-model objective of a transformer with a waist, as sums over positions.

    total = sum over positions of -log p(target)  [nats]  +  waist_weight * waist loss

`model_parts` turns a configuration into the functions that training wants: init, loss
and the waist's once-a-step update. They take and return plain arrays.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..parallel.layout import ROWS, constrain, devices_along
from ..parallel.sequence import Order, arrange
from .scheduled import scheduled_nats
from .transformer import Transformer, TransformerConfig
from .waists import make_waist


class Parts(NamedTuple):
    graph: nnx.GraphDef
    init: Callable  # key -> (params, rest)
    loss: Callable  # (params, rest, batch, key) -> LanguageModelLoss
    advance: Callable  # (params, rest, stats) -> (rest, report)


class LanguageModelLoss(NamedTuple):
    """Sums over unmasked positions, float32; see `parallel.step.Loss`."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    sums: dict[str, Array]
    stats: tuple


def token_nats(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """-log softmax(logits)[target] in nats, float32.

    The target's logit is picked by a masked sum, which a vocabulary split over devices
    turns into one small reduction, where a gather would collect the logits.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), -1)
    return jax.nn.logsumexp(logits, -1) - picked


def build(
    config: TransformerConfig,
    waist: str = "none",
    *,
    waist_at: int | None = None,
    waist_options: dict | None = None,
    key: jax.Array,
) -> Transformer:
    """A transformer with a waist by name."""
    rngs = nnx.Rngs(key)
    layer = make_waist(waist, config.width, rngs=rngs, **(waist_options or {}))
    return Transformer(config, waist=layer, waist_at=waist_at, rngs=rngs)


def model_parts(
    config: TransformerConfig,
    waist: str = "none",
    *,
    waist_at: int | None = None,
    waist_options: dict | None = None,
    waist_weight: float = 0.25,
    microbatches: int = 1,
    schedule: str = "loop",
    chunks: int = 1,
) -> Parts:
    """Init, loss and advance of a language model.

    A batch is {"tokens", "targets"} [b, t] and perhaps "mask" (True where it counts)
    and "segment_ids". Sums: nats, waist_loss, waist_bits; per position when divided by
    the weight. microbatches: of a pipeline, where the mesh has stages; schedule and
    chunks: how it runs (`scheduled.py`; anything but the loop knows neither waists nor
    masks).
    """
    if schedule != "loop" and waist != "none":
        raise ValueError(
            f"schedule: {schedule} runs blocks alone, but the waist is {waist}; take "
            "waist=none, or schedule=loop"
        )
    options = {"waist_at": waist_at, "waist_options": waist_options}
    graph = nnx.split(
        nnx.eval_shape(lambda: build(config, waist, key=jax.random.key(0), **options))
    )[0]

    def init(key: jax.Array):
        model = build(config, waist, key=key, **options)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.as_pure(params), nnx.as_pure(rest)

    def loss(params, rest, batch, key) -> LanguageModelLoss:
        del key  # nothing here draws
        model = nnx.merge(graph, params, rest)
        mask: Bool[Array, "b t"] | None = batch.get("mask")
        segment_ids = batch.get("segment_ids")
        if schedule != "loop" and devices_along("stage") > 1:
            return by_table(model, batch)
        order: Order = "zigzag" if config.causal else "contiguous"
        out = model(
            batch["tokens"],
            mask=mask,
            segment_ids=segment_ids,
            order=order,
            microbatches=microbatches,
        )
        # Sums over positions, in whatever order: targets follow the logits.
        targets, mask = jax.tree.map(
            lambda x: constrain(arrange(x, order, devices_along("seq")), ROWS, "seq"),
            (batch["targets"], mask),
        )
        nats = token_nats(out.logits, targets)
        if mask is not None:
            nats = jnp.where(mask, nats, 0.0)
        count = nats.size if mask is None else mask.sum()
        weight = jnp.asarray(count, jnp.float32)
        sums = {
            "nats": nats.sum(),
            "waist_loss": out.waist.loss * weight,
            "waist_bits": out.waist.bits.sum(),
        }
        total = sums["nats"] + waist_weight * sums["waist_loss"]
        return LanguageModelLoss(total, weight, sums, out.waist.stats)

    def by_table(model, batch) -> LanguageModelLoss:
        if {"mask", "segment_ids"} & set(batch):
            raise ValueError(
                f"schedule: {schedule} knows neither mask nor segment_ids; take "
                "schedule=loop"
            )
        tokens = constrain(batch["tokens"], ROWS, "seq")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        nats = scheduled_nats(
            model,
            model.looked_up(tokens, positions),
            constrain(batch["targets"], ROWS, "seq"),
            token_nats,
            schedule=schedule,
            chunks=chunks,
            microbatches=microbatches,
        )
        weight = jnp.asarray(tokens.size, jnp.float32)
        open_bits = config.width * jnp.finfo(config.dtype).bits  # of no waist
        sums = {
            "nats": nats,
            "waist_loss": jnp.zeros((), jnp.float32),
            "waist_bits": weight * open_bits,
        }
        return LanguageModelLoss(nats, weight, sums, ())

    def advance(params, rest, stats):
        model = nnx.merge(graph, params, rest)
        report = model.waist.update(stats)
        return nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))), report

    return Parts(graph, init, loss, advance)
