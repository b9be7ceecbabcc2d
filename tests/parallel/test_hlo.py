"""Forms of compiled text, most of them TPU's, that a CPU program never shows."""

import pytest
from jax.sharding import AbstractMesh
from narrows.parallel.wire import collectives, summary

NAMES = ("data", "seq", "tensor")
MESH = AbstractMesh((2, 2, 2), NAMES)


def entry(*lines, partitions=8):
    """A module around instructions, written as XLA writes them."""
    return "\n".join(
        [
            f"HloModule m, is_scheduled=true, num_partitions={partitions}",
            "%add (x: f32[], y: f32[]) -> f32[] {",
            "  %x = f32[] parameter(0)",
            "  %y = f32[] parameter(1)",
            "  ROOT %sum = f32[] add(%x, %y)",
            "}",
            "ENTRY %main (p: f32[32,8]) -> f32[32,8] {",
            "  %p = f32[32,8]{1,0:T(8,128)} parameter(0)",
            *lines,
            "}",
        ]
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{}", NAMES),
        ("{{0,1,2,3,4,5,6,7}}", NAMES),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{5,1},{0,4},{6,2},{7,3}}", ("data",)),
        ("{{0,7},{1,6},{2,5},{3,4}}", ("?",)),
        ("{{0,1},{2,3},{4,6},{5,7}}", ("?",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[8]", ("seq", "tensor")),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("seq",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "seq")),
        ("mesh['x'=8] {'x'}", NAMES),
        ("mesh['x'=2,'y'=4] {'x'}", ("data",)),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", ("seq",)),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", ("tensor",)),
        ("mesh['x'=8] {'x':(4)2,'x':(1)2}", ("data", "tensor")),
        ("mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(1,0,2)) {'x'}", ("seq",)),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", ("tensor",)),
    ],
)
def test_every_way_to_write_groups(groups, axes):
    line = (
        "  ROOT %r = f32[32,8]{1,0:T(8,128)} all-reduce(%p), channel_id=1, "
        f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    )
    (c,) = collectives(entry(line), MESH)
    assert (c.kind, c.axes, c.bytes) == ("all-reduce", axes, 32 * 8 * 4)


def test_asynchronous_pairs_count_once():
    """Start and done are one transfer, in each of the ways a start is written."""
    text = entry(
        "  %g = (f32[32,8]{1,0:T(8,128)}, f32[64,8]{1,0:T(8,128)S(1)}, /*index=2*/u32[]"
        "{:S(2)}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
        "  %h = f32[64,8]{1,0:T(8,128)S(1)} all-gather-done(%g)",
        "  %i = ((f32[64,8]{1,0}), f32[32,8]{1,0}) async-start(%h), calls=%scatter",
        "  %j = f32[32,8]{1,0} async-done(%i), calls=%scatter",
        "  %k = (f32[32,8]{1,0}, f32[32,8]{1,0}, u32[]) collective-permute-start("
        "f32[32,8]{1,0:T(8,128)} %j), source_target_pairs={{0,4},{4,0},{1,5}}",
        "  ROOT %l = f32[32,8]{1,0} collective-permute-done(%k)",
    ).replace(
        "ENTRY",
        "%scatter (q: f32[64,8]) -> f32[32,8] {\n"
        "  %q = f32[64,8]{1,0} parameter(0)\n"
        "  ROOT %s = f32[32,8]{1,0} reduce-scatter(%q), dimensions={0}, to_apply=%add,"
        " replica_groups={{0,1},{2,3},{4,5},{6,7}}\n}\nENTRY",
    )
    assert summary(collectives(text, MESH)) == {
        ("all-gather", ("tensor",)): (1, 1024, 1024),
        ("collective-permute", ("data",)): (1, 1024, 1024),
        ("reduce-scatter", ("tensor",)): (1, 2048, 1024),
    }


