"""Probabilistic concept bottlenecks (Kim et al. 2023, arXiv:2306.01574).

    z_k ~ N(mu_k(x), diag sigma_k(x)^2)
    p_k = E sigmoid(a (|z_k - v_k^-| - |z_k - v_k^+|))
    p(y) = E softmax_y(-b |W [z_1; ...; z_K] - u_y|)

(Sec. 3.) A concept passes as a point between two anchors that no x moves, and x says
how sure it is of that point. A concept that is set is its anchor. Expectations are
means over a few normal draws, the same for all rows and calls, so that an answer to a
row is always the same.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from . import contract
from .contract import Labels, Prediction

WEIGHTS = {"concepts": 1.0, "classes": 1.0, "prior": 1e-3}


class ProbabilisticBottleneck(nnx.Module):
    """`size` numbers for each concept and `size` for a class; `draws` of them a row.

    >>> model = ProbabilisticBottleneck(8, ("wing", "beak"), 3, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((5, 8))).classes.shape, model.doubt(jnp.ones((5, 8))).shape
    ((5, 3), (5, 2))
    """

    def __init__(
        self,
        width: int,
        names: Sequence[str],
        classes: int,
        *,
        hidden: int = 64,
        size: int = 8,
        draws: int = 16,
        rngs: nnx.Rngs,
    ):
        if draws < 1:
            raise ValueError(f"draws: {draws}, but it must be at least 1")
        self.names, self.size, self.draws = contract.checked_names(names), size, draws
        k = len(self.names)
        self.inward = nnx.Linear(width, hidden, rngs=rngs)
        self.point = nnx.Linear(hidden, k * size, rngs=rngs)
        self.doubts = nnx.Linear(hidden, k * size, rngs=rngs)  # log sigma^2
        self.head = nnx.Linear(k * size, size, rngs=rngs)

        def drawn(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.anchors, self.class_points = drawn(2, k, size), drawn(classes, size)
        self.log_scales = nnx.Param(jnp.full(2, jnp.log(2.0)))  # log a, log b

    def normals(self, x: Float[Array, "*b d"]):
        """mu and log sigma^2, both [*b, k, size], the latter cut to [-8, 8]."""
        h = jax.nn.relu(self.inward(x.astype(jnp.float32)))
        shape = (*x.shape[:-1], len(self.names), self.size)
        variance = jnp.clip(self.doubts(h).reshape(shape), -8.0, 8.0)
        return self.point(h).reshape(shape), variance

    def doubt(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """How unsure x leaves each concept: the geometric mean of its sigmas."""
        return jnp.exp(0.5 * self.normals(x)[1].mean(-1))

    def odds(self, z: Float[Array, "*b k e"]) -> Float[Array, "*b k"]:
        """Log odds of concepts at given points."""
        absent, present = (_distance(z, v) for v in self.anchors[...])
        return jnp.exp(self.log_scales[...][0]) * (absent - present)

    def logits(self, z: Float[Array, "*b k e"]) -> Float[Array, "*b m"]:
        h = self.head(z.reshape(*z.shape[:-2], -1))
        far = _distance(h[..., None, :], self.class_points[...])
        return -jnp.exp(self.log_scales[...][1]) * far

    def said(self, x, noise, truth, mask) -> Prediction:
        """noise: [draws, ...] standard normals that broadcast against [*b, k, size]."""
        mu, variance = self.normals(x)
        z = mu + jnp.exp(0.5 * variance) * noise
        odds = contract.log_odds(jax.nn.sigmoid(self.odds(z)).mean(0))
        if truth is not None and mask is not None:
            absent, present = self.anchors[...]
            anchor = absent + truth[..., None] * (present - absent)
            z = jnp.where(mask[..., None], anchor, z)
        classes = jax.nn.logsumexp(jax.nn.log_softmax(self.logits(z)), 0)
        concepts = contract.intervene(jax.nn.sigmoid(odds), truth, mask)
        return Prediction(concepts, classes - jnp.log(len(z)), odds)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        shape = (self.draws, *[1] * (x.ndim - 1), len(self.names), self.size)
        noise = jax.random.normal(jax.random.key(0), shape)
        return self.said(x, noise, truth, mask)


def losses(random_truth: float = 0.25):
    """The named losses for `fit`, of one draw a row.

    "prior" is KL(N(mu, sigma^2) || N(0, 1)) in nats, mean over concepts. Of each row
    this share of the known concepts is set to the truth, so that the class learns from
    anchors too (Sec. 3.3).
    """
    if not 0 <= random_truth < 1:
        raise ValueError(f"random_truth: {random_truth}, but must be in [0, 1)")

    def named(model: ProbabilisticBottleneck, x, labels: Labels, key):
        known = labels.known & labels.mask[..., None]
        truth = jnp.where(known, labels.concepts, 0.0)
        where, how = jax.random.split(key)
        mu, variance = model.normals(x)
        set_ = known & jax.random.bernoulli(where, random_truth, known.shape)
        noise = jax.random.normal(how, (1, *mu.shape))
        out = model.said(x, noise, truth, set_)
        prior = 0.5 * (mu**2 + jnp.exp(variance) - 1 - variance).sum(-1).mean(-1)
        return {
            "concepts": contract.concept_loss(out.concept_logits, labels),
            "classes": contract.class_loss(out.classes, labels),
            "prior": contract.mean(prior, labels.mask),
        }

    return named


def _distance(a, b):
    return jnp.sqrt(jnp.sum((a - b) ** 2, -1) + 1e-12)
