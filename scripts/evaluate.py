"""Score a trained model on a split it never saw, with a confidence interval.

    python scripts/evaluate.py --workdir=/tmp/waist

Prints bits per byte with its 95 % interval over blocks of text, the bits that passed
the waist, and one JSON line with the same. Exit code 2 for bad input.
"""

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from narrows.data.text import SPLITS, load_corpus, windows
from narrows.models.language_model import token_nats
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.scripts import command
from narrows.scripts.runlog import bits_per_byte
from narrows.scripts.trained import load_trained, model_of
from rich.console import Console
from rich.progress import track
from scipy import stats


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "of a trained run (required)", flag_values=f)
    integer("step", None, "checkpoint; default the newest", 0, flag_values=f)
    text("data", None, "as in training; default that of the run", flag_values=f)
    flags.DEFINE_enum("split", "test", list(SPLITS), "which text", flag_values=f)
    integer("rows", None, "only so many windows of its beginning", 2, flag_values=f)
    integer("batch_size", 16, "windows at a time", 1, flag_values=f)
    text("mesh", "", "e.g. data=8; default: all devices on data", flag_values=f)
    return f


def main(argv: Sequence[str], devices: Sequence | None = None) -> int:
    """Score as argv says, on all devices unless some are given; the exit code."""
    f = define_flags()
    command.parse(f, argv, __doc__)
    console = Console(stderr=True, highlight=False)
    with command.bad_input():
        if f.workdir is None:
            raise ValueError("workdir: give --workdir, the folder of a trained run")
        devices = jax.devices() if devices is None else devices
        mesh = make_mesh(Layout.parse(f.mesh, devices=len(devices)), devices)
        process_rows(mesh, f.batch_size)
        trained = load_trained(f.workdir, step=f.step, mesh=mesh)
        run = trained.meta
        corpus = load_corpus(
            run["flags"]["data"] if f.data is None else f.data,
            tokenizer=run["tokenizer"],
        )
        if f.data is None and corpus.hash != run["corpus"]:
            raise ValueError(
                f"data: the run's corpus {run['corpus'][:12]} has become "
                f"{corpus.hash[:12]} here; its splits may hold what was trained on, so "
                "name the text to score with --data"
            )
        length = run["seq_len"]
        batches = list(
            windows(corpus, f.split, length, batch_size=f.batch_size, limit=f.rows)
        )

    @jax.jit
    def score(state, batch):
        """Nats and waist bits of every window, and its number of scored tokens."""
        out = model_of(state, run["model"])(batch["tokens"], mask=batch["mask"])
        nats = token_nats(out.logits, batch["targets"]) * batch["mask"]
        return nats.sum(1), out.waist.bits.sum(1), batch["mask"].sum(1)

    rows = []
    with jax.set_mesh(mesh):
        for batch in track(batches, "score", console=console):
            got = jax.device_get(score(trained.state, place_batch(batch, mesh)))
            rows.append(np.stack(got, axis=1))
    nats, waist, count = np.concatenate(rows).astype(np.float64).T
    low, high = block_interval(nats, count)
    per_byte = corpus.bytes_per_token[f.split]
    result = {
        "split": f.split,
        "step": int(trained.state.step),
        "tokens": int(count.sum()),
        "loss": nats.sum() / count.sum(),
        "bits_per_byte": bits_per_byte(nats.sum() / count.sum(), per_byte),
        "interval": [bits_per_byte(low, per_byte), bits_per_byte(high, per_byte)],
        "waist_bits": waist.sum() / count.sum(),
    }
    console.print(
        f"{f.split}: {result['bits_per_byte']:.4f} bits per byte, 95 % interval "
        "{:.4f} to {:.4f}".format(*result["interval"])
        + f" over {result['tokens']:,} tokens; {result['waist_bits']:.2f} bits per "
        f"position through the waist; {trained.path}",
        soft_wrap=True,
    )
    print(json.dumps(result))
    return 0


def block_interval(nats: np.ndarray, count: np.ndarray, blocks: int = 20):
    """95 % t interval of nats per token, over `blocks` stretches of neighbour windows.

    Neighbouring windows come from one file and are alike, so single windows would give
    an interval that is too narrow; stretches are nearly independent.
    """
    filled = count > 0
    parts = np.array_split(np.stack([nats[filled], count[filled]]), blocks, axis=1)
    sums = np.array([part.sum(1) for part in parts if part.size])
    means, share = sums[:, 0] / sums[:, 1], sums[:, 1] / sums[:, 1].mean()
    mean = np.average(means, weights=share)
    if len(means) < 2:
        return -np.inf, np.inf
    error = np.sqrt(
        np.sum((share * (means - mean)) ** 2) / (len(means) - 1) / len(means)
    )
    half = stats.t.ppf(0.975, len(means) - 1) * error
    return mean - half, mean + half


if __name__ == "__main__":
    sys.exit(main(sys.argv))
