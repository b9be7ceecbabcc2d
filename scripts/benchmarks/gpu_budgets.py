"""What the GPU kernels of attention compile to, on a machine without a GPU.

    python scripts/benchmarks/gpu_budgets.py
    python scripts/benchmarks/gpu_budgets.py --write

Compiles every case of `CASES`, forward and backward, for an H100 (sm_90a) and reads
from the PTX and from ptxas, for each kernel that multiplies matrices: registers of a
thread at its start, bytes spilled, and how many instructions multiply (wgmma, or
mma.sync) and copy to shared memory behind the work (cp.async, and the bulk copies of
the Hopper form). More registers or spills than in `results/gpu_budgets.tsv`, or fewer
wgmma or copies, are regressions, are named, and end the command with 1, as does a
kernel that has no budget or is gone and a case that does not compile. --write makes
what was found the budget. About 2 minutes on a CPU core. The packages, which a folder
on PYTHONPATH can hold:

    pip install --no-deps jax-cuda13-plugin==<version of jax> \
        jax-cuda13-pjrt==<version of jax> nvidia-cuda-nvcc nvidia-nvvm
"""

import csv
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.gpu import gpu
from narrows.models.kernels.attention.hopper import hopper
from narrows.scripts import command, results
from rich.console import Console
from rich.table import Table

BUDGETS = results.RESULTS / "gpu_budgets.tsv"
NEEDED = (
    "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} "
    "nvidia-cuda-nvcc nvidia-nvvm"
)
# An H100 as XLA would find it: what it needs to know to compile.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
  device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Case(NamedTuple):
    serve: Callable[..., Any]
    shape: tuple[int, int, int, int, int]  # b, t = s, n, k, h
    dtype: Any
    arrays: dict[str, tuple] = {}  # noqa: RUF012  Call field: shape and dtype
    static: dict[str, Any] = {}  # noqa: RUF012  Spec field: value


class Found(NamedTuple):
    case: str
    kernel: str
    registers: int  # of a thread, at most 255
    spilled: int  # bytes that a thread stores for want of registers
    wgmma: int  # instructions in the text, not executions
    mma: int
    copies: int  # cp.async
    bulk: int  # cp.async.bulk, loads and stores


bfloat16, float32 = jnp.bfloat16, jnp.float32
# What the budgets hold: the published shapes, shared heads, and everything at once.
CASES = {
    "gpu, bfloat16, 64": Case(gpu, (4, 4096, 32, 32, 64), bfloat16),
    "gpu, bfloat16, 128": Case(gpu, (4, 4096, 16, 16, 128), bfloat16),
    "gpu, bfloat16, 256": Case(gpu, (4, 4096, 8, 8, 256), bfloat16),
    "gpu, bfloat16, 128, shared": Case(gpu, (2, 4096, 32, 8, 128), bfloat16),
    "gpu, bfloat16, 96, odd": Case(gpu, (4, 4000, 16, 16, 96), bfloat16),
    "gpu, bfloat16, 128, all": Case(
        gpu,
        (2, 2048, 16, 4, 128),
        bfloat16,
        {
            "segments": (((2, 2048), jnp.int32),) * 2,
            "mask": ((2, 1, 2048, 2048), jnp.bool_),
            "bias": ((1, 16, 2048, 2048), bfloat16),
            "sinks": ((16,), float32),
            "dropout_key": ((2,), jnp.uint32),
        },
        {"soft_cap": 30.0, "dropout_rate": 0.1},
    ),
    "gpu, float32, 64": Case(gpu, (4, 4096, 32, 32, 64), float32),
    "gpu, float32, 128": Case(gpu, (4, 4096, 16, 16, 128), float32),
    "hopper, bfloat16, 64": Case(hopper, (4, 4096, 32, 32, 64), bfloat16),
    "hopper, bfloat16, 128": Case(hopper, (4, 4096, 16, 16, 128), bfloat16),
    "hopper, bfloat16, 128, shared": Case(hopper, (2, 4096, 32, 8, 128), bfloat16),
    "hopper, bfloat16, 128, all": Case(
        hopper,
        (2, 2048, 16, 4, 128),
        bfloat16,
        {"segments": (((2, 2048), jnp.int32),) * 2, "sinks": ((16,), float32)},
        {"soft_cap": 30.0},
    ),
}


# A figure that may not grow, and one that may not shrink.
LIMITS = {"registers": 1, "spilled": 1, "wgmma": -1, "copies": -1, "bulk": -1}


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_bool("write", False, "make the figures the budgets", flag_values=f)
    flags.DEFINE_multi_enum("case", [], list(CASES), "only these", flag_values=f)
    command.parse(f, argv, __doc__)
    width = None if sys.stdout.isatty() else 110
    console = Console(highlight=False, width=width)
    cases = f.case or list(CASES)
    budgets = read(BUDGETS)
    with command.bad_input():
        toolkit = find_toolkit()
    with tempfile.TemporaryDirectory() as folder:
        prepare(toolkit, folder)
        found, refused = compiled(cases, pathlib.Path(folder))
    console.print(table(found, budgets))
    if f.write:
        kept = [row for row in budgets.values() if row.case in CASES.keys() - cases]
        write(BUDGETS, [*kept, *found])
        console.print(f"written to {BUDGETS}")
    worse = refused if f.write else [*refused, *regressions(found, budgets, cases)]
    for sentence in worse:
        console.print(sentence)
    return 1 if worse else 0


