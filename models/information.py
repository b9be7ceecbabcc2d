"""Waists of a noisy code whose information about the input is weighed, by objective.

    e = W_in norm(x),   t = mean(e) + scale noise,   z = W_out t,
    loss = the objective's penalty on I(x;t)               (`ib/objectives/table.py`)

Every one is a Gaussian channel, for only noise makes the bits of a continuous code
finite. Bits are -log2 of densities: KL(N(mean, scale^2); prior) with the moments of
past codes as prior, whose mean bounds I(x;t) from above, whatever the objective weighs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..ib.channel import gaussian_kl
from ..ib.kernels import per_feature
from ..ib.objectives.protocol import Sample
from ..ib.objectives.table import make_objective
from .bottleneck import Waist
from .quantize.gumbel import fingerprint
from .quantize.layer import Memory, unit_square

# Blind to labels, and on rows of unit mean square: widths need no sample.
WIDTHS = {"width_x": per_feature(), "width_t": per_feature()}
BLIND: dict[str, dict[str, Any]] = {
    "cs_ib": WIDTHS,
    "vib": {},
    "nib": {},
    "square_nib": {},
    "exp_nib": {"eta": 0.1},
    "hsic": WIDTHS | {"labels": 0.0},
    "dib": WIDTHS | {"alpha": 2.0},
}
START = 0.5413  # softplus(START) = 1


class CodeSums(NamedTuple):
    """Over unmasked positions, float32."""

    count: Float[Array, ""]
    first: Float[Array, " e"]  # of mean
    second: Float[Array, " e"]  # of mean^2 + scale^2


class Prior(NamedTuple):
    mean: Float[Array, " e"]
    variance: Float[Array, " e"]
    steps: Array  # updates that learned, int32


class Information(nnx.Module):
    """`width` numbers pass as a noisy code of `code_width` numbers.

    objective: a name of BLIND. CEB and the greedy HSIC read labels, which a waist does
        not see.
    decay: of the code's moments per optimizer step.
    The loss of all but "vib" compares the positions of a batch with each other
    (`coupled`): it takes the batch of its call, so microbatches give the mean of their
    losses and not the loss of the whole; memory is O(1024 n) for n positions, for "dib"
    O(n^2). Noise follows from a position's numbers and the count of updates, as that of
    `quantize.gumbel`.
    Raises: ValueError for another objective or a width below 1.
    """

    def __init__(
        self,
        width: int,
        *,
        objective: str,
        code_width: int = 16,
        decay: float = 0.95,
        rngs: nnx.Rngs,
    ):
        if objective not in BLIND:
            raise ValueError(
                f"objective: {objective!r}, but a waist may weigh {', '.join(BLIND)}"
            )
        if code_width < 1 or not 0 <= decay < 1:
            raise ValueError(
                f"information: code_width={code_width}, decay={decay}, but it needs a "
                "width of 1 and a decay in [0, 1)"
            )
        self.objective, self.decay = objective, decay
        self.own = objective == "vib"
        self.coupled = not self.own
        linear: Any = nnx.Linear
        self.norm = nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        outputs = 2 * code_width if self.own else code_width
        self.inward = linear(width, outputs, use_bias=False, rngs=rngs)
        self.outward = linear(code_width, width, use_bias=False, rngs=rngs)
        self.noise = nnx.Param(jnp.full((), START, jnp.float32))
        self.key = Memory(jax.random.bits(rngs.params(), (2,), jnp.uint32))
        ones = jnp.ones(code_width, jnp.float32)
        self.prior = Memory(Prior(0 * ones, 2 * ones, jnp.zeros((), jnp.int32)))

    def channel(self, x: Float[Array, "*b d"]) -> tuple[Array, Array]:
        """Mean and scale of the code's law at each position, float32."""
        e = self.inward(self.norm(x.astype(jnp.float32)))
        noise = self.noise.get_value()
        if not self.own:
            return unit_square(e), jax.nn.softplus(noise)
        mean, raw = jnp.split(e, 2, -1)
        return mean, jax.nn.softplus(raw + noise)

    def __call__(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Waist:
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        mean, scale = self.channel(x)
        code = mean + scale * self._draws(x, mean.shape)
        keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        prior = self.prior.get_value()
        nats = gaussian_kl(mean, scale, prior.mean, jnp.sqrt(prior.variance))
        second = (mean**2 + scale**2) * keep[..., None]
        axes = tuple(range(x.ndim - 1))
        first = (mean * keep[..., None]).sum(axes)
        stats = CodeSums(keep.sum(), first, second.sum(axes))
        return Waist(
            self.outward(code).astype(x.dtype),
            self._loss(x, mean, scale, code, mask),
            nats / jnp.log(2.0) * keep,
            jax.lax.stop_gradient(stats),
        )

    def update(self, stats: CodeSums) -> dict[str, jax.Array]:
        """Move the prior to the moments of the step's codes. Call once a step."""
        old = self.prior.get_value()
        count = jnp.maximum(stats.count, 1)
        mean = stats.first / count
        variance = jnp.maximum(stats.second / count - mean**2, 1e-6)
        rate = jnp.where(stats.count > 0, 1 - self.decay, 0.0)
        new = Prior(
            old.mean + rate * (mean - old.mean),
            old.variance + rate * (variance - old.variance),
            old.steps + (stats.count > 0),
        )
        self.prior.set_value(new)
        return {"waist_code_deviation": jnp.sqrt(new.variance.mean())}

    def _draws(self, x, shape) -> Array:
        key = jax.random.wrap_key_data(self.key.get_value(), impl="threefry2x32")
        key = jax.random.fold_in(key, self.prior.get_value().steps)
        marks = fingerprint(jax.lax.stop_gradient(x)).reshape(-1)
        keys = jax.vmap(lambda mark: jax.random.fold_in(key, mark))(marks)
        drawn = jax.vmap(lambda key: jax.random.normal(key, shape[-1:]))(keys)
        return drawn.reshape(shape)

    def _loss(self, x, mean, scale, code, mask) -> Float[Array, ""]:
        objective = make_objective(self.objective, **BLIND[self.objective])

        def rows(a):
            return a.reshape(-1, a.shape[-1])

        seen = jax.lax.stop_gradient(self.norm(x.astype(jnp.float32)))
        code = rows(code)
        sample = Sample(
            rows(seen),
            code[:, :0],  # a waist sees no labels
            code[:, :0],
            code,
            rows(mean),
            rows(scale) if self.own else scale,
            mask=None if mask is None else mask.reshape(-1),
        )
        term = objective.compression if objective.penalty is None else objective.penalty
        return term(sample).astype(jnp.float32)


WAISTS = {name: partial(Information, objective=name) for name in BLIND}
