"""1-bit Adam: Adam until its second moment has settled, then one bit an entry.

H. Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
Convergence Speed", ICML 2021, arXiv:2102.02888, Algorithm 1. Error feedback cancels the
errors of what is linear in the gradient; the second moment is not. So plain Adam runs
first, on dense means, then v is frozen and the momentum is sent compressed both ways:

    m_i = b1 m + (1 - b1) g_i;   m = two-phase compressed mean of m_i
    x  <- x - rate m / (sqrt(v) + eps)

The update is one worker's inside `jax.shard_map` or `jax.vmap` over `axis_name`, on
gradients of which only the mean over workers is the gradient. Biases are corrected as
in Adam (the paper leaves that out), v's at the step where it froze: until then all is
bit for bit `optax.adam` of the mean gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..parallel.state import Reported
from .clipping import clip_local, learn_spread
from .compressed_mean import MeanState, Way, compressed_mean
from .signs import sign
from .switch import Switch, init_switch, is_frozen, look


class OneBitAdamState(NamedTuple):
    adam: optax.ScaleByAdamState  # count, mu, nu: the same on all workers
    spread: Float[Array, ""]  # norm of local gradients over that of their mean
    switch: Switch
    mean: MeanState  # residuals of workers and owners
    said: Reported


ONE_BIT = Way("feedback", sign())


def root(
    nu: PyTree, eps: float, floor: float, mean: Callable[[Array], Array] = jnp.mean
) -> PyTree:
    """sqrt(v) + eps of a frozen v, nowhere below `floor` of its mean over the leaf.

    Where no gradient came before v froze (a word not yet read) it is 0, and the first
    one over eps alone would end the training.
    """

    def of(v):
        return jnp.sqrt(jnp.maximum(v, floor * mean(v))) + eps

    return jax.tree.map(of, nu)


def scale_by_one_bit_adam(
    *,
    workers: int,
    axis_name: str = "data",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = None,
    floor: float = 0.01,
    freeze_step: int | None = None,
    tolerance: float = 0.04,
    earliest: int = 0,
    up: Way = ONE_BIT,
    down: Way = ONE_BIT,
) -> optax.GradientTransformation:
    """Adam's direction of the workers' mean gradient, compressed once v has settled.

    clip: of the global norm of the mean gradient; in the second stage that norm is not
    known, and is taken as that of the local gradients over what separated the two in
    the first. floor: see `root`. freeze_step, tolerance, earliest: see `switch.look`.
    """
    mean = compressed_mean(up, down, workers=workers, axis_name=axis_name)
    adam: Any = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params):
        said = {"compressed": jnp.float32(0), "frozen_at": jnp.float32(-1)}
        return OneBitAdamState(
            adam.init(params),
            jnp.float32(1),
            init_switch(),
            mean.init(params),
            Reported(said),
        )

    def warm(grads, state: OneBitAdamState):
        local = grads
        grads = lax.pmean(grads, axis_name)
        norm = optax.tree.norm(grads)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        updates, moments = adam.update(grads, state.adam)
        share = jnp.maximum(1 - b2, 1 / moments.count)  # a plain mean at first
        spread = learn_spread(
            state.spread, local, norm, share=share, axis_name=axis_name
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
        return updates, state._replace(adam=moments, spread=spread, switch=switch)

    def compressed(grads, state: OneBitAdamState):
        if clip is not None:
            grads = clip_local(grads, state.spread, clip, axis_name=axis_name)
        moments = state.adam
        count = optax.safe_increment(moments.count)
        nu = optax.tree.bias_correction(moments.nu, b2, state.switch.frozen_at)
        below = root(nu, eps, floor)
        signal = optax.tree.update_moment(grads, moments.mu, b1, 1)
        key = jax.random.fold_in(jax.random.key(0), count)
        found, mean_state = mean.mean(signal, state.mean, key)
        updates = optax.tree.bias_correction(found, b1, count)
        updates = jax.tree.map(jnp.divide, updates, below)
        moments = moments._replace(count=count, mu=found)
        return updates, state._replace(adam=moments, mean=mean_state)

    def update(grads, state: Any, params=None):
        del params
        frozen = is_frozen(state.switch)
        updates, state = lax.cond(frozen, compressed, warm, grads, state)
        said = {
            "compressed": frozen.astype(jnp.float32),
            "frozen_at": state.switch.frozen_at.astype(jnp.float32),
        }
        return updates, state._replace(said=Reported(said))

    return optax.GradientTransformation(init, update)


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    weight_decay: float = 0.0,
    mask: Callable | Any = None,
    **options: Any,
) -> optax.GradientTransformation:
    """1-bit Adam with decoupled weight decay; options as `scale_by_one_bit_adam`.

    >>> tx = one_bit_adam(1e-3, workers=8, freeze_step=100)
    >>> state = tx.init({"w": jnp.zeros((3, 4))})  # of all workers
    >>> state[0].mean.up.worker.per_worker_mean.e["w"].shape
    (8, 3, 4)
    """
    return optax.chain(
        scale_by_one_bit_adam(workers=workers, **options),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(learning_rate),
    )