def find_toolkit() -> pathlib.Path:
    """Folder of the CUDA compiler.

    Raises:
      ValueError: says what to install where it is missing.
    """
    try:
        plugin = importlib.util.find_spec("jax_plugins.xla_cuda13")
        toolkit = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        plugin = toolkit = None
    for folder in (toolkit.submodule_search_locations or []) if toolkit else []:
        if plugin and (pathlib.Path(folder) / "bin" / "ptxas").is_file():
            return pathlib.Path(folder)
    needed = NEEDED.format(jax.__version__)
    raise ValueError(f"the CUDA compiler of jax is missing; install it by {needed}")


def prepare(toolkit: pathlib.Path, folder: str) -> None:
    """Environment of a compiler without a device, which writes down what it makes."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of libraries that only running needs
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} "
        f"--xla_gpu_autotune_level=0 --xla_dump_to={folder}",
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
        "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    jax.config.update("jax_enable_compilation_cache", False)  # it would write nothing


def compiled(
    cases: Sequence[str], folder: pathlib.Path
) -> tuple[list[Found], list[str]]:
    """Figures of the cases, from what each leaves in the folder, and refusals."""
    from jax.experimental import topologies

    topology: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found, refused = [], []
    for name in cases:
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        step, operands = program(CASES[name], place)
        lowered = jax.jit(step).trace(*operands).lower(lowering_platforms=("cuda",))
        try:
            lowered.compile()
        except jax.errors.JaxRuntimeError as reason:
            refused.append(f"{name}: does not compile: {reason}")
            continue
        rows = {}
        for path in sorted(folder.rglob("*.ptx")):
            for kernel, figures in kernels(path.read_text(), lambda p=path: said(p)):
                rows[kernel] = Found(name, kernel, *figures)
        if not rows:
            raise ValueError(f"{name}: the compiler left no kernel that multiplies")
        found.extend(rows.values())
    return found, refused


def program(case: Case, place) -> tuple[Callable[..., Any], tuple]:
    """Forward and backward as one function, and the shapes of its operands."""
    b, t, n, k, h = case.shape
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=place)

    def arrays(x):
        if isinstance(x[0][0], tuple):
            return tuple(struct(*y) for y in x)
        return struct(*x)

    given: dict[str, Any] = {name: arrays(x) for name, x in case.arrays.items()}
    bound: Any = struct((b, t), jnp.int32)
    call = Call(bound, bound, **given)
    spec = Spec(**{"scale": h**-0.5, **case.static})
    query, key = (struct((b, t, heads, h), case.dtype) for heads in (n, k))
    statistic = struct((b, t, n), jnp.float32)

    def step(query, key, value, call, d_out, d_log):
        def out(query, key, value, bias, sinks):
            whole = call._replace(bias=bias, sinks=sinks)
            return case.serve(query, key, value, whole, spec)

        results, pull = jax.vjp(out, query, key, value, call.bias, call.sinks)
        return results, pull((d_out, d_log))

    return step, (query, key, key, call, query, statistic)


def kernels(text: str, assemble: Callable[[], str]) -> Iterator[tuple[str, tuple]]:
    """(name, figures) of the kernels in a PTX text that multiply matrices.

    `assemble` gives what ptxas says of the text; it is asked only if there is one.
    """
    bodies = re.split(r"\.entry\s+(\w+)", text)
    patterns = (
        r"wgmma\.mma_async",
        r"\bmma\.sync",
        r"cp\.async\.c[ag]\.",
        r"cp\.async\.bulk\.(?:tensor|shared|global)",
    )
    listing = None
    for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
        wgmma, mma, copies, bulk = (len(re.findall(x, body)) for x in patterns)
        if not wgmma + mma:
            continue  # XLA's own
        listing = listing or assemble()
        part = listing.split(f"Compiling entry function '{name}'")[1]
        spilled = int(re.findall(r"(\d+) bytes spill stores", part)[0])
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        figures = registers, spilled, wgmma, mma, copies, bulk
        yield name.removesuffix("_mosaic_gpu_kernel"), figures


def said(path: pathlib.Path) -> str:
    """What ptxas says of a file."""
    given = ["ptxas", "-arch=sm_90a", "-v", str(path), "-o", os.devnull]
    done = subprocess.run(given, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"ptxas refused {path.name}: {done.stderr}")
    return done.stderr


def regressions(
    found: Iterable[Found],
    budgets: Mapping[tuple[str, str], Found],
    cases: Sequence[str],
) -> Iterator[str]:
    """A sentence for each figure beyond its budget, each kernel without one or gone."""
    here = {(row.case, row.kernel): row for row in found}
    for at, row in here.items():
        if at not in budgets:
            yield f"{row.case}: {row.kernel} has no budget; --write sets it"
            continue
        for field, sign in LIMITS.items():
            now, limit = getattr(row, field), getattr(budgets[at], field)
            if sign * (now - limit) > 0:
                side = "above" if sign > 0 else "below"
                yield (
                    f"{row.case}: {row.kernel}: {field} is {now}, {side} its budget "
                    f"{limit}"
                )
    for case, kernel in budgets.keys() - here.keys():
        if case in cases:
            yield f"{case}: {kernel} is gone; --write takes it out of the budgets"


def table(found: Iterable[Found], budgets: Mapping[tuple[str, str], Found]) -> Table:
    """Figures, with the budget in brackets where it differs."""
    shown = Table(*Found._fields)
    for row in found:
        budget = budgets.get((row.case, row.kernel), row)
        cells = [
            f"{now}" if now == before else f"{now} ({before})"
            for now, before in zip(row[2:], budget[2:], strict=True)
        ]
        shown.add_row(row.case, row.kernel, *cells)
    return shown


def read(path: pathlib.Path) -> dict[tuple[str, str], Found]:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    found = (Found(row[0], row[1], *map(int, row[2:])) for row in rows)
    return {(row.case, row.kernel): row for row in found}


def write(path: pathlib.Path, rows: Iterable[Found]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(Found._fields)
        writer.writerows(sorted(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
