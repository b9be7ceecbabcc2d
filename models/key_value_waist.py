"""The key-value memory as a waist (arXiv:2207.11240, Sec. 3).

    e_j = P_j unit(x),  c_j = argmin_k |e_j - K_jk|^2,  z = mean_j V_j,c_j

P never moves. Keys K follow the averages of what they receive until `frozen`; values V
are parameters, and a gradient reaches only those that were read: with plain gradient
descent all others stay bit for bit. Set `only_written` where nothing more is to be
learned: positions then find the nearest keys among those that were read in training.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .bottleneck import Waist
from .key_value_bottleneck import FAR, heads, projections
from .quantize import losses, traffic
from .quantize.layer import Memory, Sums, unit_square
from .quantize.search import nearest
from .quantize.updates import (
    CodeSums,
    code_state,
    code_sums,
    ema,
    follow,
    kmeans,
    revive,
)

RULES = (ema(), revive())


class KeyValue(nnx.Module):
    """`books` books of `codes` pairs, keys of `code_width` numbers.

    through: the gradient of z passes to x as if z were x, and the loss pulls x to its
        keys. False for a frozen encoder: x learns nothing and the loss is 0.
    window: optimizer steps over which usage and code frequencies are counted.
    """

    def __init__(
        self,
        width: int,
        *,
        books: int = 8,
        codes: int = 256,
        code_width: int = 8,
        through: bool = True,
        window: int = 32,
        rngs: nnx.Rngs,
    ):
        if min(books, code_width, window) < 1 or codes < 2:
            raise ValueError(
                f"key_value: books={books}, codes={codes}, code_width={code_width}, "
                f"window={window}, but it needs at least 2 codes and 1 of the others"
            )
        self.through, self.frozen, self.only_written = through, False, False
        self.sizes = (codes,) * books
        self.places = Memory(
            projections(rngs.params(), width, books=books, width=code_width)
        )
        drawn = jax.random.normal(rngs.params(), (books, codes, code_width))
        self.keys = Memory(jax.vmap(lambda book: code_state(book, RULES))(drawn))
        shape = (books, codes, width)  # so drawn that z starts at unit mean square
        self.values = nnx.Param(books**0.5 * jax.random.normal(rngs.params(), shape))
        self.hits = Memory(jnp.zeros((books, codes), jnp.float32))
        self.traffic = Memory(traffic.quiet(window, self.sizes))

    @property
    def capacity(self) -> float:
        """Bits of all indices of a position, which mean bits cannot exceed."""
        return sum(math.log2(size) for size in self.sizes)

    def encode(self, x: Float[Array, "*b d"]) -> Int[Array, "*b c"]:
        return self._find(self._heads(x))

    def decode(self, codes: Int[Array, "*b c"]) -> Float[Array, "*b d"]:
        """float32; the call casts it to the dtype of x."""
        return self.values[...][jnp.arange(len(self.sizes)), codes].mean(-2)

    def __call__(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Waist:
        """bits are those of `traffic.bits`; codes hold one index a book."""
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        wide = x.astype(jnp.float32)
        keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        e = self._heads(wide if self.through else jax.lax.stop_gradient(wide))
        index = self._find(e)
        books = jnp.arange(len(self.sizes))
        chosen = self.keys.get_value().codes[books, index]
        off = losses.commitment(e, chosen)  # [*b, c]
        z = self.decode(index)
        if self.through:
            z = z + (wide - jax.lax.stop_gradient(wide))
        of_book = jax.vmap(code_sums, in_axes=(-2, -1, -1, None, None))
        sums = of_book(e, index, off, keep, self.sizes[0])
        stats = Sums(traffic.count(index, keep, self.sizes), sums)
        return Waist(
            z.astype(x.dtype),
            losses.mean(off.mean(-1), keep),
            traffic.bits(self.traffic.get_value(), index, keep, self.sizes),
            jax.lax.stop_gradient(stats),
            codes=index,
        )

    def update(self, stats: Sums) -> dict[str, jax.Array]:
        """Count what was read; keys learn unless frozen. Call once a step."""
        found = {}
        sums: CodeSums = stats.inner
        if not self.frozen:
            state, said = jax.vmap(lambda state, sums: follow(state, sums, RULES))(
                self.keys.get_value(), sums
            )
            self.keys.set_value(state)
            found = {"waist_revived": said["revived"].sum()}
        self.hits[...] = self.hits[...] + sums.count
        self.traffic.set_value(traffic.record(self.traffic.get_value(), stats.counts))
        return traffic.report(self.traffic.get_value(), self.sizes) | found

    def start(
        self,
        key: jax.Array,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
    ) -> None:
        """Put keys where data lie, as k-means does; once, before the first step."""
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        codes = self.sizes[0]
        book = jax.vmap(
            lambda key, e: kmeans(key, e, codes, mask=mask), in_axes=(0, -2)
        )
        state = book(jax.random.split(key, len(self.sizes)), self._heads(x))
        old = self.keys.get_value()
        self.keys.set_value(state._replace(inner=old.inner))

    def freeze(self) -> None:
        """End of the first phase: keys stay for good, and what was read is forgotten.

        Afterwards split the module again: a step compiled before still moves keys.
        """
        self.frozen = True
        self.hits[...] = jnp.zeros_like(self.hits[...])

    def _heads(self, x) -> Float[Array, "*b c e"]:
        return heads(self.places[...], unit_square(x.astype(jnp.float32)))

    def _find(self, e: Float[Array, "*b c e"]) -> Int[Array, "*b c"]:
        keys = self.keys.get_value().codes
        if self.only_written:
            keys = jnp.where(self.hits[...][..., None] > 0, keys, FAR)
        flat = jax.lax.stop_gradient(e).reshape(-1, *e.shape[-2:])
        index = jax.vmap(nearest, in_axes=(1, 0), out_axes=1)(flat, keys)
        return index.reshape(e.shape[:-1])
