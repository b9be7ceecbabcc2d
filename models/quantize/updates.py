"""How codes learn from sums: rules, applied in order once a step.

A rule sees what each code received in the step, summed over all positions, and never a
position. So the codes are the same for any cut of the batch into microbatches and
devices. What a code received can only move it; a code that receives too little is split
off from one that receives much (Linde, Buzo and Gray 1980), which needs only sums too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .search import Metric, nearest, unit


class CodeSums(NamedTuple):
    """Sums over the positions that chose each code, float32."""

    count: Float[Array, " k"]
    total: Float[Array, "k e"]
    square: Float[Array, ""]  # of the distances to the chosen codes, over all positions


class CodeState(NamedTuple):
    codes: Float[Array, "k e"]
    weight: Float[Array, " k"]  # average count of a step
    spread: Float[Array, ""]  # average squared distance to the chosen code
    steps: Int[Array, ""]  # updates that learned
    inner: tuple = ()  # what each rule keeps


class Rule(NamedTuple):
    """step(state, sums, inner) -> (state, inner, report); init(codes) -> inner."""

    step: Callable[[CodeState, CodeSums, Any], tuple[CodeState, Any, dict]]
    init: Callable[[jax.Array], Any] = lambda codes: ()


def code_sums(
    x: Float[Array, "*b e"],
    index: Int[Array, "*b"],
    square: Float[Array, "*b"],
    keep: Float[Array, "*b"],
    k: int,
) -> CodeSums:
    """Of the positions kept; x is 0 where they are not."""
    flat, x = index.reshape(-1), jax.lax.stop_gradient(x).reshape(-1, x.shape[-1])
    keep, square = keep.reshape(-1), jax.lax.stop_gradient(square).reshape(-1)
    return CodeSums(
        count=jax.ops.segment_sum(keep, flat, k),
        total=jax.ops.segment_sum(x * keep[:, None], flat, k),
        square=jnp.sum(square * keep),
    )


def code_state(codes: Float[Array, "k e"], rules: Sequence[Rule] = ()) -> CodeState:
    """Fresh: no counts yet, so that the first average is what first arrives."""
    return CodeState(
        codes=codes,
        weight=jnp.zeros(len(codes), jnp.float32),
        spread=jnp.ones((), jnp.float32),
        steps=jnp.zeros((), jnp.int32),
        inner=tuple(rule.init(codes) for rule in rules),
    )


def follow(
    state: CodeState, sums: CodeSums, rules: Sequence[Rule]
) -> tuple[CodeState, dict[str, jax.Array]]:
    """A step's rules in order. Where no position arrived, nothing changes at all."""
    arrived = sums.count.sum() > 0
    new, inner, report = state, [], {}
    for rule, held in zip(rules, state.inner, strict=True):
        new, kept, said = rule.step(new, sums, held)
        inner.append(kept)
        report |= said
    new = new._replace(steps=state.steps + 1, inner=tuple(inner))
    new = jax.tree.map(lambda a, b: jnp.where(arrived, a, b), new, state)
    return new, {name: jnp.where(arrived, x, 0.0) for name, x in report.items()}


def ema(decay: float = 0.95) -> Rule:
    """Codes follow the average of what they receive (arXiv:1711.00937, Appendix A.1).

    N' = decay N + (1 - decay) n,  C' = C + (1 - decay) (sum - n C) / N': there m / N,
    kept as C, so that a code left alone stays where it is when its N underflows.
    decay = 0 is a step of Lloyd's algorithm.
    """

    def step(state: CodeState, sums: CodeSums, inner):
        state = _averages(state, sums, decay)
        off = sums.total - sums.count[:, None] * state.codes  # 0 where nothing came
        share = (1 - decay) / jnp.where(state.weight > 0, state.weight, 1.0)
        return state._replace(codes=state.codes + share[:, None] * off), inner, {}

    return Rule(step)


def gradient(
    tx: optax.GradientTransformation,
    *,
    penalty: Callable[[jax.Array], jax.Array] | None = None,
    decay: float = 0.95,
) -> Rule:
    """Codes descend the codebook loss by an optax transformation of their own.

    The gradient of the mean |sg(x) - C|^2 is 2 (n_j C_j - sum_j) / n, from sums alone.
    penalty: a loss of the codes to descend as well, as `losses.orthogonality`.
    decay: of the counts that `revive` reads.
    """

    def step(state: CodeState, sums: CodeSums, inner):
        state = _averages(state, sums, decay)
        off = sums.count[:, None] * state.codes - sums.total
        slope = 2 * off / jnp.maximum(sums.count.sum(), 1.0)
        if penalty is not None:
            slope = slope + jax.grad(penalty)(state.codes)
        move, inner = tx.update(slope, inner, state.codes)
        codes: Any = optax.apply_updates(state.codes, move)
        return state._replace(codes=codes), inner, {}

    return Rule(step, tx.init)


