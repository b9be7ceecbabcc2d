"""Arrays of a step, read from Orbax's format or from that of the lazy engine.

A streamed step holds one zarr array for each leaf, `arrays/<name>`, of unsigned words,
without compression; a chunk lies inside one shard of the mesh that wrote it. Both are
TensorStore's. Any box of an array is read from the chunks that it meets.
"""

from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from .steps import NAME, STREAMED, first_line, unreadable


def orbax_context() -> ocp.Context:
    """Storage options, chosen by measurement on 100 MB in 80 leaves (2 busy cores).

    Compression took a fifth longer to save and gained 7 % on random floats; a file for
    each chunk (no OCDBT) saved a third faster, but as 278 files in place of 10, which
    a network file system pays for. Replicated arrays are cut among the replicas only
    where a piece has 4 MiB: each cut compiles a slice for each device, which made the
    first save of a state of 20 small leaves 6 s longer.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = True
    saving.use_compression = False
    saving.min_slice_bytes_for_replica_parallel = 2**22
    return context


def load(path: ocp.path.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """The named leaves of a step: as jax arrays where a shape has a sharding, or as
    numpy where it is an array of numpy. CheckpointError if they cannot be read."""
    if not shapes:
        return {}
    try:
        with jax.transfer_guard("allow"):
            if (path / STREAMED).exists():
                return _load_streamed(path, shapes)
            context = orbax_context()
            context.pytree.loading.partial_load = True
            with context:
                loaded: Any = ocp.load(path, shapes, checkpointable_name=NAME)
            return dict(loaded)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # no room on this machine: the checkpoint is not to blame
    except Exception as error:
        raise unreadable(path, first_line(error)) from error


def words(dtype: Any) -> np.dtype:
    """The unsigned integers in which elements of `dtype` are stored."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return np.dtype(np.uint32)
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def open_array(
    path: Any, name: str, *, shape=(), dtype=None, chunk=(), create: bool = False
) -> ts.Future:
    """The zarr array of a leaf; with `create` it may be made by any process."""
    store = {"driver": "file", "path": f"{path}/arrays/{name}/"}
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": store}
    if not create:
        return ts.open(spec, open=True)
    spec["metadata"] = {
        "shape": list(shape),
        "data_type": str(dtype),
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [max(1, n) for n in chunk]},
        },
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    return ts.open(spec, open=True, create=True)


def _load_streamed(path: ocp.path.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    opened = {name: open_array(path, name) for name in shapes}
    done = {}
    for name, wanted in shapes.items():
        array = opened[name].result()
        if isinstance(wanted, np.ndarray):
            done[name] = array.read().result().view(wanted.dtype)
        else:
            done[name] = _sharded(array, wanted)
    return done


def _sharded(array: ts.TensorStore, wanted: Any) -> jax.Array:
    """Every shard of a jax array, each box read once however many devices hold it."""
    shape, sharding, dtype = wanted.shape, wanted.sharding, wanted.dtype
    key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    impl: list[Any] = []
    if key:  # its data has one more dimension, which is never split

        def data(keys):
            impl.append(jax.random.key_impl(keys))
            return jax.random.key_data(keys)

        shape = jax.eval_shape(data, jax.ShapeDtypeStruct(shape, dtype)).shape
    places = sharding.addressable_devices_indices_map(shape)
    boxes = {
        str(index): array[tuple(index)].read()
        for index in places.values()
        if index is not None
    }
    kind = np.dtype(np.uint32) if key else np.dtype(dtype)

    def block(index):
        return boxes[str(index)].result().view(kind)

    made = jax.make_array_from_callback(shape, sharding, block)
    if key:
        made = jax.random.wrap_key_data(made, impl=impl[0])
    return made
