"""The table of optimizers: name -> optax transformation, with clipping and a schedule.

A new optimizer is one file beside this one and one line here. Those of LOCAL take every
worker's own gradients and exchange them themselves, over data; those of SHARDED over
fsdp, with their state and the parameters proper in shards.
"""

from collections.abc import Callable

import jax
import optax

from .compressed_mean import compressed_mean
from .compressed_sgd import FOUR_BITS, exchange
from .one_bit_adam import one_bit_adam
from .one_bit_lamb import one_bit_lamb
from .sharded_optimizers import sharded_one_bit_adam, sharded_sgd
from .zero_one_adam import zero_one_adam

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda rate, decay, mask: optax.adamw(
        rate, b1=0.9, b2=0.95, weight_decay=decay, mask=mask
    ),
    "sgd": lambda rate, decay, mask: optax.chain(
        optax.add_decayed_weights(decay, mask=mask), optax.sgd(rate, momentum=0.9)
    ),
}


def _zero_one_adam(rate, decay, mask, *, workers, clip, freeze_step, earliest):
    """Clips every worker's own gradient: no other exists between refreshes."""
    del earliest
    if freeze_step is None:
        raise ValueError(
            "freeze_step: missing, but zero_one_adam refreshes its second moment too "
            "rarely to see it settle; give the number of updates"
        )
    tx = zero_one_adam(
        rate,
        workers=workers,
        freeze_step=freeze_step,
        b2=0.99,
        weight_decay=decay,
        mask=mask,
    )
    return optax.chain(optax.clip_by_global_norm(clip), tx)


def _compressed_sgd(rate, decay, mask, *, workers, clip, freeze_step, earliest):
    """Clips the mean; decay joins it there too, as in "sgd"."""
    del earliest
    if freeze_step is not None:
        raise ValueError(
            f"freeze_step: {freeze_step}, but compressed_sgd has no second moment"
        )
    return optax.chain(
        exchange(compressed_mean(FOUR_BITS, FOUR_BITS, workers=workers)),
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(decay, mask=mask),
        optax.sgd(rate, momentum=0.9),
    )


LOCAL: dict[str, Callable[..., optax.GradientTransformation]] = {
    "one_bit_adam": lambda rate, decay, mask, **options: one_bit_adam(
        rate, b1=0.9, b2=0.99, weight_decay=decay, mask=mask, **options
    ),
    "one_bit_lamb": lambda rate, decay, mask, **options: one_bit_lamb(
        rate, b2=0.99, weight_decay=decay, mask=mask, **options
    ),
    "zero_one_adam": _zero_one_adam,
    "compressed_sgd": _compressed_sgd,
}


def _sharded_sgd(rate, decay, mask, *, workers, clip, freeze_step, earliest):
    del earliest
    if freeze_step is not None:
        raise ValueError(
            f"freeze_step: {freeze_step}, but sharded_compressed_sgd has no second "
            "moment"
        )
    return sharded_sgd(rate, workers=workers, weight_decay=decay, mask=mask, clip=clip)


SHARDED: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sharded_one_bit_adam": lambda rate, decay, mask, **options: sharded_one_bit_adam(
        rate, b1=0.9, b2=0.99, weight_decay=decay, mask=mask, **options
    ),
    "sharded_compressed_sgd": _sharded_sgd,
}


def warmup_cosine(peak: float, *, steps: int, warmup: int) -> optax.Schedule:
    """Linear to `peak` over `warmup` steps, then a cosine to peak/10 at `steps`."""
    warmup = min(warmup, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup, 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak / 10,
    )


def matrices(params):
    """True where weights decay: kernels and embeddings, not scales and biases."""

    def decayed(path, _):
        return jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
    name: str,
    rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    workers: int = 1,
    freeze_step: int | None = None,
    earliest: int = 0,
) -> optax.GradientTransformation:
    """An optimizer by name, after clipping the global gradient norm to `clip`.

    Those of LOCAL exchange the gradients of `workers` on the axis "data", those of
    SHARDED on "fsdp", and compress after `freeze_step` updates, or once settled but not
    before `earliest`.

    >>> tx = make_optimizer("adamw", warmup_cosine(1e-3, steps=100, warmup=10))
    """
    exchanging = LOCAL | SHARDED
    if name in exchanging:
        options = {"clip": clip, "freeze_step": freeze_step, "earliest": earliest}
        make = exchanging[name]
        return make(rate, weight_decay, matrices, workers=workers, **options)
    if name not in OPTIMIZERS:
        said = ", ".join([*OPTIMIZERS, *exchanging])
        raise ValueError(f"optimizer: {name!r}, but allowed are {said}")
    if freeze_step is not None:
        raise ValueError(
            f"freeze_step: {freeze_step}, but {name} sends everything whole; take one "
            f"of {', '.join(LOCAL)}"
        )
    return optax.chain(
        optax.clip_by_global_norm(clip), OPTIMIZERS[name](rate, weight_decay, matrices)
    )
