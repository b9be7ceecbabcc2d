"""Restore a step into any target: other meshes, layouts, names, numbers of workers.

What the target asks for is compared with what is stored, leaf by leaf, before an array
is read (`plan`). Leaves that are stored as they are wanted go straight to their shards;
others are read one group at a time and brought over by layout maps, so that no more
than a group is on the host at once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from .layout import LayoutMap, Piece, cut_one, union_one, whole_box
from .leaves import Record, differences, fingerprint, named, records
from .patterns import Arrangement, Pattern
from .steps import Header, read_header, step_path, unreadable
from .storage import load


class Line(NamedTuple):
    name: str  # of the target's leaf
    how: str  # "restored" as it is, "converted", or "initial": left as it was
    source: str  # the stored leaves it comes from, and what is done to them


class Restored(NamedTuple):
    state: Any
    meta: dict[str, Any]
    report: list[Line]  # a line for every leaf of the target


class Plan(NamedTuple):
    step: int
    path: ocp.path.Path
    header: Header
    have: LayoutMap
    want: LayoutMap
    target: dict[str, Any]  # leaves by name
    report: list[Line]
    straight: dict[str, str]  # target leaf -> stored leaf of the same elements


def summary(report: Sequence[Line]) -> str:
    """One sentence: how many leaves were restored, and which ones otherwise."""
    counts = {how: [line for line in report if line.how == how] for how in
              ("restored", "converted", "initial")}  # fmt: skip
    said = [f"{len(lines)} {how}" for how, lines in counts.items() if lines]
    first = [f"{line.name} {line.source}" for line in report if line.how != "restored"]
    more = ", ..." if len(first) > 3 else ""
    return ", ".join(said) + (f" ({', '.join(first[:3])}{more})" if first else "")


def plan(
    directory: Any,
    target: Any,
    *,
    step: int | None = None,
    expect: Mapping[str, Any] | None = None,
    layout: Arrangement | None = None,
    rename: Mapping[str, str] | None = None,
    initial: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Plan:
    """What `restore` with these arguments would do, leaf by leaf; reads no array.

    Raises as `restore` does.
    """
    step, path = step_path(directory, step)
    header = read_header(path)
    for key, value in (expect or {}).items():
        stored = header.meta.get(key)
        if key not in header.meta or stored != json.loads(json.dumps(value)):
            raise ValueError(
                f"expect[{key!r}] is {value!r}, but checkpoint {path} was saved "
                f"with {stored!r}: resume with that, or save to another directory"
            )
    leaves = named(target)
    for name, leaf in leaves.items():
        _check_target(name, leaf)
    left = _matching("initial", initial, leaves)
    for name in left:
        if not isinstance(leaves[name], jax.Array):
            raise ValueError(
                f"initial: {name!r} is to keep its value, but the target holds no "
                "array for it; give the freshly made one"
            )
    shapes = {n: tuple(x.shape) for n, x in leaves.items() if n not in left}
    stored = Arrangement({n: r.shape for n, r in header.leaves.items()}, ())
    if header.layout:
        logical = {n: tuple(s) for n, s in header.layout["logical"].items()}
        stored = Arrangement(
            logical, [Pattern(*pattern) for pattern in header.layout["patterns"]]
        )
    wanted = layout or Arrangement(shapes, ())
    new_names = _renames(rename or {}, stored.logical)
    stored, wanted = _over_workers(stored, wanted, new_names)
    have, want = _relabelled(stored.map(), new_names), wanted.check(shapes)
    dropped = _matching("ignore", ignore, have.logical)
    dropped |= {n for n in have.logical if n in left and n not in want.logical}
    unlike = differences(
        _types(have, header.leaves, dropped), _types(want, leaves, set())
    )
    if unlike:
        raise ValueError(
            f"checkpoint {path} does not fit the target; {unlike}: build the "
            "target from that run's model and optimizer, or pass another step"
        )
    report, straight = [], {}
    wanted_pieces, held_pieces = _by("stored", want), _by("logical", have)
    stored_pieces = _by("stored", have)
    for name in leaves:
        if name in left:
            report.append(Line(name, "initial", "left as given"))
            continue
        pieces = wanted_pieces[name]
        logical = dict.fromkeys(piece.logical for piece in pieces)
        sources = [piece for part in logical for piece in held_pieces[part]]
        origins = list(dict.fromkeys(piece.stored for piece in sources))
        same = want.stored[name] == have.stored.get(name) and all(
            have.reductions.get(part) == want.reductions.get(part) for part in logical
        )
        if same and set(pieces) == set(stored_pieces[name]):
            straight[name] = name  # both sides have one layout
        elif _as_it_is(pieces, want) and _as_it_is(sources, have):
            straight[name] = origins[0]
        if name in straight:
            line = Line(name, "restored", f"from {straight[name]}")
        else:
            line = Line(name, "converted", _said(origins, header, leaves[name]))
            _check_no_key(name, leaves[name])
        report.append(line)
    return Plan(step, path, header, have, want, leaves, report, straight)


def restore(directory: Any, target: Any, **options: Any) -> Restored:
    """The newest step (or `step`) in the shapes, dtypes and shardings of `target`.

    target: a tree of `jax.ShapeDtypeStruct` with shardings, or of arrays. The mesh, the
        layout and the number of workers that saved it play no part.
    expect: entries which the step's meta must equal.
    layout: how the target's leaves hold the logical ones, if not as they are. (How the
        stored ones do is in the checkpoint.)
    rename: {expression: replacement} for whole stored names, as in `re.sub`.
    initial: expressions for target leaves that keep the values they have there.
    ignore: expressions for stored leaves that the target need not have.

    Strict: every other leaf must be there on both sides, with equal shape and dtype;
    arrays that a per-worker rule names (see `state.py`) may be of another number of
    workers. Every stored leaf that is read is checked against its fingerprint. Raises
    ValueError for arguments that do not fit, CheckpointError for a step that is absent
    or broken; writes nothing.
    """
    made = plan(directory, target, **options)
    header, path = made.header, made.path
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in made.target.items()
    }
    asked = {source: shapes[name] for name, source in made.straight.items()}
    found = load(path, {n: s for n, s in asked.items() if n in header.stored})
    for name, shape in asked.items():
        if name not in found:  # no array without elements is stored
            found[name] = jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
        # Keys come back under an equivalent sharding of another spelling, which a
        # compiled step would take for a new one.
        found[name] = jax.device_put(found[name], shape.sharding)
    _check_bits(path, records(found), header)
    state = {name: found[source] for name, source in made.straight.items()}
    del found
    for line in made.report:
        if line.how == "initial":
            state[line.name] = made.target[line.name]
    rest = [line.name for line in made.report if line.how == "converted"]
    for group in _groups(rest, made):
        state |= _converted(group, made, shapes)
    leaves = [state[name] for name in made.target]
    tree = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return Restored(tree, header.meta, made.report)


def _converted(group: Sequence[str], made: Plan, shapes) -> dict[str, jax.Array]:
    """The target leaves of one group; the stored ones are read once and checked."""
    stored: dict[str, np.ndarray] = {}
    logical: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in stored:
            shape = made.have.stored[name]
            dtype = jnp.dtype(made.header.leaves[name].dtype)
            if name in made.header.stored:
                stored[name] = load(made.path, {name: np.empty(shape, dtype)})[name]
            else:
                stored[name] = np.zeros(shape, dtype)
            bits = int(jax.device_get(fingerprint(jnp.asarray(stored[name]))))
            found = Record(str(stored[name].dtype), tuple(shape), bits)
            _check_bits(made.path, {name: found}, made.header)
        return stored[name]

    def whole(name: str) -> np.ndarray:
        if name not in logical:
            logical[name] = union_one(name, read, made.have)
        return logical[name]

    done = {}
    with jax.transfer_guard("allow"):  # to restore is to transfer, knowingly
        for name in group:
            array = cut_one(name, whole, made.want)
            done[name] = jax.make_array_from_callback(
                shapes[name].shape, shapes[name].sharding, lambda i, a=array: a[i]
            )
            jax.block_until_ready(done[name])
    return done


def _groups(names: Sequence[str], made: Plan) -> list[list[str]]:
    """Target leaves that share stored leaves, directly or not, together."""
    to_logical: dict[str, set[str]] = {}
    for piece in made.want.pieces:
        to_logical.setdefault(piece.stored, set()).add(piece.logical)
    to_stored: dict[str, set[str]] = {}
    for piece in made.have.pieces:
        to_stored.setdefault(piece.logical, set()).add(piece.stored)
    groups: list[tuple[set[str], list[str]]] = []
    for name in names:
        sources = {s for logical in to_logical[name] for s in to_stored[logical]}
        sources |= {"/" + logical for logical in to_logical[name]}
        mine, members, apart = sources, [name], []
        for held, others in groups:
            if held & sources:
                mine, members = mine | held, others + members
            else:
                apart.append((held, others))
        groups = [*apart, (mine, members)]
    return [members for _, members in groups]


def _over_workers(
    stored: Arrangement, wanted: Arrangement, new_names: Mapping[str, str]
) -> tuple[Arrangement, Arrangement]:
    """Both, with patterns for per-worker leaves whose number of workers differs."""
    have, want = dict(stored.logical), dict(wanted.logical)
    more: tuple[list[Pattern], list[Pattern]] = [], []
    for name, old in stored.logical.items():
        target = new_names.get(name, name)
        new = wanted.logical.get(target, old)
        rule = next((p for p in reversed(target.split("/")) if p in PER_WORKER), None)
        if rule is None or old == new or not old or not new:
            continue
        if rule == "over_workers":
            size = min(int(np.prod(old)), int(np.prod(new)))
            have[name], want[target] = (size,), (size,)
            makes = [("recut", {"shape": old}), ("recut", {"shape": new})]
        else:
            have[name], want[target] = old[1:], new[1:]
            makes = [
                ("workers", {"workers": n[0], "reduction": PER_WORKER[rule]})
                for n in (old, new)
            ]
        for patterns, leaf, make in zip(more, (name, target), makes, strict=True):
            patterns.append(Pattern(re.escape(leaf), *make))
    return (
        Arrangement(have, [*stored.patterns, *more[0]]),
        Arrangement(want, [*wanted.patterns, *more[1]]),
    )


# Parts of a name that state what becomes of a leaf with a leading axis of workers.
PER_WORKER = {"per_worker_mean": "mean", "per_worker_sum": "sum", "over_workers": ""}


def _renames(rules: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, str]:
    new: dict[str, str] = {}
    for rule, replacement in rules.items():
        found = [n for n in names if n not in new and re.fullmatch(rule, n)]
        if not found:
            raise ValueError(f"rename: {rule!r} matches no stored leaf")
        new |= {name: re.sub(rule, replacement, name) for name in found}
    after = [new.get(name, name) for name in names]
    if twice := {name for name in after if after.count(name) > 1}:
        raise ValueError(f"rename: two stored leaves would be named {min(twice)!r}")
    return new


def _relabelled(layout: LayoutMap, new: Mapping[str, str]) -> LayoutMap:
    return LayoutMap(
        {new.get(name, name): shape for name, shape in layout.logical.items()},
        layout.stored,
        tuple(p._replace(logical=new.get(p.logical, p.logical)) for p in layout.pieces),
        {new.get(name, name): r for name, r in layout.reductions.items()},
    )


def _matching(what: str, rules: Sequence[str], names: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for rule in rules:
        some = {name for name in names if re.fullmatch(rule, name)}
        if not some:
            raise ValueError(f"{what}: {rule!r} matches no leaf")
        found |= some
    return found


def _types(layout: LayoutMap, leaves: Mapping[str, Any], without: set[str]):
    """Logical name -> dtype and shape, the dtype being that of its stored leaves."""
    dtypes = {p.logical: str(leaves[p.stored].dtype) for p in layout.pieces}
    return {
        name: Record(dtypes[name], shape, 0)
        for name, shape in layout.logical.items()
        if name not in without
    }


def _by(field: str, layout: LayoutMap) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        found.setdefault(getattr(piece, field), []).append(piece)
    return found


def _as_it_is(pieces: Sequence, layout: LayoutMap) -> bool:
    """Whether one piece is the whole of a logical array and of a stored one."""
    if len(pieces) != 1:
        return False
    (piece,) = pieces
    if piece.axes:
        return False
    shape = layout.logical[piece.logical]
    same = shape == layout.stored[piece.stored]
    return same and piece.box == piece.place == whole_box(shape)


def _said(origins: Sequence[str], header: Header, leaf: Any) -> str:
    some = ", ".join(origins[:2]) + (", ..." if len(origins) > 2 else "")
    return f"from {some} {header.leaves[origins[0]].shape} to {tuple(leaf.shape)}"


def _check_bits(path, found: Mapping[str, Record], header: Header) -> None:
    if wrong := [name for name in found if found[name] != header.leaves[name]]:
        raise unreadable(path, f"other bits than were saved in {', '.join(wrong[:8])}")


def _check_no_key(name: str, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"layout: {name!r} holds random keys, which no pattern may rearrange"
        )


def _check_target(name: str, leaf: Any) -> None:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise ValueError(
            f"target leaf {name!r} must say where to go, got {leaf!r} without a "
            "sharding: give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    try:
        sharding.shard_shape(tuple(leaf.shape))
    except ValueError as error:
        raise ValueError(
            f"target leaf {name!r} of shape {tuple(leaf.shape)} cannot be split as "
            f"{sharding} says: choose a spec that divides it, or P()"
        ) from error
