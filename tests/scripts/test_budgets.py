"""Budgets of compiled kernels: what compilers say, and what is a regression."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from narrows.scripts.benchmarks import gpu_budgets, tpu_budgets

PTX = """
.visible .entry loop_fusion(
  cp.async.cg.shared.global [%r1], [%rd1], 16;
}
.visible .entry attention_forward_mosaic_gpu_kernel(
  cp.async.bulk.tensor.4d.shared::cluster.global [%r1];
  cp.async.bulk.commit_group;
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
}
.visible .entry attention_keys(
  mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
  cp.async.ca.shared.global [%r1], [%rd1], 8;
  cp.async.cg.shared.global [%r1], [%rd1], 16;
}
"""
PTXAS = """
ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
    0 bytes stack frame, 900 bytes spill stores, 900 bytes spill loads
ptxas info    : Used 32 registers
ptxas info    : Compiling entry function 'attention_forward_mosaic_gpu_kernel' for
    8 bytes stack frame, 72 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers
ptxas info    : Compiling entry function 'attention_keys' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 225 registers
"""
LINE, FULL, PART = 3, 10, 14


def schedule() -> str:
    """The text of a schedule: in a grid step, the start of a line and two bodies."""
    lines, address = [], 0

    def bundle(mark="", holds=""):
        nonlocal address
        lines.append(f"  {address:#x}   {mark} : {{ {holds} }}")
        address += 1

    bundle(holds="%9 = sbr.rel (%p0) target bundleno = 99")
    for size, work in ((LINE, ""), (FULL, "%1 = vmatmul.mubr"), (PART, " vmatmul")):
        bundle(holds="sbr.rel (%p1) target")
        for _ in range(size):
            bundle(holds=work)
        bundle(mark="PF", holds="%p = sbr.rel (!%p2) loop")
    bundle(mark="PF")
    return "\n".join(lines)


def test_kernels_are_read_from_ptx_and_the_assembler():
    found = dict(gpu_budgets.kernels(PTX, lambda: PTXAS))
    assert found == {
        "attention_forward": (168, 72, 2, 0, 0, 1),
        "attention_keys": (225, 0, 0, 1, 2, 0),
    }


def test_a_text_without_products_is_not_assembled():
    own = PTX[: PTX.index(".visible .entry attention_forward")]
    assert not list(gpu_budgets.kernels(own, lambda: pytest.fail("assembled")))


@pytest.mark.parametrize("field", gpu_budgets.LIMITS)
def test_a_planted_regression_of_a_gpu_kernel_is_named(field, tmp_path):
    path = tmp_path / "budgets.tsv"
    row = gpu_budgets.Found("a case", "attention_keys", 200, 0, 24, 0, 43, 7)
    gpu_budgets.write(path, [row])
    budgets = gpu_budgets.read(path)
    assert budgets == {("a case", "attention_keys"): row}
    sign = gpu_budgets.LIMITS[field]
    worse, better = (
        row._replace(**{field: getattr(row, field) + by}) for by in (sign, -sign)
    )
    assert not list(gpu_budgets.regressions([row], budgets, ["a case"]))
    assert not list(gpu_budgets.regressions([better], budgets, ["a case"]))
    (sentence,) = gpu_budgets.regressions([worse], budgets, ["a case"])
    limit = getattr(row, field)
    for part in ("a case", "attention_keys", field, f"{limit + sign}", f"{limit}"):
        assert part in sentence


def test_kernels_without_budget_and_kernels_gone_are_named():
    row = gpu_budgets.Found("a case", "new", 200, 0, 24, 0, 43, 7)
    budgets = {("a case", "old"): row._replace(kernel="old")}
    new, gone = gpu_budgets.regressions([row], budgets, ["a case"])
    assert "new has no budget" in new
    assert "old is gone" in gone
    assert not list(gpu_budgets.regressions([], budgets, ["another case"]))


def test_the_gpu_kernels_keep_their_budgets():
    """Compiled in a process of its own, which alone can take the compiler's flags."""
    try:
        gpu_budgets.find_toolkit()
    except ValueError as reason:
        pytest.skip(str(reason))
    case = "--case=hopper, bfloat16, 64"
    done = subprocess.run(
        [sys.executable, gpu_budgets.__file__, case],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_parts_of_a_tpu_kernel_are_read_from_its_schedule():
    found = tpu_budgets.bodies(schedule())
    assert (found.line, found.full, found.part) == (LINE, FULL, PART)
    last = schedule().count("\n")
    assert found.step == last - LINE - FULL - PART


def test_a_head_is_the_sum_over_its_tiles():
    """Of 4 x 4 tiles a causal head visits 6 full ones and 4 on the diagonal."""
    cost = tpu_budgets.Cost.of(tpu_budgets.Bodies(5, 7, 3, 2), 4, 100, 0)
    assert cost.head == 6 * 5 + 4 * (7 + 3) + 10 * 2


def test_units_of_a_tpu_are_summed_over_bundles():
    text = "|MXU |VSTORE:SPILL|SALU|\nUTILIZATION:\n 1, 0, 2\n 0, 3, 0\n 1, 4, 1\n"
    assert tpu_budgets.total(text, "VSTORE:SPILL") == 7


def test_fast_memory_is_read_for_each_kernel():
    line = (
        '%{} = custom-call(), custom_call_target="tpu_custom_call", backend_config='
        '{{"used_scoped_memory_configs":[{{"memory_space":"1","offset":"0","size":"{}"}}]}}'
    )
    names = dict(zip(tpu_budgets.KERNELS, (1024, 4096), strict=True))
    lines = [line.format(f"jvp_{name}.3", size) for name, size in names.items()]
    other = line.format("fusion.1", 7)
    assert tpu_budgets.scoped_memory("\n".join([other, *lines])) == names


@pytest.mark.parametrize("field", ["head", "vmem", "spills"])
def test_a_planted_regression_of_a_tpu_kernel_is_named(field, tmp_path):
    key = ("v5e", "forward", "128")
    cost = tpu_budgets.Cost(5, 7, 3, 2, 9000, 100, 4)
    tpu_budgets.write(tmp_path / "budgets.tsv", {key: cost})
    budgets = tpu_budgets.read(tmp_path / "budgets.tsv")
    assert budgets == {key: cost}
    assert not list(tpu_budgets.exceeded({key: cost}, budgets))
    worse = cost._replace(**{field: getattr(cost, field) + 1})
    (sentence,) = tpu_budgets.exceeded({key: worse}, budgets)
    assert sentence.startswith(f"v5e forward 128: {field} is ")
    (sentence,) = tpu_budgets.exceeded({key: cost}, {})
    assert "has no budget" in sentence


def test_fast_memory_read_is_what_a_kernel_asked_for():
    """Two kernels that differ by 8 MiB of scratch alone, compiled for a v6e."""
    pytest.importorskip("libtpu", reason="install the tpu extra to compile for TPUs")
    for name, value in tpu_budgets.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=tpu_budgets.TOPOLOGIES["v6e"]
    )
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=one)

    place = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=one)

    def body(place, x, out, scratch):  # what lies where is known when it runs
        scratch[pl.ds(8 * place[0], 8), :128] = x[...]
        out[...] = scratch[pl.ds(8 * place[1], 8), :128]

    def read(name, megabytes):
        run = pl.pallas_call(
            body,
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.VMEM((megabytes * 256, 1024), jnp.float32)],
            name=name,
        )
        text = jax.jit(run).lower(place, x).compile().as_text() or ""
        return tpu_budgets.scoped_memory(text)[name]

    small, large = (
        read(n, m) for n, m in zip(tpu_budgets.KERNELS, (2, 10), strict=True)
    )
    assert large - small == 8 * 2**20
    assert 2 * 2**20 <= small < 3 * 2**20
