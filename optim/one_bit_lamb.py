"""1-bit LAMB: layer-wise adaptive steps with one-bit momenta.

C. Li et al., "1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with
LAMB's Convergence Speed", HiPC 2022, arXiv:2104.06069, Algorithm 1. LAMB (You et al.
2019, arXiv:1904.00962) scales each layer's Adam direction by |x| / |direction|. Once
v is frozen that ratio cannot be taken from one-bit momenta. The mean of the ratios of
the warm-up is used, times a factor from a v' kept up with the gradients that the
momenta imply:

    g^ = (m - b1 m_old) / (1 - b1);   v' = b2 v' + (1 - b2) g^2
    factor = max_j (sqrt(v_j) + eps) / (sqrt(v'_j) + eps)

Here every chunk of every leaf has a scale of its own, so the layers' momenta need no
common scale before they are sent in one message (Sec. 5.2 of the paper).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from ..parallel.state import Reported
from .compressed_mean import MeanState, Way, compressed_mean
from .one_bit_adam import ONE_BIT, root
from .switch import Switch, init_switch, is_frozen, look


class OneBitLambState(NamedTuple):
    adam: optax.ScaleByAdamState  # count, mu, nu: the same on all workers
    fresh: optax.Updates  # v', of the gradients that the momenta imply
    ratio: PyTree  # float32 scalar a leaf, mean of |x| / |direction| in the warm-up
    factor: PyTree  # float32 scalar a leaf, by which the ratio has changed since
    switch: Switch
    mean: MeanState
    said: Reported


def one_bit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    axis_name: str = "data",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Callable | Any = None,
    clip: float | None = None,
    floor: float = 0.01,
    freeze_step: int | None = None,
    tolerance: float = 0.04,
    earliest: int = 0,
    ratio_decay: float = 0.9,
    ratio_range: tuple[float, float] = (0.01, 10.0),
    factor_range: tuple[float, float] = (0.5, 4.0),
    factor_step: float = 0.1,
    up: Way = ONE_BIT,
    down: Way = ONE_BIT,
) -> optax.GradientTransformation:
    """LAMB until v has settled, then one-bit momenta, for replicated parameters.

    clip: of the global norm of the mean gradient, in the warm-up alone. The factor
    stays within factor_range, and within 1 -+ factor_step of that of the step before.
    floor: see `one_bit_adam.root`. freeze_step, tolerance, earliest: see `switch.look`.

    >>> tx = one_bit_lamb(1e-2, workers=8, freeze_step=100)
    """
    mean = compressed_mean(up, down, workers=workers, axis_name=axis_name)
    adam: Any = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = optax.add_decayed_weights(weight_decay, mask=mask)
    lowest, highest = ratio_range

    def init(params):
        ones = jax.tree.map(lambda _: jnp.float32(1), params)
        said = {"compressed": jnp.float32(0), "frozen_at": jnp.float32(-1)}
        start = adam.init(params)
        return OneBitLambState(
            start,
            start.nu,
            jax.tree.map(jnp.zeros_like, ones),
            ones,
            init_switch(),
            mean.init(params),
            Reported(said),
        )

    def decayed(direction, params):
        return decay.update(direction, decay.init(params), params)[0]

    def trust(x, direction):
        norm, size = jnp.linalg.norm(x.ravel()), jnp.linalg.norm(direction.ravel())
        valid = (norm > 0) & (size > 0)
        ratio = jnp.clip(norm / jnp.where(valid, size, 1), lowest, highest)
        return jnp.where(valid, ratio, 1.0)

    def warm(grads, state: OneBitLambState, params):
        grads = lax.pmean(grads, axis_name)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        direction, moments = adam.update(grads, state.adam)
        direction = decayed(direction, params)
        ratios = jax.tree.map(trust, params, direction)
        ratio = jax.tree.map(
            lambda mean, r: ratio_decay * mean + (1 - ratio_decay) * r,
            state.ratio,
            ratios,
        )
        switch = look(
            state.switch,
            moments.count,
            optax.tree.bias_correction(moments.nu, b2, moments.count),
            freeze_step=freeze_step,
            decay=b2,
            tolerance=tolerance,
            earliest=earliest,
        )
        new = state._replace(adam=moments, fresh=moments.nu, ratio=ratio, switch=switch)
        return jax.tree.map(jnp.multiply, ratios, direction), new

    def compressed(grads, state: OneBitLambState, params):
        moments, frozen_at = state.adam, state.switch.frozen_at
        count = optax.safe_increment(moments.count)
        signal = optax.tree.update_moment(grads, moments.mu, b1, 1)
        key = jax.random.fold_in(jax.random.key(0), count)
        mu, mean_state = mean.mean(signal, state.mean, key)
        implied = jax.tree.map(lambda m, old: (m - b1 * old) / (1 - b1), mu, moments.mu)
        fresh = optax.tree.update_moment_per_elem_norm(implied, state.fresh, b2, 2)

        def below(nu, at):
            return root(optax.tree.bias_correction(nu, b2, at), eps, floor)

        frozen, moving = below(moments.nu, frozen_at), below(fresh, count)
        adaptive = jax.tree.map(
            jnp.divide, optax.tree.bias_correction(mu, b1, count), frozen
        )
        direction = decayed(adaptive, params)

        def change(old, frozen, moving, adaptive, direction):
            raw = jnp.max(frozen / moving)
            size = jnp.linalg.norm(direction.ravel())
            share = jnp.linalg.norm(adaptive.ravel()) / jnp.where(size > 0, size, 1)
            share = jnp.minimum(share, 1.0)  # of the direction that v changes
            raw = jnp.clip(raw * share + 1 - share, *factor_range)
            return jnp.clip(raw, old * (1 - factor_step), old * (1 + factor_step))

        factor = jax.tree.map(change, state.factor, frozen, moving, adaptive, direction)
        warmed = 1 - ratio_decay ** frozen_at.astype(jnp.float32)  # the mean's weights
        updates = jax.tree.map(
            lambda r, f, d: r / warmed * f * d, state.ratio, factor, direction
        )
        moments = moments._replace(count=count, mu=mu)
        return updates, state._replace(
            adam=moments, fresh=fresh, factor=factor, mean=mean_state
        )

    def update(grads, state: Any, params=None):
        if params is None:
            raise ValueError("params is missing: call update(grads, state, params)")
        frozen = is_frozen(state.switch)
        updates, state = lax.cond(frozen, compressed, warm, grads, state, params)
        said = {
            "compressed": frozen.astype(jnp.float32),
            "frozen_at": state.switch.frozen_at.astype(jnp.float32),
        }
        return updates, state._replace(said=Reported(said))

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )
