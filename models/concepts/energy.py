"""Energy-based concept bottlenecks (Xu et al. 2024, arXiv:2401.14142).

    E(x, c, y) = a E_class(x, y) + b sum_k E_k(x, c_k) + g E_global(c, y)
    E_class(x, y) = G(W1 x, u_y),  E_k(x, c_k) = G_k(W2 x, v_k^c),
    E_global(c, y) = G(W3 [v_1^c; ...; v_K^c], u_y),  G(a, b) = w . relu(a + a b)

(Eq. 1 to 8.) One joint energy answers what the class is, what the other concepts are
once a person corrected one, and how concepts and classes go together (`queries`).
Class embeddings u have unit length; concept embeddings v have it in E_k alone. One
convention everywhere: v[0] is of a concept that is absent, v[1] of one present.

Minimised as the paper does, each energy is a cross-entropy of its own, which leaves a
function of c in E_global free: p(c) is then nobody's. The part "joint" is the exact
-log p(c, y | x), and fixes it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from . import contract, queries
from .contract import Labels, Prediction

WEIGHTS = {"classes": 3.0, "concepts": 1.0, "global": 1.0}
JOINT_WEIGHTS = {"classes": 1.0, "concepts": 1.0, "global": 1.0, "joint": 1.0}
INFERENCE = ("exact", "map", "gradient")
MOST = 12  # concepts whose 2^k patterns are listed


class EnergyBottleneck(nnx.Module):
    """Three energy networks over features, named concepts and classes.

    weights: a, b and g above, of what is predicted; training has its own.
    inference: "exact" answers each concept by itself, "map" the likeliest pattern as
        a whole, both of all 2^k patterns (at most 12 concepts); "gradient" minimises
        the relaxed energy, as the paper does, from `restarts` starts.
    """

    def __init__(
        self,
        width: int,
        names: Sequence[str],
        classes: int,
        *,
        hidden: int = 64,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        inference: str = "exact",
        restarts: int = 8,
        rngs: nnx.Rngs,
    ):
        self.names = contract.checked_names(names)
        if inference not in INFERENCE:
            raise ValueError(
                f"inference: {inference!r}, but allowed are {', '.join(INFERENCE)}"
            )
        k = len(self.names)
        if inference != "gradient" and k > MOST:
            raise ValueError(
                f"inference: {inference!r} lists 2^k patterns and takes at most {MOST} "
                f"concepts, but {k} came: take 'gradient'"
            )
        self.weights, self.inference, self.restarts = weights, inference, restarts
        self.by_class = nnx.Linear(width, hidden, rngs=rngs)  # W1
        self.by_concept = nnx.Linear(width, hidden, rngs=rngs)  # W2
        self.by_pattern = nnx.Linear(k * hidden, hidden, rngs=rngs)  # W3

        def drawn(*shape, scale=1.0):
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

        self.class_embedding = drawn(classes, hidden)
        self.concept_embedding = drawn(2, k, hidden)
        small = hidden**-0.5
        self.class_out = drawn(hidden, scale=small)
        self.concept_out = drawn(k, hidden, scale=small)
        self.global_out = drawn(hidden, scale=small)
        # A bias of G is the same for all states: it moves no probability.

    def class_units(self) -> Float[Array, "m h"]:
        return _unit(self.class_embedding[...])

    def concept_units(self) -> Float[Array, "2 k h"]:
        return _unit(self.concept_embedding[...])

    def class_energy(
        self, hidden: Float[Array, "*b h"], u: Float[Array, "*b h"]
    ) -> Float[Array, "*b"]:
        return _gate(hidden, u) @ self.class_out[...]

    def concept_energies(
        self, hidden: Float[Array, "*b h"], v: Float[Array, "*b k h"]
    ) -> Float[Array, "*b k"]:
        gated = _gate(hidden[..., None, :], v)
        return jnp.sum(gated * self.concept_out[...], -1)

    def global_energy(
        self, v: Float[Array, "*b k h"], u: Float[Array, "*b h"]
    ) -> Float[Array, "*b"]:
        hidden = self.by_pattern(v.reshape(*v.shape[:-2], -1))
        return _gate(hidden, u) @ self.global_out[...]

    def parts(self, x: Float[Array, "*b d"], drop=None):
        """E_class [*b, m] and E_k [*b, k, 2]; drop: scales of W1 x and W2 x."""
        x = x.astype(jnp.float32)
        one, two = self.by_class(x), self.by_concept(x)
        if drop is not None:
            one, two = one * drop[0], two * drop[1]
        v = jnp.moveaxis(self.concept_units(), 0, -3)
        classes = self.class_energy(one[..., None, :], self.class_units())
        concepts = self.concept_energies(two[..., None, :], v)
        return classes, jnp.moveaxis(concepts, -2, -1)

    def global_energies(self, concepts: Float[Array, "*b k"]) -> Float[Array, "*b m"]:
        """E_global of given concepts in [0, 1] with each class."""
        v = queries.mix(self.concept_embedding[...], concepts)
        return self.global_energy(v[..., None, :, :], self.class_units())

    def joint_energy(self, x: Float[Array, "*b d"]) -> Float[Array, "*b patterns m"]:
        """E of every pattern, in the order of `queries.patterns`, with every class."""
        return self.assemble(*self.parts(x))

    def assemble(self, classes, concepts) -> Float[Array, "*b patterns m"]:
        every = queries.patterns(len(self.names))
        a, b, g = self.weights
        sums = jnp.einsum(
            "...ki,pki->...p", concepts, np.eye(2, dtype=np.float32)[every]
        )
        together = self.global_energies(jnp.asarray(every, jnp.float32))
        return a * classes[..., None, :] + b * sums[..., None] + g * together

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        """Marginals given x and the concepts set; what is set moves the others too.

        "map": the concepts are those of the likeliest pattern, 0 or 1. By gradient:
        the relaxed optimum of all concepts and the class together.
        """
        if self.inference == "gradient":
            found = queries.infer(self, x, truth, mask, restarts=self.restarts)
            return Prediction(
                found.concepts, jnp.log(jnp.maximum(found.classes, 1e-30)), found.odds
            )
        free = queries.log_joint(self, x)
        odds = contract.log_odds(queries.marginals(free)[0])
        table = queries.clamp(free, truth, mask)
        concepts, classes = queries.marginals(table)
        if self.inference == "map":
            concepts = queries.likeliest(table)
        return Prediction(contract.intervene(concepts, truth, mask), classes, odds)


def losses(*, joint: bool = False, dropout: float = 0.2, flip: float = 0.2):
    """The paper's three cross-entropies in nats (Eq. 2, 5, 8), for `fit`.

    dropout: of the numbers of W1 x and W2 x. flip: in this share of the rows, this
        share of the concepts is turned over before E_global, each row its own, so that
        it bears wrong concepts (Appendix B).
    joint: also -log p(c, y | x) with the model's own weights, exact.
    "global" and "joint" learn from rows whose every concept is known.
    """
    for name, value in {"dropout": dropout, "flip": flip}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {value}, but must be in [0, 1)")

    def named(model: EnergyBottleneck, x, labels: Labels, key) -> dict[str, Array]:
        keys = jax.random.split(key, 3)
        whole = contract.whole(labels)
        truth = jnp.where(whole[..., None], labels.concepts, 0.0)
        shape = (2, *x.shape[:-1], model.class_out.shape[0])
        kept = jax.random.bernoulli(keys[0], 1 - dropout, shape) / (1 - dropout)
        classes, concepts = model.parts(x, kept)
        rows = jax.random.bernoulli(keys[1], flip, truth.shape[:-1])[..., None]
        turned = rows & jax.random.bernoulli(keys[2], flip, truth.shape)
        together = model.global_energies(jnp.where(turned, 1 - truth, truth))
        said = {
            "classes": contract.class_loss(-classes, labels),
            "concepts": contract.concept_loss(
                concepts[..., 0] - concepts[..., 1], labels
            ),
            "global": contract.class_loss(-together, labels, whole),
        }
        if joint:
            states = -model.assemble(classes, concepts)
            states = states.reshape(*states.shape[:-2], -1)
            k, m = len(model.names), classes.shape[-1]
            place = (truth @ 2.0 ** jnp.arange(k - 1, -1, -1)).astype(jnp.int32)
            state = jnp.where(whole, place * m + labels.classes, 0)
            nats = optax.softmax_cross_entropy_with_integer_labels(states, state)
            said["joint"] = contract.mean(nats, whole)
        return said

    return named


def _gate(a, b):
    return jax.nn.relu(a + a * b)


def _unit(v):
    return v * jax.lax.rsqrt(jnp.sum(v**2, -1, keepdims=True) + 1e-12)
