"""Product quantisation: the numbers of a position are cut, each part has its quantiser.

(Jegou, Douze and Schmid 2011, Eq. 3; with shared codes, arXiv:1910.05453, Sec. 3.3.)
"""

import jax
import jax.numpy as jnp
import numpy as np

from .compose import bundle, composed, indices_of, joined, parts_of
from .protocol import Quantized, Quantizer, State, positions


def product(*parts: Quantizer) -> Quantizer:
    """Part j takes the next numbers of x and sends its own indices; losses are sums."""
    if not parts:
        raise ValueError("product: no parts, but it needs at least one")
    width = sum(q.width for q in parts)
    cuts = np.cumsum([q.width for q in parts])[:-1]

    def split(state: State, x, mask=None):
        wide, _ = positions(x, mask, width)
        return zip(parts, parts_of(state), jnp.split(wide, cuts, -1), strict=True)

    def encode(state: State, x):
        return jnp.concatenate([q.encode(s, x) for q, s, x in split(state, x)], -1)

    def decode(state: State, indices):
        own = indices_of(parts, indices)
        each = zip(parts, parts_of(state), own, strict=True)
        return jnp.concatenate([q.decode(s, i) for q, s, i in each], -1)

    def quantize(state: State, x, mask=None) -> Quantized:
        outs = [q.quantize(s, part, mask) for q, s, part in split(state, x, mask)]
        z = jnp.concatenate([out.z for out in outs], -1)
        return joined(outs, z.astype(x.dtype))

    def start(key: jax.Array, state: State, x, mask=None) -> State:
        return bundle(
            [
                q.start(jax.random.fold_in(key, i), s, part, mask)
                for i, (q, s, part) in enumerate(split(state, x, mask))
            ]
        )

    return composed(
        parts,
        width,
        sum(q.code_width for q in parts),
        encode=encode,
        decode=decode,
        quantize=quantize,
        start=start,
    )


def grouped(q: Quantizer, groups: int, *, shared: bool = False) -> Quantizer:
    """`groups` heads of q side by side, with a state each, or all with one.

    >>> from .fsq import fsq
    >>> grouped(fsq((8, 8)), 3).sizes
    (64, 64, 64)
    """
    if groups < 1:
        raise ValueError(f"groups: {groups}, but it must be at least 1")
    if not shared:
        return product(*[q] * groups)
    width = groups * q.width

    def heads(x, mask):
        """x [*b, g, e] and a mask for each head."""
        wide, _ = positions(x, mask, width)
        wide = wide.reshape(*x.shape[:-1], groups, q.width)
        if mask is not None:
            mask = jnp.broadcast_to(mask[..., None], wide.shape[:-1])
        return wide, mask

    def flat(x):
        return x.reshape(*x.shape[:-2], -1)

    def encode(state: State, x):
        return flat(q.encode(state, heads(x, None)[0]))

    def decode(state: State, indices):
        each = indices.reshape(*indices.shape[:-1], groups, len(q.sizes))
        return flat(q.decode(state, each))

    def quantize(state: State, x, mask=None) -> Quantized:
        out = q.quantize(state, *heads(x, mask))
        losses = {name: groups * value for name, value in out.losses.items()}
        z = flat(out.z).astype(x.dtype)
        return Quantized(z, flat(out.indices), losses, out.stats)

    def start(key: jax.Array, state: State, x, mask=None) -> State:
        return q.start(key, state, *heads(x, mask))

    return q._replace(
        width=width,
        code_width=groups * q.code_width,
        sizes=q.sizes * groups,
        encode=encode,
        decode=decode,
        quantize=quantize,
        start=start,
    )
