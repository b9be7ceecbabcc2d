"""GPT-2 and Llama in the names and layouts of Hugging Face, as lists of patterns.

Our arrays are cut into theirs in levels, each a layout map: blocks are unrolled, heads
merged with their width, kernels turned from [in, out] to [out, in] (Llama) or the
projections fused (GPT-2, which keeps [in, out]), and, where several tensor-parallel
ranks wrote it, each array cut over these. Reading climbs the same levels.

Ours are named as in `models/transformer.py`, without the "params/" in front.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .layout import LayoutMap, Shape, cut_one, union_one
from .patterns import Pattern, arrange

Read = Callable[[str], np.ndarray]  # an array by its name


class Family(NamedTuple):
    levels: Callable[[int], list[list[Pattern]]]  # of tensor-parallel ranks
    names: dict[str, str]  # ours -> theirs, outside the blocks
    blocks: str  # what they call the blocks
    block: dict[str, str]  # ours -> theirs, inside a block
    ignored: str  # buffers that their files may hold; an expression of whole names


class Exchange(NamedTuple):
    """The way between our arrays and theirs, for given shapes."""

    levels: list[LayoutMap]
    ours: dict[str, Shape]
    theirs: dict[str, Shape]

    def to_theirs(self, name: str, ours: Read) -> np.ndarray:
        """One of their arrays; `ours` gives the arrays that it holds elements of."""
        for level in self.levels[:-1]:
            ours = functools.partial(_cut, level, ours)
        return cut_one(name, ours, self.levels[-1])

    def to_ours(self, name: str, theirs: Read) -> np.ndarray:
        """One of our arrays; `theirs` gives the arrays that hold elements of it."""
        for level in reversed(self.levels[1:]):
            theirs = functools.partial(_union, level, theirs)
        return union_one(name, theirs, self.levels[0])


def exchange(
    architecture: str,
    ours: Mapping[str, Shape],
    found: Mapping[str, Shape] | None = None,
    *,
    ranks: int = 1,
    source: str = "",
) -> Exchange:
    """The levels between our arrays of these shapes and theirs.

    architecture: as in their config.json.
    found: the arrays of `source` by name, which must be theirs, all of them and in
        shape; buffers may lie beside them. With several `ranks` of tensor parallelism
        a name ends in /rank, and their shapes say how each array is cut or copied.

    Raises ValueError that names the architecture, or the arrays that do not fit.
    """
    family = family_of(architecture)
    first = {name: tuple(shape) for name, shape in ours.items()}
    shapes, levels = first, []
    for patterns in family.levels(_fused(ranks, found)):
        # A tied model has no head, a model without biases no bias.
        used = [p for p in patterns if any(re.fullmatch(p.names, n) for n in shapes)]
        levels.append(arrange(shapes, used))
        shapes = levels[-1].stored
    names = {name: _theirs(name, family, architecture) for name in shapes}
    levels[-1] = _renamed(levels[-1], names)
    shapes = levels[-1].stored
    if found is not None and ranks > 1:
        levels.append(arrange(shapes, _over_ranks(shapes, found, ranks)))
        shapes = levels[-1].stored
    if found is not None:
        _check(shapes, found, family.ignored, source)
    return Exchange(levels, first, dict(shapes))


def family_of(architecture: str) -> Family:
    if architecture not in FAMILIES:
        raise ValueError(
            f"architecture: {architecture!r} is not known; there are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def whole_names(architecture: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors under the names of the whole model, where those of its trunk are given.

    Saved without its head, "transformer.wte.weight" is "wte.weight".
    """
    stem = family_of(architecture).blocks.split(".")[0] + "."
    if any(name.startswith(stem) for name in tensors):
        return dict(tensors)
    return {
        name if name.startswith("lm_head.") else stem + name: tensor
        for name, tensor in tensors.items()
    }


def repad(tensor: np.ndarray, shape: Shape) -> np.ndarray:
    """A vocabulary's array with zeros behind it, or without what is behind, as `shape`.

    ValueError unless the shapes differ in one axis at most.

    >>> repad(np.ones((3, 2)), (4, 2)).sum(1)
    array([2., 2., 2., 0.])
    """
    axis = _differing(tensor.shape, shape)
    if axis is None:
        return tensor
    small, large = sorted((tensor.shape, tuple(shape)))
    options = {"axis": axis, "multiple": large[axis]}
    layout = arrange({"x": small}, [Pattern("x", "padded", options)])
    move = cut_one if tensor.shape == small else union_one
    return move("x", lambda _: tensor, layout)


UNROLLED = Pattern("blocks/.*", "unrolled", {"at": "blocks"})
HEADS = [
    Pattern(r".*/attention/(?:query|key|value)/kernel", "merged", {"axis": 1}),
    Pattern(r".*/attention/(?:query|key|value)/bias", "merged", {"axis": 0}),
    Pattern(r".*/attention/out/kernel", "merged", {"axis": 0}),
]


def _gpt2_levels(ranks: int) -> list[list[Pattern]]:
    order = {"order": ["query", "key", "value"], "into": "c_attn", "ranks": ranks}
    parts = "(.*/attention)/(?:query|key|value)"
    fused = [
        Pattern(f"{parts}/(kernel)", "fused", {"axis": 1, **order}),
        Pattern(f"{parts}/(bias)", "fused", {"axis": 0, **order}),
        Pattern("head/kernel", "transposed", {"axes": [1, 0]}),
    ]
    return [[UNROLLED], HEADS, fused]


