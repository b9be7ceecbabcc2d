"""Tensors out of the per-rank files of DeepSpeed, through layout maps.

A folder holds, for each tensor-parallel rank XX,

    mp_rank_XX_model_states.pt                        weights, as they are computed with
    zero_pp_rank_N_mp_rank_XX_optim_states.pt         float32 masters, cut over N ranks

ZeRO 1 and 2 concatenate the parameters of a group into one buffer and cut that; ZeRO 3
cuts each parameter. Both are maps of `flat` buffers; how the tensor-parallel ranks make
up a parameter is for the caller's patterns (`families.py`), and its names end in /rank.
"""

import functools
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from .layout import LayoutMap, Piece, Shape, check, join, ranges, sizes, union_one
from .patterns import flat
from .torch_files import read_torch, tensors
from .unpickle import Tensor


class PerRank(NamedTuple):
    tensors: dict[str, Tensor]  # by name, or name/rank with several
    ranks: int  # of tensor parallelism
    step: int


def read_deepspeed(path: Any, *, inert: Collection[str] = ()) -> PerRank:
    """The weights of a checkpoint folder, or of the one that its `latest` names.

    They are the float32 masters where ZeRO's files are there, else what the model was
    computed with. Raises ValueError for what `unpickle.loads` refuses, ranks that are
    missing, and buffers that do not hold the parameters that they should.
    """
    folder = _tagged(pathlib.Path(path))
    models = _ranks(folder, r"mp_rank_(\d+)_model_states\.pt") or _ranks(
        folder, r"zero_pp_rank_0_mp_rank_(\d+)_model_states\.pt"
    )
    if sorted(models) != list(range(len(models))) or not models:
        raise ValueError(
            f"path: {folder} holds the model states of ranks {sorted(models)}, but "
            "they must be mp_rank_00, mp_rank_01, ... without a gap"
        )
    merged: dict[str, Tensor] = {}
    steps = set()
    for rank, file in sorted(models.items()):
        model = read_torch(file, inert=inert)
        _expect(model, "module", file)
        steps.add(int(model.get("global_steps", 0)))
        expression = rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_0*{rank}_optim_states\.pt"
        parts = _ranks(folder, expression)
        found = dict(tensors(model["module"]))
        if parts:
            found |= _masters(model, parts, file, inert)
        suffix = f"/{rank}" if len(models) > 1 else ""
        merged |= {name + suffix: tensor for name, tensor in found.items()}
    if len(steps) > 1:
        raise ValueError(f"{folder}: its ranks are at different steps, {sorted(steps)}")
    return PerRank(merged, len(models), steps.pop())


def _masters(
    model: Mapping, parts: Mapping[int, pathlib.Path], file: pathlib.Path, inert
) -> dict[str, Tensor]:
    """The float32 parameters of one tensor-parallel rank, out of ZeRO's buffers."""
    _expect(model, "param_shapes", file)
    groups = model["param_shapes"]
    groups = [groups] if isinstance(groups, Mapping) else list(groups)
    shapes: list[dict[str, Shape]] = [
        {name: tuple(shape) for name, shape in group.items()} for group in groups
    ]
    if sorted(parts) != list(range(len(parts))):
        raise ValueError(
            f"{file.parent}: optimizer states of data ranks {sorted(parts)} are there, "
            "but a rank is missing"
        )
    buffers: dict[str, Tensor] = {}
    stages = set()
    for rank, part in parts.items():
        state = read_torch(part, inert=inert)
        _expect(state, "optimizer_state_dict", part)
        state = state["optimizer_state_dict"]
        stage = 3 if "fp32_flat_groups" in state else 2
        stages.add(stage)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        _expect(state, key, part)
        found = state[key]
        if not all(isinstance(t, Tensor) and len(t.shape) == 1 for t in found):
            raise ValueError(f"{part}: {key!r} is not a list of flat tensors")
        if stage == 3:
            buffers[f"0/{rank}"] = _joined(found)
        else:
            buffers |= {f"{i}/{rank}": tensor for i, tensor in enumerate(found)}
    if stages == {3}:
        layout = cut_one_by_one({n: s for g in shapes for n, s in g.items()}, parts)
    else:
        layout = join(
            _by_rank(flat(group, ranks=len(parts), into="zero", align=width), number)
            for number, group in enumerate(shapes)
            if (width := _width(buffers, number, group, len(parts), file))
        )
    for name, shape in layout.stored.items():
        held = buffers[name].shape if name in buffers else ()
        if len(held) != 1 or held[0] < shape[0]:
            raise ValueError(
                f"{file.parent}: buffer {name} of ZeRO has shape {held}, but its "
                f"parameters need {shape}"
            )

    def buffer(name: str) -> np.ndarray:
        return buffers[name].read()[: layout.stored[name][0]]

    dtype = next(iter(buffers.values())).dtype
    return {
        name: Tensor(shape, dtype, functools.partial(union_one, name, buffer, layout))
        for name, shape in layout.logical.items()
    }


