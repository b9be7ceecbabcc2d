"""Sharding rules: which mesh axes each dimension of each named array lies over.

A rule is a pattern over logical names (`blocks/attention/query/kernel`) and one entry
per dimension: a mesh axis, several, or None. Every array must match exactly one rule
and divide by its axes; anything else raises, so nothing is replicated in silence.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .state import rule_of


class Rule(NamedTuple):
    pattern: str  # regular expression, matched against the whole logical name
    axes: tuple | None  # one entry per dimension; None: the array is whole everywhere


WHOLE = None

# Blocks are stacked: their first dimension is depth, which lies over the stages. Widths
# lie over fsdp, heads and hidden units over tensor, so that a block needs one
# all-reduce over tensor per half.
TRANSFORMER = (
    Rule("embed/embedding", ("tensor", "fsdp")),
    Rule("position/embedding", (None, "fsdp")),
    Rule(
        "blocks/attention/(query|key|value)/kernel", ("stage", "fsdp", "tensor", None)
    ),
    Rule("blocks/attention/(query|key|value)/bias", ("stage", "tensor", None)),
    Rule("blocks/attention/out/kernel", ("stage", "tensor", None, "fsdp")),
    Rule("blocks/mlp/(up|gate)/kernel", ("stage", "fsdp", "tensor")),
    Rule("blocks/mlp/(up|gate)/bias", ("stage", "tensor")),
    Rule("blocks/mlp/down/kernel", ("stage", "tensor", "fsdp")),
    Rule("blocks/(attention/out|mlp/down)/bias", ("stage", None)),
    Rule("blocks/.*_norm/(scale|bias)", ("stage", None)),
    Rule("final_norm/(scale|bias)", WHOLE),
    Rule("head/kernel", ("fsdp", "tensor")),
    Rule("waist/.*", WHOLE),  # small beside a block, and its statistics are sums
)


def whole_over(rules: Sequence[Rule], axis: str) -> tuple[Rule, ...]:
    """The same rules with nothing over one axis: every device along it holds all."""

    def without(entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        left = tuple(name for name in names if name != axis)
        return left[0] if len(left) == 1 else left or None

    return tuple(
        rule
        if rule.axes is None
        else Rule(rule.pattern, tuple(map(without, rule.axes)))
        for rule in rules
    )


def worker_axis(mesh: Mesh) -> str:
    """Over what workers lie that exchange gradients themselves.

    That is data, or fsdp where data is one device; `follow` places their state there.
    """
    return "fsdp" if mesh.shape["data"] == 1 < mesh.shape["fsdp"] else "data"


def name_of(path) -> str:
    """The logical name of a leaf, `a/b/0`, whatever containers hold it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sharding_of(name: str, shape, rules: Sequence[Rule], mesh: Mesh) -> NamedSharding:
    """The sharding of one array by the one rule that matches its name.

    Raises ValueError with the name, shape, rule and axis sizes where no rule or several
    match, the rule has another number of dimensions, or a dimension does not divide.
    """
    found = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
    if len(found) != 1:
        said = ", ".join(repr(rule.pattern) for rule in found) or "none"
        raise ValueError(
            f"rules: {name} {tuple(shape)} must match exactly one rule, but matches "
            f"{said}"
        )
    axes = found[0].axes
    if axes is None:
        return NamedSharding(mesh, P())
    if len(axes) != len(shape):
        raise ValueError(
            f"rules: {name} has shape {tuple(shape)}, but its rule {found[0]} names "
            f"{len(axes)} dimensions"
        )
    for dimension, (size, entry) in enumerate(zip(shape, axes, strict=True)):
        names = (entry,) if isinstance(entry, str) else entry or ()
        ways = math.prod(mesh.shape[axis] for axis in names)
        if size % ways:
            said = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in names)
            raise ValueError(
                f"rules: dimension {dimension} of {name} {tuple(shape)} does not "
                f"divide over {said}; choose a depth, width, head count or vocabulary "
                f"that is a multiple of {ways}, or a smaller axis"
            )
    return NamedSharding(mesh, P(*axes))


def shardings(tree, mesh: Mesh, rules: Sequence[Rule] = TRANSFORMER):
    """The sharding of every leaf of a tree of arrays or shapes, by its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: sharding_of(name_of(path), x.shape, rules, mesh), tree
    )


def follow(tree, params, placed):
    """Shardings of optimizer state: a leaf goes with the parameter that ends its name.

    `placed` holds the shardings of `params`. Scalars are whole. Per-worker state has
    its first dimension over `worker_axis`, the others as its parameter's if it has one.
    Raises ValueError for any other array: its place must be stated, not guessed.
    """
    shapes = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(placed)
    known = {
        name_of(path): (x.shape, place)
        for (path, x), place in zip(shapes, places, strict=True)
    }
    whole = NamedSharding(places[0].mesh, P())
    workers = worker_axis(whole.mesh)

    def find(path, x):
        owned = rule_of(path) is not None
        wanted = x.shape[1:] if owned else x.shape
        parts = name_of(path).split("/")
        for start in range(len(parts) if wanted else 0):
            shape, place = known.get("/".join(parts[start:]), (None, None))
            if shape == wanted and place is not None:
                mine = P(workers, *place.spec)
                return NamedSharding(whole.mesh, mine) if owned else place
        if owned:
            return NamedSharding(whole.mesh, P(workers))
        if not x.shape:
            return whole
        raise ValueError(
            f"rules: optimizer state {name_of(path)} {x.shape} has the name and shape "
            "of no parameter, so its place on the mesh is unknown"
        )

    return jax.tree_util.tree_map_with_path(find, tree)


def check_every_axis_is_used(mesh: Mesh, placed, batch_axes: Sequence[str]) -> None:
    """Raise ValueError where a mesh axis of several devices shards nothing at all."""
    used = set(batch_axes)
    for sharding in jax.tree.leaves(placed):
        for entry in sharding.spec:
            used |= {entry} if isinstance(entry, str) else set(entry or ())
    idle = {axis: n for axis, n in mesh.shape.items() if n > 1 and axis not in used}
    if idle:
        said = ", ".join(f"{axis}={n}" for axis, n in idle.items())
        raise ValueError(
            f"mesh: nothing in this program lies over {said}, so those devices would "
            "all compute the same; use data, fsdp or tensor"
        )