def _llama_levels(ranks: int) -> list[list[Pattern]]:
    turned = Pattern("(?:.*/)?kernel", "transposed", {"axes": [1, 0]})
    return [[UNROLLED], HEADS, [turned]]


FAMILIES = {
    "GPT2LMHeadModel": Family(
        _gpt2_levels,
        {
            "embed/embedding": "transformer.wte.weight",
            "position/embedding": "transformer.wpe.weight",
            "final_norm/scale": "transformer.ln_f.weight",
            "final_norm/bias": "transformer.ln_f.bias",
            "head/kernel": "lm_head.weight",
        },
        "transformer.h",
        {
            "attention_norm/scale": "ln_1.weight",
            "attention_norm/bias": "ln_1.bias",
            "attention/c_attn/kernel": "attn.c_attn.weight",
            "attention/c_attn/bias": "attn.c_attn.bias",
            "attention/out/kernel": "attn.c_proj.weight",
            "attention/out/bias": "attn.c_proj.bias",
            "mlp_norm/scale": "ln_2.weight",
            "mlp_norm/bias": "ln_2.bias",
            "mlp/up/kernel": "mlp.c_fc.weight",
            "mlp/up/bias": "mlp.c_fc.bias",
            "mlp/down/kernel": "mlp.c_proj.weight",
            "mlp/down/bias": "mlp.c_proj.bias",
        },
        r".*\.attn\.(?:masked_)?bias(?:/\d+)?",
    ),
    "LlamaForCausalLM": Family(
        _llama_levels,
        {
            "embed/embedding": "model.embed_tokens.weight",
            "final_norm/scale": "model.norm.weight",
            "head/kernel": "lm_head.weight",
        },
        "model.layers",
        {
            "attention_norm/scale": "input_layernorm.weight",
            "attention/query/kernel": "self_attn.q_proj.weight",
            "attention/key/kernel": "self_attn.k_proj.weight",
            "attention/value/kernel": "self_attn.v_proj.weight",
            "attention/out/kernel": "self_attn.o_proj.weight",
            "mlp_norm/scale": "post_attention_layernorm.weight",
            "mlp/gate/kernel": "mlp.gate_proj.weight",
            "mlp/up/kernel": "mlp.up_proj.weight",
            "mlp/down/kernel": "mlp.down_proj.weight",
        },
        r".*\.rotary_emb\.inv_freq(?:/\d+)?",
    ),
}


def _theirs(name: str, family: Family, architecture: str) -> str:
    if name in family.names:
        return family.names[name]
    block = re.fullmatch(r"blocks/(\d+)/(.*)", name)
    if block is None or block[2] not in family.block:
        raise ValueError(
            f"architecture: {architecture} has no counterpart of {name!r}, which this "
            "model has"
        )
    return f"{family.blocks}.{block[1]}.{family.block[block[2]]}"


def _fused(ranks: int, found: Mapping[str, Shape] | None) -> int:
    """Ranks that have a share each of a fused projection; 1 if each has the whole."""
    for name, shape in (found or {}).items():
        if name.endswith(".c_attn.bias/0"):
            rows = (found or {}).get(name.replace(".bias", ".weight"), (0, 0))[0]
            return 1 if tuple(shape) == (3 * rows,) else ranks
    return ranks


def _over_ranks(
    whole: Mapping[str, Shape], found: Mapping[str, Shape], ranks: int
) -> list[Pattern]:
    """How each array lies over the ranks: cut along the axis that is shorter, or equal
    copies of it."""
    patterns = []
    for name, shape in whole.items():
        have = [found.get(f"{name}/{rank}") for rank in range(ranks)]
        cut: list[Shape] = [tuple(h) for h in have if h is not None]
        if len(cut) < ranks:
            continue  # said by `_check`
        axis = _differing(cut[0], shape)
        options = {"ranks": ranks, "reduction": "replicate"}
        make = "copies"
        if axis is not None:
            make, options = "fragment", {"axis": axis, "widths": [c[axis] for c in cut]}
        patterns.append(Pattern(re.escape(name), make, options))
    return patterns


def _differing(a: Shape, b: Shape) -> int | None:
    axes = [i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
    if len(a) != len(b) or len(axes) > 1:
        raise ValueError(f"shape: {a} and {b} differ in more than one axis")
    return axes[0] if axes else None


def _check(wanted: Mapping[str, Shape], found: Mapping, ignored: str, source: str):
    missing = [name for name in wanted if name not in found]
    unknown = [n for n in found if n not in wanted and re.fullmatch(ignored, n) is None]
    other = [
        f"{name} (there {tuple(found[name])}, by the configuration {tuple(shape)})"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    said = [
        f"{len(names)} {what}: {', '.join(names[:4])}" + ", ..." * (len(names) > 4)
        for names, what in (
            (missing, "missing"),
            (unknown, "unknown"),
            (other, "with another shape"),
        )
        if names
    ]
    if said:
        raise ValueError(f"{source}: arrays do not fit; {'; '.join(said)}")


def _renamed(layout: LayoutMap, names: Mapping[str, str]) -> LayoutMap:
    return layout._replace(
        stored={names[name]: shape for name, shape in layout.stored.items()},
        pieces=tuple(p._replace(stored=names[p.stored]) for p in layout.pieces),
    )


def _cut(layout: LayoutMap, read: Read, name: str) -> np.ndarray:
    return cut_one(name, read, layout)


def _union(layout: LayoutMap, read: Read, name: str) -> np.ndarray:
    return union_one(name, read, layout)