def cut_one_by_one(parts: Mapping[str, Shape], ranks: Collection) -> LayoutMap:
    """ZeRO 3: each array cut over the ranks in equal shares, the last one padded."""
    count, at = len(ranks), 0
    pieces: list[Piece] = []
    for name, shape in parts.items():
        total = math.prod(shape)
        share = -(-total // count)
        for rank in range(count):
            end = at
            for box in ranges(shape, rank * share, min(total, (rank + 1) * share)):
                begin, end = end, end + math.prod(sizes(box))
                pieces.append(Piece(name, box, f"0/{rank}", ((begin, end),)))
        at += share
    stored = {f"0/{rank}": (at,) for rank in range(count)}
    return check(LayoutMap(dict(parts), stored, tuple(pieces), {}))


def _by_rank(layout: LayoutMap, group: int) -> LayoutMap:
    """A `flat` buffer [ranks, n] as one of [n] for each rank, group/rank."""
    ((ranks, width),) = layout.stored.values()
    pieces = tuple(
        p._replace(stored=f"{group}/{p.place[0][0]}", place=p.place[1:])
        for p in layout.pieces
    )
    stored: dict[str, Shape] = {f"{group}/{rank}": (width,) for rank in range(ranks)}
    return layout._replace(stored=stored, pieces=pieces)


def _width(buffers, number: int, group: Mapping, ranks: int, file) -> int:
    """Elements that each rank holds of a group; ValueError if they are not alike."""
    held = {
        buffers[name].shape[0] if name in buffers else 0
        for name in (f"{number}/{rank}" for rank in range(ranks))
    }
    total = sum(map(math.prod, group.values()))
    if len(held) != 1 or max(held) * ranks < total:
        raise ValueError(
            f"{file.parent}: group {number} has {total} elements, but its {ranks} "
            f"ranks hold {sorted(held)} each"
        )
    return held.pop()


def _joined(found: list[Tensor]) -> Tensor:
    if len(found) == 1:
        return found[0]
    return Tensor(
        (sum(tensor.shape[0] for tensor in found),),
        found[0].dtype,
        lambda: np.concatenate([tensor.read() for tensor in found]),
    )


def _tagged(folder: pathlib.Path) -> pathlib.Path:
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    name = latest.read_text().strip()
    if pathlib.PurePath(name).name != name or not (folder / name).is_dir():
        raise ValueError(f"path: {latest} names {name!r}, which is no folder beside it")
    return folder / name


def _ranks(folder: pathlib.Path, expression: str) -> dict[int, pathlib.Path]:
    found = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := re.fullmatch(expression, file.name):
            found[int(match[1])] = file
    return found


def _expect(state: Any, key: str, file: pathlib.Path) -> None:
    if not isinstance(state, Mapping) or key not in state:
        raise ValueError(f"{file}: it holds no {key!r}, as DeepSpeed's files do")
