"""Layout maps move bits and lose none; each pattern is what a line of numpy says."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.parallel.checkpoint.layout import (
    LayoutMap,
    Piece,
    check,
    cut,
    flip,
    identity,
    join,
    union,
    whole_box,
)
from narrows.parallel.checkpoint.patterns import PATTERNS, Pattern, arrange

DTYPES = ("float32", "bfloat16", "int4", "bool", "complex64", "float8_e4m3fn", "int64")
Q, K, V = "blocks/attention/query/w", "blocks/attention/key/w", "blocks/attention/v/w"

# A model small enough for many examples: depth 4, 6 experts, 2 + 1 + 1 heads of width 2
SHAPES = {
    "embed": (5, 3),
    "norm": (4,),
    "step": (),
    Q: (4, 3, 4),
    K: (4, 3, 2),
    V: (4, 3, 2),
    "blocks/mlp/gate": (4, 3, 6),
    "blocks/mlp/up": (4, 3, 6),
    "experts/w": (6, 2, 3),
    "residual": (3, 2),
}
QKV = "(blocks/attention)/(?:query|key|v)/w"
GATED = {"axis": 2, "order": ["gate", "up"], "into": "gated"}
LAYOUTS: dict[str, list[Pattern]] = {
    "whole": [],
    "stages": [Pattern("blocks/.*", "pipelined", {"stages": 4})],
    "interleaved": [Pattern("blocks/.*", "pipelined", {"stages": 2, "repeats": 2})],
    "repeats first": [
        Pattern(
            "blocks/.*", "pipelined", {"stages": 2, "repeats": 2, "stage_first": False}
        )
    ],
    "unrolled": [Pattern("blocks/.*", "unrolled", {"at": "blocks"})],
    "gqa": [
        Pattern(
            QKV,
            "fused",
            {
                "axis": 2,
                "order": ["query", "key", "v"],
                "into": "qkv",
                "ranks": 3,
                "widths": {"query": [2, 1, 1], "key": [1, 1, 0], "v": [1, 1, 0]},
            },
        ),
        Pattern("(blocks/mlp)/(?:up|gate)", "fused", {**GATED, "ranks": 2}),
    ],
    "up before gate": [
        Pattern("(blocks/mlp)/.*", "fused", {**GATED, "order": ["up", "gate"]})
    ],
    "padded": [Pattern("embed", "padded", {"axis": 0, "multiple": 4})],
    "zero": [
        Pattern("(?!x)().*", "flat", {"ranks": 3, "into": "flat", "align": 4}),
    ],
    "experts": [
        Pattern("experts/w", "placed", {"axis": 0, "order": [5, 3, 1, 0, 2, 4, 3, 3]})
    ],
    "fragments": [
        Pattern("experts/w", "fragment", {"axis": 0, "ranks": 3}),
        Pattern("embed", "fragment", {"axis": 1, "widths": [1, 0, 2]}),
        Pattern("norm", "copies", {"ranks": 3, "reduction": "replicate"}),
    ],
    "6 workers": [
        Pattern("residual", "workers", {"workers": 6, "reduction": "mean"}),
        Pattern("norm", "copies", {"ranks": 3, "reduction": "mean"}),
    ],
    "4 workers": [
        Pattern("residual", "workers", {"workers": 4, "reduction": "sum"}),
        Pattern("norm", "recut", {"shape": [2, 3]}),
    ],
}
MAPS = {name: arrange(SHAPES, patterns) for name, patterns in LAYOUTS.items()}


def random_bits(shape, dtype, seed):
    """Any bit pattern there is: NaNs with payloads, negative zeros, subnormals."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(jnp.dtype(dtype))
    if dtype in (np.dtype("bool"), np.dtype(jnp.int4)):
        return rng.integers(0, 2, shape).astype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    raw[rng.random(shape) < 0.2] = 0
    return raw.reshape(-1).view(dtype).reshape(shape)


def random_arrays(shapes, dtype, seed):
    names = enumerate(shapes.items())
    return {name: random_bits(shape, dtype, [seed, i]) for i, (name, shape) in names}


