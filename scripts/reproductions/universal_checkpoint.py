"""A checkpoint of one layout resumes on every other, in one call, bit for bit.

Paper: X. Lian, S. A. Jacobs, L. Kurilenko, M. Tanaka, S. Bekman, O. Ruwase, M. Zhang,
"Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale
Distributed Training", arXiv:2406.18820.
Claim: saved as it lies and brought to another layout by patterns when it is loaded, a
checkpoint costs nothing more to save, and training goes on from it on other machine
shapes with the loss curve it would have had.

    JAX_NUM_CPU_DEVICES=8 python scripts/reproduce.py --system=universal_checkpoint

Expected: no bit differs over all ordered pairs of twelve layouts on 1 to 8 devices;
curves agree to 1e-5; a converted restore takes a few times as long as a native one.
Hardware and time: two CPU cores as 8 simulated devices; quick 2 minutes, full 20.
"""

import atexit
import contextlib
import functools
import io
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from narrows.parallel.checkpoint import Arrangement, Checkpoints, Pattern, inspect
from narrows.parallel.checkpoint.resume import restore
from narrows.scripts import train
from narrows.scripts.checkpoint_cost import cost, memory
from narrows.scripts.checkpoint_faults import damaged, killed
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.results import Recorded
from narrows.scripts.runlog import read_rows

SYSTEM = System(
    slug="universal_checkpoint",
    title="Universal Checkpointing: Efficient and Flexible Checkpointing for Large "
    "Scale Distributed Training",
    paper="arXiv:2406.18820",
    room="parallel/",
    module="narrows.parallel.checkpoint.resume",
    summary="stored boxes mapped to logical boxes when a checkpoint is loaded",
)
STEPS = {"quick": 20, "full": 100, "paper": 200}
BLOCKS = ".*/blocks/.*"
QKV = Pattern(
    "(.*blocks/attention)/(?:query|key|value)/(kernel)",
    "fused",
    {"axis": 2, "order": ["query", "key", "value"], "into": "qkv", "ranks": 2},
)
GATED = {"axis": 2, "order": ["gate", "up"], "into": "gate_up", "ranks": 2}
MLP = Pattern("(.*blocks/mlp)/(?:gate|up)/(kernel)", "fused", GATED)
EMBED = Pattern(".*embed/embedding", "padded", {"axis": 0, "multiple": 96})
# name: devices, patterns of the stored layout. A model of depth 4 with 4 heads.
LAYOUTS: dict[str, tuple[int, list[Pattern]]] = {
    "1 device": (1, []),
    "2 devices": (2, []),
    "4 devices": (4, []),
    "6 devices": (6, []),
    "8 devices": (8, []),
    "2 stages": (2, [Pattern(BLOCKS, "pipelined", {"stages": 2})]),
    "4 stages": (4, [Pattern(BLOCKS, "pipelined", {"stages": 4})]),
    "interleaved": (8, [Pattern(BLOCKS, "pipelined", {"stages": 2, "repeats": 2})]),
    "unrolled": (6, [Pattern(BLOCKS, "unrolled", {"at": "blocks"})]),
    "fused": (4, [QKV, MLP]),
    "padded": (6, [EMBED]),
    "flat": (
        6,
        [Pattern("(params|opt/.*?(?:mu|nu))/.*", "flat", {"ranks": 6, "into": "flat"})],
    ),
}
TINY = (
    "--depth=4", "--width=32", "--heads=4", "--seq_len=32", "--batch_size=24",
    "--codes=32", "--code_width=8", "--eval_rows=24", "--nosample",
)  # fmt: skip


def trained(workdir: pathlib.Path, *arguments: str, devices: int = 8) -> np.ndarray:
    """Losses of a run of `scripts/train.py` in this process, which must succeed."""
    if jax.device_count() < 8:
        raise NotMeasured("8 devices: set JAX_NUM_CPU_DEVICES=8")
    _compile_once()
    argv = ["train", f"--workdir={workdir}", *TINY, *arguments]
    said, slow_code = io.StringIO(), "jax_disable_most_optimizations"
    jax.config.update(slow_code, True)  # a quarter of the compiling, the same laws
    try:
        with contextlib.redirect_stdout(said):
            code = train.main(argv, jax.devices()[:devices])
    finally:
        jax.config.update(slow_code, False)
    if code:
        raise RuntimeError(f"train.py ended with {code}: {said.getvalue()[-500:]}")
    rows = read_rows(workdir / "metrics.jsonl")
    return np.array([row["loss"] for row in rows if row["split"] == "train"])


