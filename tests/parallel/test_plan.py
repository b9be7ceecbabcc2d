"""Plans: closed forms by counting, a cost model by its limits, refusals by name."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.closed_forms import (
    gpt_flops,
    gpt_parameters,
    tensor_parallel_sent,
)
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.pipeline_simulator import simulate
from narrows.parallel.plan import DoesNotFit, check_state, devices_of, largest, refusal
from narrows.parallel.plan_cost import calibrate, memory, predict
from narrows.parallel.plan_machines import MACHINES, machine, rate, stride
from narrows.parallel.plan_model import Job, Sizes, refusals
from narrows.parallel.plan_search import (
    candidates,
    cost,
    layouts,
    rules_of_thumb,
    search,
)
from narrows.parallel.plan_traffic import compare, step_traffic
from narrows.parallel.schedules import make_schedule
from narrows.parallel.wire import Collective

GPT3 = Sizes(96, 12288, 96)
A100 = MACHINES["a100"]


@pytest.mark.parametrize(("l", "h", "a"), [(24, 2304, 24), (96, 12288, 96)])
def test_sizes_and_operations_are_the_papers(l, h, a):
    sizes = Sizes(l, h, a)
    assert sizes.parameters == pytest.approx(gpt_parameters(l, h, 51200, 2048) + 2 * h)
    found = sizes.step_flops(8, recomputed=True)
    assert found == pytest.approx(gpt_flops(8, 2048, l, h, 51200))


def test_traffic_is_the_sum_of_the_papers_forms():
    sizes = Sizes(8, 64, 8, vocabulary=512, positions=32)
    job = Job(batch=16, microbatches=4, recomputed=False)
    layout = Layout(stage=2, data=2, tensor=4)
    sent = step_traffic(sizes, layout, job)
    b = 16 // 2 // 4
    layer = 2 * tensor_parallel_sent(b, 32, 64, 4)  # bytes: two a number
    ends = 2 * Fraction(3, 4) * (2 * 2 * b * 32 * 64 + 3 * 4 * b * 32) * 4 / 2
    assert sent["tensor"] == 4 * 4 * layer + ends  # 4 microbatches of 4 layers
    tables = 2 * 3 / 4 * 4 * sizes.table_parameters / 4  # over both stages and data
    assert sent["stage"] == 2 * 4 * 2 * b * 32 * 64 + tables
    assert sent["data"] == 4 * 8 * sizes.layer_parameters / 2 / 4
    assert set(sent) == {"tensor", "stage", "data"}
    # over fsdp: two gathers in two bytes, a scatter in four
    over = step_traffic(sizes, Layout(fsdp=8), dataclasses.replace(job, microbatches=1))
    assert over == {"fsdp": 7 / 8 * 8 * sizes.parameters}
    # a ring: keys and values there and back, their sums in float32
    ring = step_traffic(sizes, Layout(seq=4), dataclasses.replace(job, microbatches=1))
    chunk = 16 * 32 / 4 * 64
    gradient = 2 * 3 / 4 * 4 * sizes.parameters
    assert ring == {"seq": 8 * 3 * chunk * (4 * 2 + 2 * 4) + gradient}


def test_compiled_bytes_stand_beside_the_closed_form():
    """What spans two axes counts under the outer one."""

    def row(axes, sent):
        return Collective(
            "all-reduce", axes, 2, "float32", ((1,),), 3, True, 4, sent, ""
        )

    found = compare(
        [row(("data", "fsdp"), 10.0), row(("tensor",), 4.0)], {"data": 15.0, "seq": 1.0}
    )
    assert found["data"].ratio == 2
    assert found["tensor"].ratio == float("inf")
    assert found["seq"].ratio == 0


def test_rates_follow_the_links():
    """Rings within a server are fast; those that leave it share its adapters."""
    layout = Layout(stage=2, data=4, tensor=8)
    assert [stride(layout, axis) for axis in ("tensor", "data", "stage")] == [1, 8, 32]
    assert rate(A100, layout, "tensor") == 300e9
    assert rate(A100, layout, "data") == 25e9
    assert rate(A100, Layout(data=64), "data") == 8 * 25e9
    assert rate(A100, Layout(data=8, tensor=4), "data") == 2 * 25e9
    die = MACHINES["mi250x"]
    pairs = [rate(die, Layout(tensor=t), "tensor") / 1e9 for t in (2, 8, 16)]
    assert pairs == [200, 100, 100]  # eight dies leave with eight shares of adapters
    with pytest.raises(ValueError, match=r"machine: 'v9'.*a100, mi250x"):
        machine("v9")


def test_the_bubble_is_the_simulators():
    for p, m, v in ((4, 8, 1), (8, 16, 2), (4, 12, 4)):
        job = Job(batch=m, microbatches=m, chunks=v, head_on_last=True)
        plan = predict(GPT3, Layout(stage=p), job, A100)
        work = plan.seconds - plan.parts["bubble"] - plan.parts["update"]
        name = "interleaved" if v > 1 else "one_f_one_b"
        chunk = {"forward": Fraction(1, v), "backward": Fraction(2, v)}
        line = simulate(make_schedule(name, p, m, v), **chunk)
        assert plan.parts["bubble"] / work == pytest.approx(float(line.bubble))


def test_a_plan_keeps_to_its_limits():
    """Never above the share of products, better with more microbatches, worse with
    more stages, and all its seconds are spent on something."""
    job = Job(batch=512, microbatches=64, head_on_last=True)
    plan = predict(GPT3, Layout(stage=8, data=8, tensor=8), job, A100)
    assert plan.seconds == pytest.approx(sum(plan.parts.values()))
    assert plan.utilisation < plan.hardware < A100.matmul
    assert plan.bottleneck == "products"
    few = predict(
        GPT3,
        Layout(stage=8, data=8, tensor=8),
        dataclasses.replace(job, batch=128, microbatches=16),
        A100,
    )
    assert few.hardware < plan.hardware
    # operations on every device, at the machine's best, are the least time
    perfect = GPT3.step_flops(512, recomputed=True) / 512 / A100.peak
    assert plan.seconds > perfect


def test_one_number_can_be_set_by_a_measurement():
    job, layout = Job(batch=64, microbatches=8), Layout(data=8, tensor=8)

    def share(chip):
        return predict(GPT3, layout, job, chip).hardware

    assert share(calibrate(A100, share, 0.4)) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"wanted: 0\.99, but.*whole peak of a100"):
        calibrate(A100, share, 0.99)


def test_memory_shrinks_where_it_is_cut():
    job = Job(batch=64, microbatches=1)
    one = memory(GPT3, Layout(data=64), job)
    assert sum(one.values()) > 16 * GPT3.parameters
    over = memory(GPT3, Layout(fsdp=64), job)
    for name in ("parameters and gradients", "moments"):
        assert over[name] == pytest.approx(one[name] / 64)
    zero = memory(GPT3, Layout(data=64), dataclasses.replace(job, shard_moments=True))
    assert zero["moments"] == pytest.approx(one["moments"] / 64)
    # 1F1B keeps as many microbatches as stages, GPipe all
    piped = Job(batch=64, microbatches=64, schedule="gpipe")
    deep = Layout(stage=8)
    all_of_them = memory(GPT3, deep, piped)["activations"]
    in_flight = memory(GPT3, deep, dataclasses.replace(piped, schedule="one_f_one_b"))
    assert in_flight["activations"] < all_of_them / 4


def test_what_does_not_divide_says_what_is_near():
    sizes = Sizes(10, 96, 6, vocabulary=100)
    found = refusals(
        sizes, Layout(stage=4, data=3, tensor=4), Job(batch=10, microbatches=2)
    )
    assert "layers: 10 do not divide over stage=4 x chunks=1; nearest that fits: 8" in (
        found
    )
    assert any(
        text.startswith("heads: 6 do not divide over tensor=4") for text in found
    )
    assert any(text.startswith("batch: 10") for text in found)
    assert any("microbatches: 2 do not divide over stage=4" in text for text in found)


def test_a_search_finds_the_best_of_all_and_keeps_failures():
    job = Job(batch=256)
    options = {"axes": ("stage", "data", "tensor"), "rows": (1, 2)}
    found = search(GPT3, 64, job, A100, **options)
    each = [cost(GPT3, *pair, A100) for pair in candidates(GPT3, 64, job, **options)]
    assert len(found) == len(each)
    assert found[0].seconds == min(c.seconds for c in each)
    failed = [c for c in found if c.refused]
    assert failed
    assert all(c.seconds == float("inf") for c in failed)
    assert all("GB" in c.refused or "divide" in c.refused for c in failed)
    thumb = rules_of_thumb(GPT3, 64, job, A100, rows=(1, 2))
    assert thumb is not None
    assert thumb.layout.tensor == 8  # a server's
    assert thumb.seconds >= found[0].seconds
    assert len(set(layouts(8))) == len(list(layouts(8)))
    assert all(layout.size == 8 for layout in layouts(8))


def test_a_state_too_large_names_its_largest():
    mesh = make_mesh(Layout(fsdp=8))
    place = NamedSharding(mesh, P("fsdp"))
    state = {
        "small": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place),
        "large": jax.ShapeDtypeStruct((800, 8), jnp.float32, sharding=place),
    }
    assert largest(state, 1) == [("large", (100, 8), 3200)]
    check_state(state, 4000.0)
    with pytest.raises(DoesNotFit, match=r"largest: large \[100, 8\].*small \[1, 8\]"):
        check_state(state, 3000.0)


def test_a_compilers_refusal_is_read():
    text = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.
  Used 40.10G of 15.75G hbm. Exceeded.
  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(fused)/dot_general"
     Shape: f32[1024,2048,2048]{2,1,0:T(8,128)}
     Unpadded size: 16.00G
     ==========================

  2. Size: 8.00G
     Shape: bf16[1024,2048,2048]{2,1,0:T(8,128)(2,1)}
     ==========================
"""
    said = refusal(text)
    assert "takes 40.10G of 15.75G" in said
    assert "f32[1024,2048,2048] 16.00G (jit(fused)/dot_general)" in said
    assert "bf16[1024,2048,2048] 8.00G (unnamed)" in said


@pytest.mark.parametrize(
    ("name", "said"), [("v5p", "cannot read"), ("cpu:900", "8 CPU"), ("cpu:x", "read")]
)
def test_an_unknown_topology_raises(name, said):
    with pytest.raises(ValueError, match=said):
        devices_of(name)
