"""Residual quantisation: each stage sends what the stages before left over.

    r_0 = x,  z_i = s^i q_i(r_i / s^i),  r_{i+1} = r_i - sg(z_i),  z = sum_i z_i

(arXiv:2107.03312, Algorithm 1, where s = 1). A stage may be any quantiser.
"""

import jax
import jax.numpy as jnp

from .compose import bundle, composed, indices_of, joined, parts_of
from .protocol import Quantized, Quantizer, State, positions


def residual(*stages: Quantizer, shrink: float = 1.0) -> Quantizer:
    """The indices of all stages, first to last; losses are sums over stages.

    shrink: s above; stage i works on a scale of s^i, for fixed codes as those of fsq.
    The gradient of z to x is the mean of the stages' own, so that it passes once: their
    sum would pass it once for each stage.
    """
    widths = {width for q in stages for width in (q.width, q.code_width)}
    if len(widths) != 1 or shrink <= 0:
        raise ValueError(
            f"residual: widths {sorted(widths)} and shrink={shrink}, but the stages "
            "must share one width, in and out, and shrink must be above 0"
        )
    (width,) = widths
    scales = [shrink**i for i in range(len(stages))]

    def walk(visits, x, mask=None):
        """Each visit(x) gives a stage's (z, rest); their sum, and all the rests."""
        left, _ = positions(x, mask, width)
        total, rests = jnp.zeros_like(left), []
        for visit, scale in zip(visits, scales, strict=True):
            z, rest = visit(left / scale)
            left = left - jax.lax.stop_gradient(z) * scale
            total = total + z * scale
            rests.append(rest)
        return total, rests

    def each(state: State):
        return zip(stages, parts_of(state), strict=True)

    def encode(state: State, x):
        def visit(q, s, x):
            indices = q.encode(s, x)
            return q.decode(s, indices), indices

        visits = [lambda x, q=q, s=s: visit(q, s, x) for q, s in each(state)]
        return jnp.concatenate(walk(visits, x)[1], -1)

    def decode(state: State, indices):
        own = indices_of(stages, indices)
        total = 0.0
        for (q, s), index, scale in zip(each(state), own, scales, strict=True):
            total = total + q.decode(s, index) * scale
        return total

    def quantize(state: State, x, mask=None) -> Quantized:
        def visit(q, s, x):
            out = q.quantize(s, x, mask)
            return out.z, out

        visits = [lambda x, q=q, s=s: visit(q, s, x) for q, s in each(state)]
        total, outs = walk(visits, x, mask)
        still = jax.lax.stop_gradient(total)
        z = still + (total - still) / len(stages)
        return joined(outs, z.astype(x.dtype))

    def start(key: jax.Array, state: State, x, mask=None) -> State:
        def visit(i, q, s, x):
            s = q.start(jax.random.fold_in(key, i), s, x, mask)
            return q.quantize(s, x, mask).z, s

        visits = [
            lambda x, i=i, q=q, s=s: visit(i, q, s, x)
            for i, (q, s) in enumerate(each(state))
        ]
        return bundle(walk(visits, x, mask)[1])

    return composed(
        stages,
        width,
        width,
        encode=encode,
        decode=decode,
        quantize=quantize,
        start=start,
    )
