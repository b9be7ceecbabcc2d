"""A transformer of one dial, `depth`, with a bottleneck layer anywhere in its trunk.

GPT-2 and Llama are configurations of it. Blocks are stacked: every parameter of theirs
has a leading axis of depth, in storage, in checkpoints and in names, whether the trunk
is scanned or unrolled.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ..parallel.layout import ROWS, constrain, devices_along
from ..parallel.sequence import Order, arrange, check_order
from .attention import Attention, LayerCache
from .bottleneck import Bottleneck, Open, Waist
from .linear import contract, dot_general
from .pipelined import pipelined
from .stack import part, recomputed, run_stack

DERIVED: Any = None
STREAM = (ROWS, "seq", None)  # [b, t, d]: rows and positions over devices, width whole


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and options; what is None here follows (width 64 depth, heads of 64).

    >>> TransformerConfig(depth=6).width
    384
    """

    vocab_size: int = 256
    depth: int = 4
    width: int = DERIVED
    heads: int = DERIVED
    kv_heads: int = DERIVED  # keys and values shared by groups of heads
    head_width: int = DERIVED
    mlp_width: int = DERIVED
    max_len: int = 1024  # positions that learned positions know
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = 10_000.0  # pair i turns by base**(-2i / head_width)
    mlp: Literal["gated", "gelu", "gelu_tanh"] = "gated"
    bias: bool = False
    tied: bool = False  # the output projection is the embedding
    qk_norm: bool = False
    causal: bool = True  # False: an encoder
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32  # of activations; parameters are float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    scan: bool = False  # one compiled block instead of depth copies

    def __post_init__(self):
        def default(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for name, allowed in (
            ("norm", ("rms", "layer")),
            ("position", ("rotary", "learned")),
            ("mlp", ("gated", "gelu", "gelu_tanh")),
            ("remat", ("none", "dots", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, but allowed are {allowed}"
                )
        for name, value in dataclasses.asdict(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if whole and value < 1:
                raise ValueError(f"{name}: {value}, but it must be at least 1")
        default("width", 64 * self.depth)
        default("heads", max(1, self.width // (self.head_width or 64)))
        default("kv_heads", self.heads)
        default("head_width", self.width // self.heads)
        gated = 64 * -(-8 * self.width // (3 * 64))  # 8/3 width: as many parameters
        default("mlp_width", gated if self.mlp == "gated" else 4 * self.width)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: {self.kv_heads}, but it must divide heads={self.heads}"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(
                f"head_width: {self.head_width}, but rotary positions need it even"
            )


GPT2 = TransformerConfig(
    vocab_size=50257,
    depth=12,
    norm="layer",
    position="learned",
    mlp="gelu_tanh",
    bias=True,
    tied=True,
)
LLAMA_7B = TransformerConfig(
    vocab_size=32000,
    depth=32,
    width=4096,
    heads=32,
    mlp_width=11008,
    norm_epsilon=1e-6,
)


class Cache(NamedTuple):
    """Keys and values of every block, and how many positions they hold."""

    layers: LayerCache  # leaves [depth, b, s, k, h]
    length: Int[Array, ""]


class Output(NamedTuple):
    logits: Float[Array, "b t v"]  # float32
    waist: Waist
    cache: Cache | None = None


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms":
        return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_epsilon, use_bias=config.bias, rngs=rngs
    )


class MLP(nnx.Module):
    """gelu: W_down gelu(W_up x); gated: W_down (silu(W_gate x) * W_up x).

    gelu_tanh approximates gelu by a tanh, as GPT-2 does.
    """

    def __init__(self, config: TransformerConfig, residual_scale, *, rngs: nnx.Rngs):
        self.tanh = config.mlp == "gelu_tanh"
        options: dict[str, Any] = {"use_bias": config.bias, "dtype": config.dtype}
        options |= {"dot_general": dot_general, "rngs": rngs}
        self.up = nnx.Linear(config.width, config.mlp_width, **options)
        gated = config.mlp == "gated"
        self.gate = (
            nnx.Linear(config.width, config.mlp_width, **options) if gated else None
        )
        init = nnx.initializers.variance_scaling(residual_scale**2, "fan_in", "normal")
        self.down = nnx.Linear(
            config.mlp_width, config.width, kernel_init=init, **options
        )

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=self.tanh))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        scale = (2 * config.depth) ** -0.5  # the residual sum keeps unit variance
        self.dtype = config.dtype
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(
            config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            qk_norm=config.qk_norm,
            rotary=config.position == "rotary",
            rotary_base=config.rotary_base,
            causal=config.causal,
            bias=config.bias,
            residual_scale=scale,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, scale, rngs=rngs)

    def __call__(self, x, **options):
        mixed, cache = self.attention(
            self.attention_norm(x).astype(self.dtype), **options
        )
        x = constrain(x + mixed, *STREAM)
        x = x + self.mlp(self.mlp_norm(x).astype(self.dtype))
        return constrain(x, *STREAM), cache


class Transformer(nnx.Module):
    """Embedding, `depth` blocks with a waist before `waist_at`, output projection.

    >>> model = Transformer(TransformerConfig(depth=2), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 8), jnp.int32)).logits.shape
    (1, 8, 256)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        waist: Bottleneck | None = None,
        waist_at: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.waist_at = config.depth // 2 if waist_at is None else waist_at
        if not 0 <= self.waist_at <= config.depth:
            raise ValueError(
                f"waist_at: {waist_at}, but it must lie in 0..{config.depth}"
            )
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, embedding_init=init, rngs=rngs
        )
        learned = config.position == "learned"
        self.position = (
            nnx.Embed(config.max_len, config.width, embedding_init=init, rngs=rngs)
            if learned
            else None
        )
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.waist = Open() if waist is None else waist
        self.final_norm = _norm(config, rngs)
        self.head = (
            None
            if config.tied
            else nnx.Linear(config.width, config.vocab_size, use_bias=False, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        order: Order = "contiguous",
        microbatches: int = 1,
    ) -> Output:
        """Logits of the next token (decoder) or of each position (encoder).

        mask: False where padding; nothing attends there. segment_ids: >= 0, each a run
        of the row; positions attend within equal ids only and are counted from the
        run's first, unless `positions` says else. cache: continue after what it holds.
        order: how a mesh's seq axis shares out positions; all arguments have them in
        ascending order, what comes out has them in the order of the slots.
        microbatches: into which a mesh's stage axis cuts the rows (`pipelined.py`).
        Raises ValueError where learned positions or the cache have no room, or the
        positions do not divide.
        """
        config, (rows, length) = self.config, tokens.shape
        parts, stages = devices_along("seq"), devices_along("stage")
        check_order(order, length, parts)
        past = jnp.zeros((), jnp.int32) if cache is None else cache.length
        if config.position == "learned" and length > config.max_len:
            raise ValueError(
                f"tokens: {length} positions, but max_len={config.max_len} are learned"
            )
        if cache is not None:
            if not config.causal or mask is not None or segment_ids is not None:
                raise ValueError(
                    "cache: only for a causal model, without mask and segment_ids"
                )
            if parts * stages > 1:
                raise ValueError(
                    f"cache: the mesh has seq={parts} and stage={stages}, which cut "
                    "what a cache holds whole; generate without these axes"
                )
            room = cache.layers.keys.shape[2]
            held = 0 if isinstance(past, Tracer) else int(past)
            if held + length > room:
                raise ValueError(
                    f"cache: {held} positions held and {length} tokens to come, but it "
                    f"has room for {room}; make a larger empty_cache"
                )
        if positions is None:
            index = jnp.broadcast_to(jnp.arange(length), (rows, length))
            positions = past + index
            if segment_ids is not None:
                begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
                positions = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        if mask is not None:
            ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            segment_ids = jnp.where(mask, ids, -1)
            tokens = jnp.where(mask, tokens, 0)  # so that any padding will do
        tokens, positions, segment_ids, mask = jax.tree.map(
            lambda x: arrange(x, order, parts), (tokens, positions, segment_ids, mask)
        )
        tokens = constrain(tokens, *STREAM[:2])
        x = self.looked_up(tokens, positions)
        options = {"positions": positions, "segment_ids": segment_ids, "length": past}
        options["order"] = order
        if stages > 1:
            x, waist = pipelined(self, x, mask, options, microbatches)
            return Output(self._logits(x), waist)
        layers = None if cache is None else cache.layers
        cut = self.waist_at
        x, low = self._trunk(x, 0, cut, layers, options)
        waist = self.waist(x, mask)
        x = constrain(waist.z, *STREAM)
        x, high = self._trunk(x, cut, config.depth, layers, options)
        if cache is not None:
            joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), low, high)
            cache = Cache(joined, past + length)
        return Output(self._logits(x), waist, cache)

    def looked_up(
        self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """What the blocks are given."""
        # Collected over fsdp but not over tensor, before the look-up: left alone, the
        # partitioner would move the looked-up rows instead of the table.
        table = constrain(self.embed.embedding[...], "tensor", None)
        x = jnp.take(table, tokens, axis=0).astype(self.config.dtype)  # NaN outside
        if self.position is not None:
            x = x + self.position(positions).astype(self.config.dtype)
        return constrain(x, *STREAM)

    def empty_cache(self, rows: int, room: int) -> Cache:
        """A cache for `rows` sequences of up to `room` positions."""
        config = self.config
        if config.position == "learned" and room > config.max_len:
            raise ValueError(
                f"room: {room} positions, but max_len={config.max_len} are learned"
            )
        shape = (config.depth, rows, room, config.kv_heads, config.head_width)
        zeros = jnp.zeros(shape, config.dtype)
        return Cache(LayerCache(zeros, zeros), jnp.zeros((), jnp.int32))

    def _trunk(self, x, start: int, stop: int, layers: LayerCache | None, options):
        """Blocks start..stop; with caches, also their new caches, stacked."""
        graph, stack = nnx.split(self.blocks)
        stack = part(nnx.as_pure(stack), start, stop)
        layers = None if layers is None else part(layers, start, stop)
        if start == stop:
            return x, layers

        def run(x, xs):
            params, cache = xs
            return nnx.merge(graph, params)(x, cache=cache, **options)

        run = recomputed(run, self.config.remat)
        return run_stack(run, stack, x, layers, scan=self.config.scan)

    def _logits(self, x) -> Float[Array, "b t v"]:
        output = self.embed if self.head is None else self.head
        return logits_of(x, self.final_norm, output, self.config.dtype)


def logits_of(x, norm: nnx.Module, output: nnx.Module, dtype) -> Float[Array, "b t v"]:
    """Of what the blocks leave; `output` is the head, or the embedding where tied."""
    x = norm(x).astype(dtype)
    tied = isinstance(output, nnx.Embed)
    kernel = output.embedding[...].T if tied else output.kernel[...]
    logits = contract(x, kernel.astype(x.dtype), 1, jnp.float32)
    return constrain(logits, ROWS, "seq", "tensor")