def test_fusions_of_tpu_text():
    """A gather repeated in fusions that advance it is one; a fused scatter is known."""
    fusion = (
        "%{name} (q: f32[32,8]) -> f32[64,8] {{\n"
        "  %q.{name} = f32[32,8]{{1,0:T(8,128)}} parameter(0)\n"
        "  ROOT %g.{name} = f32[64,8]{{1,0:T(8,128)}} all-gather(%q.{name}),"
        " channel_id=7, replica_groups=[4,2]<=[8], dimensions={{0}}\n}}\n"
    )
    scatter = (
        "%all-reduce-scatter.1 (q: f32[32,8]) -> f32[16,8] {\n"
        "  %q = f32[32,8]{1,0:T(8,128)} parameter(0)\n"
        "  %r = f32[32,8]{1,0:T(8,128)} all-reduce(%q), channel_id=3, to_apply=%add,"
        " replica_groups=[4,2]<=[8]\n"
        "  %zero = s32[] constant(0)\n"
        "  ROOT %d = f32[16,8]{1,0:T(8,128)} dynamic-slice(%r, %zero, %zero)\n}\n"
    )
    text = entry(
        "  %a = f32[64,8]{1,0} fusion(%p), kind=kCustom, calls=%begin",
        "  %b = f32[64,8]{1,0} fusion(%p), kind=kOutput, calls=%end",
        "  ROOT %c = f32[16,8]{1,0} fusion(%p), calls=%all-reduce-scatter.1",
    )
    parts = fusion.format(name="begin") + fusion.format(name="end") + scatter
    assert summary(collectives(text.replace("ENTRY", parts + "ENTRY"), MESH)) == {
        ("all-gather", ("tensor",)): (1, 1024, 1024),
        ("reduce-scatter", ("tensor",)): (1, 1024, 512),
    }


@pytest.mark.parametrize(
    ("first", "step", "exact"), [(0, 1, True), (2, 1, False), (0, 3, False)]
)
def test_counted_loops_of_tpu_text(first, step, exact):
    """No trip count is stated there: it is read off a plain counter, or flagged."""
    loop = (
        "%body (s: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {\n"
        "  %s = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) parameter(0)\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%s), index=0\n"
        "  %i.copy = s32[]{:T(128)S(6)} copy(%i)\n"
        f"  %by = s32[]{{:T(128)}} constant({step})\n"
        "  %next = s32[]{:T(128)} add(%i.copy, %by)\n"
        "  %v = f32[32,8]{1,0:T(8,128)} get-tuple-element(%s), index=1\n"
        "  %r = f32[32,8]{1,0:T(8,128)} all-reduce(%v), to_apply=%add,"
        " replica_groups=[4,2]<=[8]\n"
        "  ROOT %t = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) tuple(%next, %r)\n}\n"
        "%test (u: (s32[], f32[32,8])) -> pred[] {\n"
        "  %end = s32[]{:T(128)} constant(6)\n"
        "  %u = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) parameter(0)\n"
        "  %j = s32[]{:T(128)} get-tuple-element(%u), index=0\n"
        "  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT\n}\n"
    )
    text = entry(
        f"  %zero = s32[]{{:T(128)}} constant({first})",
        "  %start = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) tuple(%zero, %p)",
        "  ROOT %w = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) while(%start),"
        " condition=%test, body=%body",
    )
    (c,) = collectives(text.replace("ENTRY", loop + "ENTRY"), MESH)
    assert (c.count, c.exact) == ((6, True) if exact else (1, False))


def test_between_slices():
    """A program of one slice sends to its twin by the host: the outermost axis."""
    text = entry(
        "  %token = token[] after-all()",
        "  %s = (f32[32,8]{1,0:T(8,128)}, u32[], token[]) send(%p, %token),"
        " channel_id=2, is_host_transfer=true,"
        ' frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
        "  ROOT %d = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        partitions=4,
    )
    assert summary(collectives(text, MESH)) == {
        ("all-reduce", ("data",)): (1, 1024, 1024)
    }
