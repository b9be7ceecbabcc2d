"""Blockwise attention in plain XLA: memory linear in length, made for CPUs.

One head at a time, a block of queries against a block of keys, so that the scores
of the moment stay in the second-level cache (Dao et al. 2022, arXiv:2205.14135,
Algorithms 1 and 2, with the divisions put off to the end as in arXiv:2307.08691,
Section 3.1). Key blocks that no query of a block sees are not visited, and only
blocks that some query sees in part are masked.

Lengths that do not divide: the last block is moved back to end with the array, and
what it shares with the block before it counts once. Nothing is padded or copied.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import dropout, tiles
from .call import Call, Spec

# A block of scores is block x block. The first length that each pair of blocks (of the
# forward and the backward pass) is for, measured on CPUs with 0.5 to 1 MB of
# second-level cache and heads of 64.
BLOCKS = ((0, (64, 64)), (129, (128, 128)), (2048, (128, 256)))
FEW_ROWS, MANY_KEYS = 32, (512, 512)  # rows of which a block is so small, as decoding's


def xla(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    call: Call,
    spec: Spec,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"]]:
    """Same results as `reference`; saves the output and one float per row.

    Scores, softmax and sums are float32 (float64 if that comes in); weights enter
    the second product in the value's dtype. Takes every call.
    """
    t, s = query.shape[1], key.shape[1]
    blocks = [pair for first, pair in BLOCKS if first <= max(t, s)][-1]
    blocks = MANY_KEYS if t <= FEW_ROWS else blocks
    return blockwise(query, key, value, call, spec, blocks)


def blockwise(query, key, value, call, spec, blocks: tuple[int, int]) -> Any:
    """`xla` with blocks of given sizes, forward and backward."""
    call = jax.tree.map(jnp.asarray, call)
    operands = query, key, value, call.bias, call.sinks
    query, key, value, bias, sinks = _vary_alike(operands)
    call = call._replace(bias=bias, sinks=sinks)
    grids = [Grid(query.shape[1], key.shape[1], block) for block in blocks]
    return _attend((spec, *grids), query, key, value, call)


class Grid(NamedTuple):
    """Rows t and keys s, cut into blocks; the last block may overlap the one before."""

    t: int
    s: int
    block: int

    @property
    def block_q(self):
        return min(self.block, self.t)

    @property
    def block_k(self):
        return min(self.block, self.s)

    @property
    def blocks_q(self):
        return -(-self.t // self.block_q)

    def row(self, i):
        """The first row of block i."""
        return jnp.minimum(i * self.block_q, self.t - self.block_q)

    def key(self, j):
        """The first key of block j."""
        return jnp.minimum(j * self.block_k, self.s - self.block_k)


class Plan(NamedTuple):
    """Which key blocks each row block visits: `full` without a mask, `part` with one.

    Axes b and n are 1 where all agree. `order` lists a row block's key blocks, full
    ones first; where bounds alone decide they need no list: the full ones lie from
    `full_first` on, the others around them from `first` on.
    """

    full: Int[Array, "#b #n blocks_t"]
    part: Int[Array, "#b #n blocks_t"]
    first: Int[Array, "#b #n blocks_t"] | None = None
    full_first: Int[Array, "#b #n blocks_t"] | None = None
    order: Int[Array, "#b #n blocks_t blocks_s"] | None = None


def _plan(call, spec, grid):
    sizes = grid.s, grid.block_q, grid.block_k
    others = call.segments, call.mask, call.kept, spec.sees
    if all(other is None for other in others):
        span = tiles.Spans(*(x[:, None] for x in tiles.spans(call, *sizes)))
        full = span.full_last - span.full_first
        part = span.last - span.first - full
        return Plan(full, part, span.first, span.full_first)
    table = tiles.visits(call, spec, *sizes)
    full, part = (
        (table == kind).sum(-1, dtype=jnp.int32) for kind in (tiles.FULL, tiles.PART)
    )
    return Plan(full, part, order=jnp.argsort(-table, stable=True).astype(jnp.int32))


class Head(NamedTuple):
    """One head of one batch row: where it stands, and what it shares with others."""

    spec: Spec
    grid: Grid
    call: Call
    plan: Plan
    row: Int[Array, ""]
    head: Int[Array, ""]

    def own(self, x):
        """This head's part of an array over #b #n."""
        row = 0 if x.shape[0] == 1 else self.row
        return x[row, 0 if x.shape[1] == 1 else self.head]

    def visit(self, i, tile, carry):
        """Run `tile(j, masked, carry)` over the key blocks that row block i sees."""
        full, part = (self.own(x)[i] for x in (self.plan.full, self.plan.part))
        if self.plan.order is None:
            first, whole = (
                self.own(x)[i] for x in (self.plan.first, self.plan.full_first)
            )
            before = whole - first

            def full_at(u):
                return whole + u

            def part_at(u):
                return first + u + jnp.where(u < before, 0, full)

        else:
            order = self.own(self.plan.order)[i]

            def full_at(u):
                return order[u]

            def part_at(u):
                return order[full + u]

        carry = lax.fori_loop(0, full, lambda u, c: tile(full_at(u), False, c), carry)
        return lax.fori_loop(0, part, lambda u, c: tile(part_at(u), True, c), carry)

    def rows(self, x, i):
        """Row block i of an array over t."""
        return lax.dynamic_slice_in_dim(x, self.grid.row(i), self.grid.block_q)

    def keys(self, x, j):
        """Key block j of an array over s."""
        return lax.dynamic_slice_in_dim(x, self.grid.key(j), self.grid.block_k)

    def place(self, x, i, j):
        """Where tile i, j of an array over #b #n #t #s starts, and its shape."""
        grid = self.grid
        start = (self.row, self.head, grid.row(i), grid.key(j))
        size = (1, 1, grid.block_q, grid.block_k)
        start = [0 if n == 1 else at for n, at in zip(x.shape, start, strict=True)]
        return start, [min(pair) for pair in zip(x.shape, size, strict=True)]

    def tile(self, x, i, j):
        """Tile i, j, [q or 1, k or 1], of an array over #b #n #t #s."""
        start, size = self.place(x, i, j)
        return lax.dynamic_slice(x, start, size)[0, 0]

    def indices(self, i, j):
        """Rows [q, 1] and keys [1, k] of tile i, j."""
        rows = self.grid.row(i) + lax.iota(jnp.int32, self.grid.block_q)[:, None]
        return rows, self.grid.key(j) + lax.iota(jnp.int32, self.grid.block_k)

    def mask(self, i, j, *, keys_first):
        """What is seen of tile i, j: [q, k] or, with `keys_first`, [k, q]."""
        call, spec, grid = self.call, self.spec, self.grid
        q, k = (1, 0) if keys_first else (0, 1)
        low, high = (self.rows(x[self.row], i) for x in (call.low, call.high))
        low, high = (jnp.expand_dims(x, k) for x in (low, high))
        if grid.s % grid.block_k:
            low = jnp.maximum(low, j * grid.block_k)
        shape = (grid.block_q, grid.block_k)
        shape = shape[::-1] if keys_first else shape
        keys = grid.key(j) + lax.broadcasted_iota(jnp.int32, shape, k)
        seen = (keys >= low) & (keys < high)
        if call.segments is not None:
            q_ids = self.rows(call.segments[0][self.row], i)
            k_ids = self.keys(call.segments[1][self.row], j)
            seen &= jnp.expand_dims(q_ids, k) == jnp.expand_dims(k_ids, q)
        more = []
        if call.mask is not None:
            more.append(self.tile(call.mask, i, j))
        if call.kept is not None and spec.cell is not None:
            rows, keys = self.indices(i, j)
            more.append(self.own(call.kept)[rows // spec.cell[0], keys // spec.cell[1]])
        if spec.sees is not None:
            more.append(spec.sees(*self.indices(i, j)))
        for each in more:
            seen &= each.T if keys_first else each
        return seen

    def scores(self, product, i, j, *, keys_first):
        """Scores from the products of queries and keys, without the mask."""
        if self.call.bias is not None:
            bias = self.tile(self.call.bias, i, j).astype(product.dtype)
            product = product + (bias.T if keys_first else bias)
        cap = self.spec.soft_cap
        return product if cap is None else cap * jnp.tanh(product / cap)

    def dropped(self, weights, i, j, *, keys_first):
        """`weights`, or whatever stands in their places, after dropout."""
        if self.call.dropout_key is None:
            return weights
        key = dropout.head_key(self.call.dropout_key, self.row, self.head)
        rows, keys = self.indices(i, j)
        keep = dropout.keep(
            *(key, rows.T if keys_first else rows),
            *(keys[:, None] if keys_first else keys, self.spec.dropout_rate),
        )
        return jnp.where(keep, weights / (1 - self.spec.dropout_rate), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, call):
    return _forward(static, query, key, value, call)[0]


def _forward(static, query, key, value, call):
    spec, grid, _ = static
    plan = _plan(call, spec, grid)
    (b, t, n, _), width = query.shape, value.shape[-1]
    group = n // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def one_head(index, carry):
        row, head = index // n, index % n
        at = Head(spec, grid, call, plan, row, head)
        q = _head(query, row, head)
        k, v = _head(key, row, head // group), _head(value, row, head // group)
        return _forward_head(at, q, k, v, *carry)

    start = _zeros_like(query, (b, t, n, width)), _zeros_like(query, (b, n, t), wide)
    out, logsumexp = lax.fori_loop(0, b * n, one_head, start)
    results = out, logsumexp.swapaxes(1, 2)
    return results, (query, key, value, call, out, logsumexp)


def _backward(static, saved, cotangents):
    query, key, value, call, out, logsumexp = saved
    spec, _, grid = static
    plan = _plan(call, spec, grid)
    d_out, d_logs = cotangents[0], cotangents[1].swapaxes(1, 2)
    b, _, n, _ = query.shape
    group = n // key.shape[2]
    wide = logsumexp.dtype
    # a row that sees nothing passes nothing on, whatever comes
    empty = logsumexp == -jnp.inf
    d_logs = jnp.where(empty, 0, d_logs.astype(wide))
    dots = jnp.einsum("btnv,btnv->bnt", out.astype(wide), d_out.astype(wide))
    dots = jnp.where(empty, 0, dots) - d_logs
    safe = jnp.where(empty, jnp.inf, logsumexp)

    def one_head(index, carry):
        d_query, d_key, d_value, d_bias = carry
        row, head = index // n, index % n
        at = Head(spec, grid, call, plan, row, head)
        d_q, d_k, d_v, d_bias = _backward_head(
            at,
            [_head(x, row, head) for x in (query, d_out)],
            [_head(x, row, head // group) for x in (key, value)],
            [x[row, head] for x in (safe, dots)],
            # the heads of a group add to one gradient
            [_head(x, row, head // group) for x in (d_key, d_value)],
            d_bias,
        )
        return (
            _put(d_query, d_q.astype(d_query.dtype), row, head),
            _put(d_key, d_k, row, head // group),
            _put(d_value, d_v, row, head // group),
            d_bias,
        )

    start = (
        _zeros_like(query, query.shape),
        _zeros_like(query, key.shape, wide),
        _zeros_like(query, value.shape, wide),
        None if call.bias is None else _zeros_like(query, call.bias.shape, wide),
    )
    d_query, d_key, d_value, d_bias = lax.fori_loop(0, b * n, one_head, start)
    d_key = d_key * _split(spec.scale, query.dtype)[1]
    d_call = Call(None, None)  # pyright: ignore[reportArgumentType]
    if call.bias is not None:
        d_call = d_call._replace(bias=d_bias.astype(call.bias.dtype))
    if call.sinks is not None:
        weight = jnp.exp(call.sinks.astype(wide)[:, None] - safe)
        d_sinks = -(weight * dots).sum((0, 2))
        d_call = d_call._replace(sinks=d_sinks.astype(call.sinks.dtype))
    d_key, d_value = d_key.astype(key.dtype), d_value.astype(value.dtype)
    return d_query, d_key, d_value, d_call


_attend.defvjp(_forward, _backward)


def _forward_head(at, q, k, v, outs, logs):
    """Writes one head's output and log-sum-exp into [b, t, n, v] and [b, n, t]."""
    wide = logs.dtype
    lowest = float(jnp.finfo(wide).min)
    inner, outer = _split(at.spec.scale, q.dtype)

    def one_block(count, carry):
        # from the last block down: the rows that it shares are written over, since the
        # plan knows only those that are its own
        i = at.grid.blocks_q - 1 - count
        outs, logs = carry
        q_i = (at.rows(q, i) * inner).astype(q.dtype)

        def tile(j, masked, carry):
            out, top, total = carry
            v_j = at.keys(v, j)
            scores = outer * _dot(q_i, at.keys(k, j), 1, 1)
            scores = at.scores(scores, i, j, keys_first=False)
            if masked:
                mask = at.mask(i, j, keys_first=False)
                scores = jnp.where(mask, scores, lowest)
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - new_top[:, None])
            if masked:
                poison = (0 * v_j.astype(wide)).sum(1)  # NaN for those who see it
                weights = jnp.where(mask, weights + poison, 0)
                v_j = _finite(v_j)
            shrink = jnp.exp(top - new_top)
            total = shrink * total + weights.sum(1)
            weights = at.dropped(weights, i, j, keys_first=False)
            more = _dot(weights.astype(v.dtype), v_j, 1, 0)
            return shrink[:, None] * out + more, new_top, total

        rows = at.grid.block_q
        out = _zeros_like(q, (rows, v.shape[1]), wide)
        top = _zeros_like(q, (rows,), wide) + lowest
        total = jnp.zeros_like(top)
        if at.call.sinks is not None:
            sink = at.call.sinks[at.head].astype(wide)
            top = jnp.maximum(top, sink)
            total = jnp.exp(sink - top)
        out, top, total = at.visit(i, tile, (out, top, total))
        # a row that saw nothing has total 0: output 0, log-sum-exp -inf
        out = (out / jnp.where(total == 0, 1, total)[:, None]).astype(outs.dtype)
        log = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
        first = at.grid.row(i)
        return (
            lax.dynamic_update_slice(
                outs, out[None, :, None], (at.row, first, at.head, 0)
            ),
            lax.dynamic_update_slice(logs, log[None, None], (at.row, at.head, first)),
        )

    return lax.fori_loop(0, at.grid.blocks_q, one_block, (outs, logs))


def _backward_head(at, queries, keys, statistics, summed, d_bias):
    """Gradients of one head; the scores lie transposed, [k, q], and so does d_q_i.

    So no large left operand is contracted over its rows, which is slow on CPUs, and
    the row statistics broadcast along the fast axis.
    """
    (q, d_out), (k, v), (logsumexp, dots) = queries, keys, statistics
    wide = logsumexp.dtype
    inner, outer = _split(at.spec.scale, q.dtype)

    def one_block(i, carry):
        d_q, d_k, d_v, d_bias = carry
        q_i, d_out_i, log_i, dot_i = (
            at.rows(x, i) for x in (q, d_out, logsumexp, dots)
        )
        q_i = (q_i * inner).astype(q.dtype)
        if at.grid.t % at.grid.block_q:  # rows of the block before count there
            new = at.grid.row(i) + jnp.arange(at.grid.block_q) >= i * at.grid.block_q
            log_i = jnp.where(new, log_i, jnp.inf)

        def tile(j, masked, carry):
            d_q_i, d_k, d_v, d_bias = carry
            k_j, v_j = at.keys(k, j), at.keys(v, j)
            product = outer * _dot(k_j, q_i, 1, 1)
            scores = at.scores(product, i, j, keys_first=True)
            weights = jnp.exp(scores - log_i)
            d_weights = at.dropped(_dot(v_j, d_out_i, 1, 1), i, j, keys_first=True)
            d_scores = weights * (d_weights - dot_i)
            if at.spec.soft_cap is not None:
                d_scores = d_scores * (1 - (scores / at.spec.soft_cap) ** 2)
            q_c, d_out_c = q_i, d_out_i
            if masked:
                mask = at.mask(i, j, keys_first=True)
                q_c, d_out_c, k_j = (_finite(x) for x in (q_i, d_out_i, k_j))
                weights = jnp.where(mask, weights + 0 * dot_i, 0)
                d_scores = jnp.where(mask, d_scores, 0)
            weights = at.dropped(weights, i, j, keys_first=True).astype(v.dtype)
            if d_bias is not None:
                d_bias = _add_tile(at, d_bias, d_scores.T, i, j)
            d_scores = d_scores.astype(q.dtype)
            d_v = _add(d_v, _dot(weights, d_out_c, 1, 0), at.grid.key(j))
            d_k = _add(d_k, _dot(d_scores, q_c, 1, 0), at.grid.key(j))
            return d_q_i + _dot(k_j, d_scores, 0, 0), d_k, d_v, d_bias

        start = _zeros_like(q, q_i.shape[::-1], wide), d_k, d_v, d_bias
        d_q_i, d_k, d_v, d_bias = at.visit(i, tile, start)
        d_q = _add(d_q, at.spec.scale * d_q_i.T, at.grid.row(i))
        return d_q, d_k, d_v, d_bias

    start = (_zeros_like(q, q.shape, wide), *summed, d_bias)
    return lax.fori_loop(0, at.grid.blocks_q, one_block, start)


def _split(scale, dtype):
    """(a, b) with a b = scale, so that a times a narrow query loses no digit."""
    if jnp.finfo(dtype).bits >= 32 or math.frexp(scale)[0] in (0.5, -0.5):
        return scale, 1.0
    return 1.0, scale


def _finite(x):
    """0 for what is not finite: 0 times it would be NaN, even where it is hidden."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _dot(x, y, x_axis, y_axis):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, contract, preferred_element_type=wide)


def _add(x, more, first):
    old = lax.dynamic_slice_in_dim(x, first, len(more))
    return lax.dynamic_update_slice_in_dim(x, old + more, first, 0)


def _add_tile(at, x, tile, i, j):
    """Add a tile [q, k] to an array over #b #n #t #s, summed where that has one."""
    start, size = at.place(x, i, j)
    axes = [axis for axis in (0, 1) if size[2 + axis] == 1]
    old = lax.dynamic_slice(x, start, size)
    return lax.dynamic_update_slice(x, old + tile.sum(axes, keepdims=True), start)


def _head(x, row, head):
    _, length, _, width = x.shape
    block = lax.dynamic_slice(x, (row, 0, head, 0), (1, length, 1, width))
    return block.reshape(length, width)


def _put(x, block, row, head):
    return lax.dynamic_update_slice(x, block[None, :, None], (row, 0, head, 0))


def _vary_alike(operands):
    """Inside `shard_map`, let all vary over the mesh axes that any varies over.

    What comes in replicated then gets the sum of its gradients over those axes.
    """
    varying = [
        None if x is None else jax.typeof(x).manual_axis_type.varying for x in operands
    ]
    axes = frozenset().union(*(own for own in varying if own is not None))
    for x, own in zip(operands, varying, strict=True):
        missing = () if own is None else tuple(axes - own)
        yield lax.pcast(x, missing, to="varying") if missing else x


def _zeros_like(x, shape, dtype=None):
    """Zeros that vary over the manual mesh axes that x varies over."""
    return lax.full_like(x, 0, dtype, shape)
