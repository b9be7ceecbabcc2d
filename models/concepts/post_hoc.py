"""Post-hoc concept bottlenecks (Yuksekgonul et al. 2023, arXiv:2205.15480).

    logits = W p(x) + w,   min mean CE + strength (alpha |W|_1 + (1 - alpha) |W|_2^2)

on the projections p of a bank (Sec. 2, Eq. 1; `strength` is the paper's lambda / K M).
The hybrid adds a linear residual R x learned while W stays as it is (Eq. 2); without it
the concepts' model is back. Projections are standardised for the fit, since an L1 norm
sees their scale, and W is then written for the projections as they are.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from . import activation, contract, sparse
from .activation import Bank
from .contract import Labels, Prediction

WEIGHTS = {"classes": 1.0, "residual": 0.01}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PostHoc:
    """A bank and a sparse head on its projections."""

    directions: Float[Array, "k d"]
    intercepts: Float[Array, " k"]
    levels: Float[Array, "2 k"] | None
    weight: Float[Array, "m k"]
    bias: Float[Array, " m"]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def bank(self) -> Bank:
        return Bank(self.names, self.directions, self.intercepts, self.levels)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        """An intervention sets a projection to its mean without or with the concept.

        concepts are where a projection lies between these two means, cut to [0, 1]; of
        a bank without levels, 1 on the concept's side of the hyperplane.
        Raises ValueError for an intervention on a bank without levels.
        """
        p = activation.project(self.bank, x)
        if self.levels is None:
            if truth is not None or mask is not None:
                raise ValueError(
                    "truth: given, but a bank without labelled examples does not know "
                    "which projection a concept has"
                )
            return Prediction((p > 0).astype(p.dtype), self.head(p), p)
        low, high = self.levels
        share = jnp.clip((p - low) / (high - low), 0.0, 1.0)
        if truth is not None:
            p = contract.intervene(p, low + (high - low) * truth, mask)
        odds = contract.log_odds(share)
        return Prediction(contract.intervene(share, truth, mask), self.head(p), odds)

    def head(self, p: Float[Array, "*b k"]) -> Float[Array, "*b m"]:
        return p @ self.weight.T + self.bias


def post_hoc(
    bank: Bank,
    x,
    classes,
    *,
    strength: float = 1e-3,
    alpha: float = 0.99,
    max_iter: int = 5000,
    tol: float = 1e-5,
) -> PostHoc:
    """Fit the head on features x [n, d] and classes [n] in [0, m), each class present.

    max_iter, tol: of `sparse.elastic_net_path`, which also warns and refuses.
    """
    return post_hoc_path(
        bank, x, classes, [strength], alpha=alpha, max_iter=max_iter, tol=tol
    )[0]


def post_hoc_path(
    bank: Bank, x, classes, strengths: Sequence[float], **options
) -> list[PostHoc]:
    """A head for each strength, each fit started from the one before.

    options: of `post_hoc`, but for its strength.
    """
    p = np.asarray(activation.project(bank, x), np.float64)
    centre, scale = p.mean(0), np.maximum(p.std(0), 1e-12)
    heads = sparse.elastic_net_path((p - centre) / scale, classes, strengths, **options)
    weights = np.asarray(heads.weight, np.float64) / scale
    biases = np.asarray(heads.bias, np.float64) - weights @ centre
    return [
        PostHoc(
            *(bank.directions, bank.intercepts, bank.levels),
            weight=jnp.asarray(weight, jnp.float32),
            bias=jnp.asarray(bias, jnp.float32),
            names=bank.names,
        )
        for weight, bias in zip(weights, biases, strict=True)
    ]


def prune(
    model: PostHoc, removed: dict[int, list[str]], *, normalise: bool = False
) -> PostHoc:
    """A global edit: the named concepts no longer count for a class (Sec. 4).

    removed: class -> names. `normalise` scales what is left of a class to the L1 norm
        that it had; a class of which nothing is left stays at 0.
    Raises ValueError for an unknown name or class.
    """
    weight = np.array(model.weight)
    for label, names in removed.items():
        if not 0 <= label < len(weight):
            raise ValueError(f"class: {label}, but allowed are 0 to {len(weight) - 1}")
        before = np.abs(weight[label]).sum()
        weight[label, contract.columns(model.names, names)] = 0.0
        left = np.abs(weight[label]).sum()
        if normalise and left > 0:
            weight[label] *= before / left
    return dataclasses.replace(model, weight=jnp.asarray(weight))


def greedy_prune(model: PostHoc, x, classes, *, count: int) -> PostHoc:
    """The edit that labels would choose: the best single weight to drop, count times.

    Best for the accuracy on rows x [n, d] with classes [n]; ends early where no weight
    that is left raises it. With rows of the target domain it is an oracle for `prune`.
    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count: {count}, but it must be at least 0")
    p, labels = activation.project(model.bank, x), jnp.asarray(classes)
    places = jnp.indices(model.weight.shape).reshape(2, -1).T

    @jax.jit
    def gains(weight):
        logits = p @ weight.T + model.bias

        def without(place):
            c, k = place
            less = logits.at[:, c].add(-weight[c, k] * p[:, k])
            return jnp.mean(less.argmax(-1) == labels)

        return jax.lax.map(without, places) - jnp.mean(logits.argmax(-1) == labels)

    weight = model.weight
    for _ in range(count):
        gain = gains(weight)
        best = gain.argmax()
        if gain[best] <= 0:
            break
        weight = weight.at[tuple(places[best])].set(0.0)
    return dataclasses.replace(model, weight=weight)


def refit(model: PostHoc, x, classes, **options) -> PostHoc:
    """A head of the same bank fitted anew, such as to rows of another domain.

    What labels of that domain buy, and so the ceiling of any edit without labels.
    options: of `post_hoc`.
    """
    return post_hoc(model.bank, x, classes, **options)


class Hybrid(nnx.Module):
    """A post-hoc model and a linear residual from the features, which starts at 0."""

    def __init__(self, base: PostHoc):
        self.names = base.names
        self.base = nnx.data(base)
        shape = (base.directions.shape[1], base.weight.shape[0])
        self.residual = nnx.Param(jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        said = self.base(x, truth, mask)
        passed = x.astype(jnp.float32) @ self.residual[...]
        return said._replace(classes=said.classes + passed)


def hybrid_losses(model: Hybrid, x, labels: Labels, key) -> dict[str, Array]:
    """For `fit` of the residual alone: "residual" is the sum of its squares."""
    del key
    return {
        "classes": contract.class_loss(model(x).classes, labels),
        "residual": jnp.sum(model.residual[...] ** 2),
    }


def residual_share(model: Hybrid, x: Float[Array, "n d"]) -> Float[Array, ""]:
    """Of the spread of the logits over rows, the part that did not come by concepts.

    var(R x) / (var(R x) + var(W p)), summed over classes: 0 without a residual.
    """
    past = jnp.var(x @ model.residual[...], axis=0).sum()
    by_concepts = jnp.var(model.base(x).classes, axis=0).sum()
    return past / jnp.maximum(past + by_concepts, 1e-12)