def sphere() -> Rule:
    """Back to unit length: after another rule, for codes chosen by cosine."""

    def step(state: CodeState, sums: CodeSums, inner):
        return state._replace(codes=unit(state.codes)), inner, {}

    return Rule(step)


def revive(share: float = 0.2) -> Rule:
    """Split codes whose average count is below `share` of the mean off full ones."""

    def step(state: CodeState, sums: CodeSums, inner):
        floor = share * state.weight.mean()
        starved = state.weight < floor
        state, revived = jax.lax.cond(
            starved.any(),
            lambda state: _split(state, floor),
            lambda state: (state, jnp.zeros((), jnp.float32)),
            state,
        )
        return state, inner, {"revived": revived}

    return Rule(step)


def kmeans(
    key: jax.Array,
    x: Float[Array, "*b e"],
    k: int,
    *,
    mask: Bool[Array, "*b"] | None = None,
    metric: Metric = "euclidean",
    iterations: int = 10,
) -> CodeState:
    """Codes at the means of x: drawn rows, then Lloyd's steps with revival.

    Each row is drawn with a chance in proportion to its squared distance to those drawn
    before (k-means++, Arthur and Vassilvitskii 2007), by its place in the whole array,
    and means are sums over all of it: x may lie over devices. With fewer unmasked rows
    than codes, rows repeat and the copies are split off.
    """
    rules = (ema(0.0), revive(0.05), *((sphere(),) if metric == "cosine" else ()))
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    flat = unit(flat) if metric == "cosine" else flat
    keep = jnp.ones(len(flat)) if mask is None else mask.reshape(-1).astype(jnp.float32)
    flat = jnp.where(keep[:, None] > 0, flat, 0.0)
    state = code_state(_spread(key, flat, keep, k), rules)

    def lloyd(state: CodeState, _):
        index = nearest(flat, state.codes, metric=metric)
        square = jnp.sum((flat - state.codes[index]) ** 2, -1)
        sums = code_sums(flat, index, square, keep, k)
        return follow(state, sums, rules)[0], None

    state = jax.lax.scan(lloyd, state, length=iterations)[0]
    return state._replace(steps=jnp.zeros((), jnp.int32), inner=())


def _spread(key, x, keep, k: int) -> Float[Array, "k e"]:
    """Rows of x far from each other."""

    def draw(i, held):
        codes, square = held
        chance = jnp.log(jnp.maximum(square, 1e-30))
        chance = jnp.where(keep > 0, chance, -jnp.inf)
        noise = jax.random.gumbel(jax.random.fold_in(key, i), keep.shape)
        code = x[jnp.argmax(chance + noise)]
        square = jnp.minimum(square, jnp.sum((x - code) ** 2, -1))
        return codes.at[i].set(code), square

    far = jnp.full_like(keep, 1e30)  # from nothing: the first is drawn evenly
    start = jnp.zeros((k, x.shape[-1]), jnp.float32), far
    return jax.lax.fori_loop(0, k, draw, start)[0]


def _averages(state: CodeState, sums: CodeSums, decay: float) -> CodeState:
    seen = jnp.maximum(sums.count.sum(), 1.0)
    return state._replace(
        weight=decay * state.weight + (1 - decay) * sums.count,
        spread=decay * state.spread + (1 - decay) * sums.square / seen,
    )


def _split(state: CodeState, floor) -> tuple[CodeState, Float[Array, ""]]:
    """Give the j-th code below `floor` half of the j-th fullest code, a little aside.

    Aside is a tenth of the mean distance to a code, in a random direction: a plane
    close to the donor halves what it receives, where one at full distance would, in
    many dimensions, cut off almost nothing.
    """
    codes, weight = state.codes, state.weight
    k, width = codes.shape
    starved = weight < floor
    rank = jnp.cumsum(starved) - 1  # the j-th starved code ...
    fullest = jnp.argsort(-weight, stable=True)
    donor = fullest[jnp.clip(rank, 0, k - 1)]  # ... takes from the j-th fullest
    starved &= weight[donor] > 2 * floor  # and only from one that can spare half
    key = jax.random.fold_in(jax.random.key(0), state.steps)
    aside = 0.1 * jnp.sqrt(state.spread / width) * jax.random.normal(key, (k, width))
    taken = jnp.zeros(k, bool).at[jnp.where(starved, donor, k)].set(True, mode="drop")
    codes = jnp.where(starved[:, None], codes[donor] + aside, codes)
    half = jnp.where(taken, weight / 2, weight)
    weight = jnp.where(starved, weight[donor] / 2, half)
    revived = starved.sum().astype(jnp.float32)
    return state._replace(codes=codes, weight=weight), revived
