"""The table of trained concept models: name -> factory, losses for `fit`, weights.

A new model is one file beside this one and one line here; the same tests run over all.
The post-hoc model is not here: it is solved from a bank, not trained from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flax import nnx

from . import cbm, embedding, energy, probabilistic
from .contract import ConceptModel


class Method(NamedTuple):
    """make(width, names, classes, rngs=..., **options), and how `fit` trains it."""

    make: Callable[..., nnx.Module]
    losses: Callable
    weights: Mapping[str, float]


METHODS: dict[str, Method] = {
    **{
        regime: Method(cbm.ConceptBottleneck, cbm.losses(regime), cbm.WEIGHTS)
        for regime in cbm.REGIMES
    },
    "embedding": Method(
        embedding.ConceptEmbedding, embedding.losses(), embedding.WEIGHTS
    ),
    "probabilistic": Method(
        probabilistic.ProbabilisticBottleneck,
        probabilistic.losses(),
        probabilistic.WEIGHTS,
    ),
    "energy": Method(energy.EnergyBottleneck, energy.losses(), energy.WEIGHTS),
    "energy_joint": Method(
        energy.EnergyBottleneck, energy.losses(joint=True), energy.JOINT_WEIGHTS
    ),
}


def make_concept_model(
    name: str,
    width: int,
    names: Sequence[str],
    classes: int,
    *,
    rngs: nnx.Rngs,
    **options,
) -> ConceptModel:
    """An untrained model by its name in the table.

    >>> make_concept_model("joint", 8, ("wing",), 2, rngs=nnx.Rngs(0)).names
    ('wing',)
    """
    if name not in METHODS:
        raise ValueError(f"model: {name!r}, but allowed are {', '.join(METHODS)}")
    return METHODS[name].make(width, names, classes, rngs=rngs, **options)