def model(dtype, seed):
    return {
        n: random_bits(s, dtype, [seed, i]) for i, (n, s) in enumerate(SHAPES.items())
    }


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
        assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_to_every_other_and_back(dtype):
    """union(cut(x, A), A) == x, and cut(union(cut(x, A), A), B) == cut(x, B)."""
    x = model(dtype, 0)
    stored = {name: cut(x, layout) for name, layout in MAPS.items()}
    for name, layout in MAPS.items():
        assert_same_bits(union(stored[name], layout), x)
    for a, b in itertools.permutations(MAPS, 2):
        there = cut(union(stored[a], MAPS[a]), MAPS[b])
        assert_same_bits(there, stored[b])
        assert_same_bits(cut(union(there, MAPS[b]), MAPS[a]), stored[a])


sizes = st.integers(1, 4)


@st.composite
def arranged(draw):
    """Random shapes with a random pattern and options that fit them."""
    make = draw(st.sampled_from(sorted(PATTERNS)))
    shape = draw(st.lists(sizes, min_size=1, max_size=3).map(tuple))
    axis = draw(st.integers(0, len(shape) - 1))
    ranks = draw(sizes)
    reduction = draw(st.sampled_from(["replicate", "mean", "sum"]))
    parts, name, options = {"a/w": shape}, "a/w", {}
    if make == "copies":
        options = {"ranks": ranks, "reduction": reduction}
    elif make == "workers":
        options = {"workers": ranks, "reduction": reduction}
    elif make == "fragment":
        cuts = sorted(draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
        edges = [0, *cuts, shape[axis]]
        options = {
            "axis": axis,
            "widths": [b - a for a, b in itertools.pairwise(edges)],
        }
    elif make == "unrolled":
        options = {"at": "a"}
    elif make == "stacked":
        parts = {f"a/{i}/w": shape for i in range(ranks)}
        name, options = "(a)/[0-9]+/w", {"at": "a"}
    elif make == "pipelined":
        repeats = draw(sizes)
        parts = {"a/w": (ranks * repeats * shape[0], *shape[1:])}
        options = {
            "stages": ranks,
            "repeats": repeats,
            "stage_first": draw(st.booleans()),
        }
    elif make == "fused":
        widths = draw(st.lists(sizes, min_size=2, max_size=3))
        parts = {
            f"a/{i}/w": (*shape[:axis], width * ranks, *shape[axis + 1 :])
            for i, width in enumerate(widths)
        }
        order = draw(st.permutations([str(i) for i in range(len(widths))]))
        name = "(a)/[0-9]+/w"
        options = {"axis": axis, "order": order, "into": "all", "ranks": ranks}
    elif make == "padded":
        options = {"axis": axis, "multiple": draw(st.integers(1, 7))}
    elif make == "flat":
        parts = {"a/w": shape, "a/b": (ranks,), "a/s": ()}
        name = "(a)/.*"
        options = {"ranks": draw(sizes), "into": "flat", "align": draw(sizes)}
    elif make == "recut":
        size = math.prod(shape)
        parts = {"a/w": (draw(st.integers(1, size)),)}
        options = {"shape": list(shape)}
    elif make == "placed":
        again = draw(st.lists(st.integers(0, shape[axis] - 1), max_size=3))
        order = draw(st.permutations([*range(shape[axis]), *again]))
        options = {"axis": axis, "order": order}
    elif make == "merged":
        options = {"axis": axis, "count": draw(st.integers(1, len(shape) - axis))}
    elif make == "transposed":
        options = {"axes": draw(st.permutations(range(len(shape))))}
    return parts, Pattern(name, make, options)


FLIPPED = (
    "pipelined", "fused", "stacked", "unrolled", "fragment", "merged", "transposed"
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(arranged(), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_what_is_cut_comes_together_again(made, dtype, seed):
    """On random shapes; a map that went through JSON is the same map."""
    parts, pattern = made
    layout = arrange(parts, [pattern])
    again = json.loads(json.dumps(pattern))
    assert arrange(parts, [Pattern(*again)]) == layout
    x = random_arrays(parts, dtype, seed)
    stored = cut(x, layout)
    assert_same_bits(union(stored, layout), x)
    if pattern.make in FLIPPED:
        assert_same_bits(union(x, check(flip(layout))), stored)


def test_patterns_are_what_numpy_says():
    x = model("float32", 1)
    stored = {name: cut(x, layout) for name, layout in MAPS.items()}
    w = x[Q]
    np.testing.assert_array_equal(stored["stages"][Q][:, 0, 0], w)
    chunks = w.reshape(2, 2, 1, 3, 4)  # repeat, stage
    np.testing.assert_array_equal(stored["repeats first"][Q], chunks)
    np.testing.assert_array_equal(stored["interleaved"][Q], chunks.swapaxes(0, 1))
    np.testing.assert_array_equal(
        stored["unrolled"]["blocks/2/attention/query/w"], w[2]
    )
    q, k, v = np.split(w, [2, 3], 2), np.split(x[K], [1], 2), np.split(x[V], [1], 2)
    ranks = [q[0], k[0], v[0], q[1], k[1], v[1], q[2]]
    np.testing.assert_array_equal(
        stored["gqa"]["blocks/attention/qkv/w"], np.concatenate(ranks, 2)
    )
    gate, up = x["blocks/mlp/gate"], x["blocks/mlp/up"]
    by_rank = [gate[..., :3], up[..., :3], gate[..., 3:], up[..., 3:]]
    gated = "blocks/mlp/gated"
    np.testing.assert_array_equal(stored["gqa"][gated], np.concatenate(by_rank, 2))
    np.testing.assert_array_equal(
        stored["up before gate"][gated], np.concatenate([up, gate], 2)
    )
    np.testing.assert_array_equal(
        stored["padded"]["embed"], np.pad(x["embed"], ((0, 3), (0, 0)))
    )
    flat = np.concatenate([a.ravel() for a in x.values()])
    width = -(-flat.size // 12) * 4
    np.testing.assert_array_equal(
        stored["zero"]["flat"].ravel(), np.pad(flat, (0, 3 * width - flat.size))
    )
    order = [5, 3, 1, 0, 2, 4, 3, 3]
    np.testing.assert_array_equal(stored["experts"]["experts/w"], x["experts/w"][order])


def test_other_shapes_and_orders_are_what_numpy_says():
    x = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    for make, options, want in (
        ("merged", {"axis": 1}, x.reshape(2, 12)),
        ("merged", {"axis": 0}, x.reshape(6, 4)),
        ("merged", {"axis": 0, "count": 3}, x.ravel()),
        ("transposed", {"axes": [2, 0, 1]}, x.transpose(2, 0, 1)),
    ):
        layout = arrange({"w": x.shape}, [Pattern("w", make, options)])
        np.testing.assert_array_equal(cut({"w": x}, layout)["w"], want)
        assert_same_bits(union({"w": want}, layout), {"w": x})
    square = arrange({"w": (3, 3)}, [Pattern("w", "transposed", {"axes": [1, 0]})])
    y = x.ravel()[:9].reshape(3, 3)  # the one whose shape says nothing
    np.testing.assert_array_equal(cut({"w": y}, square)["w"], y.T)
    np.testing.assert_array_equal(union({"w": y.T}, square)["w"], y)
    turned = Piece("w", ((0, 2), (0, 3)), "w", ((0, 2), (0, 3)), (1, 0))
    with pytest.raises(ValueError, match=r"turns \(2, 3\) by axes \(1, 0\)"):
        check(LayoutMap({"w": (2, 3)}, {"w": (2, 3)}, (turned,), {}))


def test_means_and_sums():
    """In float64, rounded once; equal copies and a single summand keep their bits."""
    shape, rng = {"e": (50,)}, np.random.default_rng(0)
    parts = rng.normal(size=(3, 50)).astype(np.float32)
    parts[:, 0] = np.float32(0.1)
    for reduction, reduce in (("mean", np.mean), ("sum", np.sum)):
        options = {"workers": 3, "reduction": reduction}
        layout = arrange(shape, [Pattern("e", "workers", options)])
        got = union({"e": parts}, layout)["e"]
        want = reduce(parts.astype(np.float64), axis=0).astype(np.float32)
        np.testing.assert_array_equal(got, want)
        to = arrange(shape, [Pattern("e", "workers", options | {"workers": 5})])
        assert_same_bits(union(cut({"e": got}, to), to), {"e": got})


BAD_PATTERNS = {
    "two": ([("embed", "padded", {"axis": 0, "multiple": 2})] * 2, "'embed' matches"),
    "unused": ([("enbed", "padded", {"axis": 0, "multiple": 2})], "matches no array"),
    "unknown": ([("embed", "paded", {})], "no pattern is named 'paded'"),
    "uneven": ([("norm", "fragment", {"axis": 0, "ranks": 3})], "4 of 'norm' do not"),
    "widths": (
        [("norm", "fragment", {"axis": 0, "widths": [1, 2]})],
        "1 elements of",
    ),
    "stages": ([("blocks/.*", "pipelined", {"stages": 3})], "4 of 'blocks/.*do not"),
    "alone": ([(Q, "fused", {"axis": 2, "order": ["q"], "into": "a"})], "one part of"),
    "order": (
        [("(blocks/mlp)/.*", "fused", GATED | {"order": ["up", "down"]})],
        "down",
    ),
    "expert": ([("experts/w", "placed", {"axis": 0, "order": [0, 1]})], "6 experts"),
    "small": ([("norm", "recut", {"shape": [3]})], "'norm' of shape"),
    "axes": ([("embed", "transposed", {"axes": [1, 1]})], "do not order the 2 axes"),
    "few axes": ([("norm", "merged", {"axis": 0})], "has no 2 axes from"),
    "no part": (
        [("embed", "unrolled", {"at": "blocks"})],
        "no part of the name",
    ),
}


@pytest.mark.parametrize("kind", BAD_PATTERNS)
def test_a_wrong_pattern_is_named(kind):
    patterns, sentence = BAD_PATTERNS[kind]
    with pytest.raises(ValueError, match=sentence):
        arrange(SHAPES, [Pattern(*pattern) for pattern in patterns])


def test_a_wrong_map_is_named():
    good = identity({"a": (4,), "b": (2, 2)})
    assert check(good) == good
    with pytest.raises(ValueError, match=r"4 elements of 'a'.*fragment is missing"):
        check(good._replace(pieces=good.pieces[1:], stored={"b": (2, 2)}))
    with pytest.raises(ValueError, match="stored 'a' holds no piece"):
        check(good._replace(pieces=good.pieces[1:]))
    half = Piece("a", ((0, 2),), "a", ((2, 4),))
    with pytest.raises(ValueError, match="share elements of stored 'a'"):
        check(good._replace(pieces=(*good.pieces, half)))
    twice = LayoutMap({"a": (4,)}, {"x": (4,), "y": (2,)}, (
        Piece("a", whole_box((4,)), "x", whole_box((4,))),
        Piece("a", ((1, 3),), "y", ((0, 2),)),
    ), {})  # fmt: skip
    with pytest.raises(ValueError, match="'a' is held twice"):
        check(twice)
    with pytest.raises(ValueError, match="cut them alike"):
        check(twice._replace(reductions={"a": "mean"}))
    with pytest.raises(ValueError, match="has 4 elements and 2 in stored 'b'"):
        check(good._replace(pieces=(Piece("a", ((0, 4),), "b", ((0, 1), (0, 2))),)))
    with pytest.raises(ValueError, match="does not lie in logical 'a'"):
        check(good._replace(pieces=(Piece("a", ((0, 5),), "a", ((0, 5),)),)))
    with pytest.raises(ValueError, match="names stored 'c', not there"):
        check(good._replace(pieces=(Piece("a", ((0, 4),), "c", ((0, 4),)),)))
    with pytest.raises(ValueError, match="two maps hold the logical array 'a'"):
        join([good, good])


def test_wrong_arrays_are_named():
    copies = [Pattern("norm", "copies", {"ranks": 2, "reduction": "replicate"})]
    layout = arrange({"norm": (4,)}, copies)
    ones = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"copies of 'norm' differ by up to 1\b"):
        union({"norm/0": ones, "norm/1": ones * 2}, layout)
    with pytest.raises(ValueError, match=r"missing \['norm/1'\]"):
        union({"norm/0": ones}, layout)
    with pytest.raises(ValueError, match=r"'norm' has shape \(3,\)"):
        cut({"norm": ones[:3]}, layout)
    with pytest.raises(ValueError, match="'norm' mixes dtypes"):
        union({"norm/0": ones, "norm/1": ones.astype(np.float16)}, layout)
    with pytest.raises(ValueError, match="without copies can be turned"):
        flip(layout)
