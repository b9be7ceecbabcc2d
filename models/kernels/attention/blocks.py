"""Masks by blocks: a table that says which cells of the scores are seen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kept"],
    meta_fields=["rows", "keys"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Cells of `rows` x `keys` scores; a query sees the keys of the cells kept.

    (Dao et al. 2022, arXiv:2205.14135, Section 3.3.) The table may change from call to
    call without compiling anew; the last cells may hang over the edge.
    """

    kept: Bool[Array, "*#b #n cells_t cells_s"]
    rows: int
    keys: int

    def over(self, b: int, n: int, t: int, s: int) -> Bool[Array, "#b #n tiles tiles"]:
        """The table with four axes; raises ValueError unless it covers the scores."""
        if self.rows < 1 or self.keys < 1:
            raise ValueError(
                f"mask: cells of {self.rows} x {self.keys}; both must be at least 1"
            )
        kept = jnp.asarray(self.kept)
        full = (1,) * (4 - kept.ndim) + kept.shape
        cells = (-(-t // self.rows), -(-s // self.keys))
        fits = len(full) == 4 and full[0] in (1, b) and full[1] in (1, n)
        if not fits or full[2:] != cells or kept.dtype != bool:
            raise ValueError(
                f"mask: the table of cells is {kept.dtype}{kept.shape}; for {t} rows, "
                f"{s} keys and cells of {self.rows} x {self.keys} it must be bool and "
                f"broadcast to {(b, n, *cells)}"
            )
        return kept.reshape(full)