@functools.cache
def _compile_once() -> None:
    """Keep compiled programs for the runs that follow: compiling is most of them."""
    if jax.config.jax_compilation_cache_dir:  # type: ignore
        return
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def target_of(folder: pathlib.Path, devices: int, patterns: Sequence[Pattern]):
    """Shapes of a checkpoint of plain layout as another stores them, and how it does.

    Each leaf is split over the devices along the first dimension that they divide.
    """
    rows = inspect(folder).rows
    arrangement = Arrangement({row.name: row.shape for row in rows}, patterns)
    dtypes = {row.name: _dtype(row.dtype) for row in rows}
    made = arrangement.map()
    kinds = {piece.stored: dtypes[piece.logical] for piece in made.pieces}
    mesh = jax.make_mesh(
        (devices,), ("a",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def place(shape):
        ways = [i for i, n in enumerate(shape) if n and n % devices == 0]
        spec = P(*[None] * ways[0], "a") if ways else P()
        return NamedSharding(mesh, spec)

    target = {
        name: jax.ShapeDtypeStruct(shape, kinds[name], sharding=place(shape))
        for name, shape in made.stored.items()
    }
    return target, arrangement


def _dtype(text: str) -> Any:
    if text.startswith("key"):
        return jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jnp.dtype(text)


def flags_of(scale: str, seed: int) -> tuple[str, ...]:
    steps = STEPS[scale]
    return f"--seed={seed}", f"--steps={steps}", f"--eval_every={steps}"


def layouts(scale: str, seed: int) -> Iterator[Row]:
    """Every ordered pair of layouts, of the state of a short real run."""
    names = list(LAYOUTS)
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        trained(folder / "run", *flags_of(scale, seed), "--stop_at=3")
        plain = folder / "run" / "checkpoints"
        targets, direct = {}, {}
        for name, (devices, patterns) in LAYOUTS.items():
            target, arrangement = target_of(plain, devices, patterns)
            options = {"layout": arrangement}
            targets[name] = target, options
            direct[name] = restore(plain, target, **options).state
            with Checkpoints(folder / name) as checkpoints:
                checkpoints.save(0, direct[name], {}, layout=arrangement)
        pairs = list(itertools.permutations(names, 2))
        if scale == "quick":  # a sixth of them a seed
            pairs = pairs[seed % 6 :: 6]
        wrong = leaves = 0
        for a, b in pairs:
            target, options = targets[b]
            got = restore(folder / a, target, **options).state
            for name, x in direct[b].items():
                leaves += 1
                wrong += _raw(got[name]) != _raw(x)
    yield Row("leaves that differ", wrong)
    yield Row("pairs of layouts", len(pairs))
    yield Row("leaves compared", leaves)


def _raw(x: jax.Array) -> bytes:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def resumed(scale: str, seed: int) -> Iterator[Row]:
    """Half a run on 8 devices, and the other half on others, beside the whole run."""
    steps = STEPS[scale]
    flags = flags_of(scale, seed)
    moves = {"same": ("", 8), "data=6": ("data=6", 6)}
    if scale != "quick":
        moves |= {"tensor=2": ("data=2,tensor=2", 4), "fsdp=2": ("fsdp=2", 2)}
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        whole = trained(folder / "whole", *flags)
        trained(folder / "half", *flags, f"--stop_at={steps // 2}")
        for name, (mesh, devices) in moves.items():
            run = shutil.copytree(folder / "half", folder / name)
            found = trained(run, *flags, f"--mesh={mesh}", devices=devices)
            gap = float(np.abs(found / whole - 1).max())
            yield Row("loss gap", gap, name)
            yield Row("largest loss gap", gap)
        yield from _residuals(folder, seed)


def _residuals(folder: pathlib.Path, seed: int) -> Iterator[Row]:
    """1-bit Adam's residuals of 8 workers, for 6: the mean that enters an update."""
    flags = (
        "--optimizer=one_bit_adam",
        "--freeze_step=4",
        "--waist=none",
        "--steps=8",
        "--depth=1",
    )
    trained(folder / "bits", f"--seed={seed}", *flags)
    plain = folder / "bits" / "checkpoints"
    eight, _ = target_of(plain, 8, [])
    owned = [name for name in eight if "per_worker_mean" in name]
    six = dict(target_of(plain, 6, [])[0])
    for name in owned:
        shape, whole = (6, *eight[name].shape[1:]), six["step"].sharding
        six[name] = jax.ShapeDtypeStruct(shape, eight[name].dtype, sharding=whole)
    six = {n: x for n, x in six.items() if "over_workers" not in n}
    before = restore(plain, eight).state
    after = restore(plain, six, ignore=[".*over_workers.*"]).state
    worst = scale = 0.0
    for name in owned:
        was, now = (np.asarray(s[name], np.float64).mean(0) for s in (before, after))
        worst = max(worst, float(np.abs(was - now).max()))
        scale = max(scale, float(np.abs(was).max()))
    if not scale:
        raise RuntimeError("no residual was kept: nothing is measured")
    yield Row("change of the mean residual", worst / scale)


CLAIMS = (
    Claim(
        "bits",
        "restored in any of twelve layouts from any other, every leaf has its bits",
        "any source to any target; losses agree within 0.02",
        Law("leaves that differ", 0),
        layouts,
        note="Quick takes a sixth of the 132 ordered pairs a seed, full all.",
    ),
    Claim(
        "same",
        "resumed on the same devices a run is the one that never stopped, bit for bit",
        "not stated",
        Law("loss gap", 0, "same"),
        resumed,
    ),
    Claim(
        "curve",
        "resumed on other devices its losses are those of the whole run, to 1e-5",
        "curves overlay; loss within 0.02",
        Law("largest loss gap", 1e-5),
        resumed,
    ),
    Claim(
        "residuals",
        "1-bit Adam's mean residual is kept from 8 to 6 workers, to 1e-6",
        "not in the paper; DeepSpeed throws residuals away",
        Law("change of the mean residual", 1e-6),
        resumed,
    ),
    Claim(
        "kills",
        "a run killed at any instant, in a commit, or in one of its processes goes on "
        "from a whole step, and no committed one is lost",
        "not in the paper",
        Law("runs that lost a commit", 0),
        killed,
        note="Full kills 60 times a seed at random instants, 300 in all.",
    ),
    Claim(
        "damage",
        "a full disk, a cut file or a flipped bit is named in one sentence, and the "
        "step before still loads",
        "not in the paper",
        Law("faults that were not named or survived", 0),
        damaged,
    ),
    Claim(
        "saving",
        "saving with fingerprints takes at most 1/0.9 of the processor time of "
        "Orbax's own",
        "saving costs nothing more",
        Ratio("save over Orbax", "method", "orbax", at_most=1 / 0.9),
        cost,
    ),
    Claim(
        "restoring",
        "restoring with fingerprints takes at most 1/0.9 of the processor time of "
        "Orbax's own",
        "not in the paper",
        Ratio("restore over Orbax", "ours", "orbax", at_most=1 / 0.9),
        cost,
    ),
    Claim(
        "saving_clock",
        "by the clock, saving keeps 90 % of the throughput of Orbax's own",
        "saving costs nothing more",
        Ratio("save over Orbax, clock", "method", "orbax", at_most=1 / 0.9),
        cost,
    ),
    Claim(
        "restoring_clock",
        "by the clock, restoring keeps 90 % of the throughput of Orbax's own",
        "not in the paper",
        Ratio("restore over Orbax, clock", "ours", "orbax", at_most=1 / 0.9),
        cost,
    ),
    Claim(
        "converting",
        "a restore into another layout takes at most 1.4 times a native one",
        "1.1 to 1.4 times a native load",
        Ratio("restore over Orbax, clock", "converted", "ours", at_most=1.4),
        cost,
    ),
    Claim(
        "memory",
        "converting takes at most the largest leaf and 200 MB beyond its result, if "
        "freed memory is given back, as scripts/convert_checkpoint.py asks",
        "memory of the largest parameter times the workers",
        Law("peak over the bound", 1.0, "given back"),
        memory,
        note="Quick brings 256 MiB over, full 2 GiB; one worker.",
    ),
    Claim(
        "memory_kept",
        "and also if it is kept in one arena, as scripts/train.py asks",
        "memory of the largest parameter times the workers",
        Law("peak over the bound", 1.0, "kept"),
        memory,
    ),
)


def cost_figure(rows: Sequence[Recorded]) -> Figure:
    """Saves and restores over Orbax's own, a point a seed."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    arms = {
        "Orbax": ("restore over Orbax", "orbax"),
        "fingerprints": ("restore over Orbax", "ours"),
        "and layout": ("restore over Orbax", "converted"),
        "save": ("save over Orbax", "method"),
    }
    for place, (metric, arm) in enumerate(arms.values()):
        found = [
            r.value for r in rows if (r.metric, r.arm, r.scale) == (metric, arm, scale)
        ]
        axes.plot([place] * len(found), found, "o", color="C0", alpha=0.5)
        axes.plot(place, np.mean(found), "_", color="C1", ms=24, mew=2)
    axes.set_xticks(range(len(arms)), arms)
    axes.set_ylabel("processor time over Orbax's own")
    axes.set_ylim(bottom=0)
    return figure


FIGURES = {"universal_checkpoint": cost_figure}
