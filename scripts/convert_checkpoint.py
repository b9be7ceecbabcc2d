"""Bring checkpoints of other programs into ours, and ours to Hugging Face.

    python scripts/convert_checkpoint.py --source=gpt2 --to=runs/gpt2
    python scripts/convert_checkpoint.py --source=runs/gpt2 --to=tuned --dtype=bfloat16
    python scripts/convert_checkpoint.py --source=dcp --config=config.json --to=runs/new

What --source is shows by its files: model.safetensors or its index beside config.json
(Hugging Face), .metadata (torch.distributed.checkpoint), mp_rank_00_model_states.pt
(DeepSpeed, ZeRO 1 to 3, any tensor parallelism), or a workdir of ours, which is written
as safetensors. GPT-2 and Llama models; the last three kinds hold no configuration, so
--config names a config.json. Pickles are read without executing anything.

Ours holds float32 weights and a fresh optimizer; theirs has --dtype. Every array must
be there in its shape. Exit code 2 and one sentence for all that does not fit.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from narrows.parallel.host_memory import give_back_freed_memory
from narrows.scripts import command
from narrows.scripts.foreign_checkpoints import (
    DTYPES,
    bring_in,
    checkpoints_in,
    export,
    read_foreign,
)


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("source", None, "what is read (required)", flag_values=f)
    text("to", None, "a new folder (required)", flag_values=f)
    text("config", None, "config.json, where the source has none", flag_values=f)
    integer("step", None, "of ours; default the newest", 0, flag_values=f)
    integer(
        "vocab_size",
        None,
        "rows of the vocabulary that is written: zeros are added or rows left out",
        1,
        flag_values=f,
    )
    flags.DEFINE_enum("dtype", "float32", [*DTYPES], "of theirs", flag_values=f)
    integer("shard_mib", 2048, "of a safetensors file, at most", 1, flag_values=f)
    text("prefix", "", "read names that begin so, without it", flag_values=f)
    flags.DEFINE_list("inert", [], "globals of a pickle that are skipped", f)
    text("optimizer", "adamw", "whose fresh state is put in ours", flag_values=f)
    text("tokenizer", "bytes", "or a folder with GPT-2's vocabulary", flag_values=f)
    return f


def main(argv: Sequence[str]) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    give_back_freed_memory()  # large arrays come and go, one after the other
    with command.bad_input():
        for name in ("source", "to"):
            if f[name].value is None:
                raise ValueError(f"{name}: give --{name}, a folder")
        source, to = pathlib.Path(f.source), pathlib.Path(f.to)
        if not source.is_dir():
            raise ValueError(f"source: there is no folder {source}")
        if to.exists():
            raise ValueError(f"to: {to} is there already; name a new folder")
        if ours := checkpoints_in(source):
            said = export(
                ours,
                to,
                step=f.step,
                vocab_size=f.vocab_size,
                dtype=DTYPES[f.dtype],
                shard_bytes=f.shard_mib * 2**20,
            )
        else:
            found = read_foreign(source, config=f.config, inert=f.inert)
            said = bring_in(
                found,
                to,
                source=str(source),
                prefix=f.prefix,
                vocab_size=f.vocab_size,
                optimizer=f.optimizer,
                tokenizer=f.tokenizer,
            )
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
