"""Layouts: how many devices each mesh axis has, written `data=2,fsdp=2,tensor=2`.

A layout becomes a mesh (`make_mesh`). Models never see it: parameters are placed from
outside by `rules.py`; inside a model only `constrain` and `on_each_device` mention
axes, and both are the identity where there is no mesh (there `devices_along` is 1).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # the axes that share out a batch's rows
# Outside the pipeline, stages share out the rows too: embedding, head and loss.
ROWS = (*BATCH, "stage")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices per mesh axis, outermost (slowest link) first.

    stage: pipeline stages; data: replicas; fsdp: rows of the batch *and* shards of the
    parameters; expert; seq: positions; tensor: heads and hidden units.

    >>> Layout.parse("data=2,tensor=4").size
    8
    """

    stage: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis, size in dataclasses.asdict(self).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh: {axis}={size!r}, but sizes are integers >= 1")

    @classmethod
    def parse(cls, text: str, *, devices: int | None = None) -> "Layout":
        """Read `axis=size,...`; an empty text puts all `devices` on the data axis."""
        if not text.strip():
            return cls(data=devices or 1)
        names = [field.name for field in dataclasses.fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or axis not in names or not size.isdecimal():
                raise ValueError(
                    f"mesh: cannot read {part.strip()!r} in {text!r}; write axis=size "
                    f"with axes from {', '.join(names)}, as in data=2,tensor=4"
                )
            if axis in sizes:
                raise ValueError(f"mesh: axis {axis!r} stands twice in {text!r}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self).items()
        return ",".join(f"{axis}={n}" for axis, n in sizes if n > 1) or "data=1"

    @property
    def size(self) -> int:
        """The number of devices that the layout takes."""
        return math.prod(dataclasses.astuple(self))


def make_mesh(layout: Layout, devices: Sequence | None = None) -> Mesh:
    """A mesh with the layout's six axes, in its order, all of Auto type.

    Raises ValueError unless the layout takes exactly the devices there are: a smaller
    one would leave devices idle without a word.
    """
    devices = jax.devices() if devices is None else devices
    if layout.size != len(devices):
        raise ValueError(
            f"mesh: {layout} takes {layout.size} devices, but there are "
            f"{len(devices)}; choose sizes whose product is the number of devices"
        )
    sizes = dataclasses.asdict(layout)
    # An axis of 8 on a torus of 4 x 4 x 4 runs along one edge and half of another.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH))


def process_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """This process's rows of a batch, (index, count): [index, index + 1) rows / count.

    Processes whose devices hold the same rows (a tensor axis across processes) get the
    same share. Raises ValueError where the rows do not divide over the batch's axes.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    if rows % shards:
        raise ValueError(
            f"batch_size: {rows} rows do not divide over data x fsdp = {shards} "
            f"shards; take a multiple of {shards}"
        )
    mine = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    held = sorted({index[0].indices(rows)[:2] for index in mine if index})
    start, stop = held[0][0], held[-1][1]
    count = rows // (stop - start)
    if sum(b - a for a, b in held) != stop - start or start % (rows // count):
        raise ValueError(
            f"mesh: process {jax.process_index()} would hold scattered rows {held} of "
            "the batch; order the devices so that each process holds one range"
        )
    return start // (rows // count), count


def place_batch(batch, mesh: Mesh):
    """Make global arrays from each process's own rows (numpy in, jax.Array out)."""
    sharding = batch_sharding(mesh)

    def place(x):
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    # With several processes JAX counts this explicit transfer as an implicit one.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, batch)


def _automatic_axes() -> tuple[str, ...]:
    """Axes of the mesh in context that the partitioner still owns; () without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Auto)


def devices_along(axis: str) -> int:
    """Devices of an axis that is not bound yet by a `shard_map`; 1 without a mesh."""
    here = axis in _automatic_axes()
    return jax.sharding.get_abstract_mesh().shape[axis] if here else 1


def _spec(axes: Sequence, keep: Sequence[str]) -> P:
    """A PartitionSpec of the axes in `keep`; an entry is None, a name or several."""
    entries = []
    for entry in axes:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries.append(tuple(name for name in names if name in keep) or None)
    return P(*entries)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Ask that dimension i of `x` lie over axes[i]; the identity without a mesh."""
    keep = _automatic_axes()
    return jax.lax.with_sharding_constraint(x, _spec(axes, keep)) if keep else x


def on_each_device(function: Callable, *, in_axes: Sequence, out_axes) -> Callable:
    """Run `function` on every device's own block of its arguments, with no collective.

    in_axes holds one entry per argument (the axes of each dimension), out_axes one for
    the result. Without a mesh it is `function` itself. For code that the partitioner
    cannot split by itself: kernels, and loops over batch or heads.
    """
    keep = _automatic_axes()
    if not keep:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(_spec(axes, keep) for axes in in_axes),
        out_specs=_spec(out_axes, keep),
        axis_names=frozenset(keep),
        check_vma=False,  # the loops inside start from unvarying zeros
    )
