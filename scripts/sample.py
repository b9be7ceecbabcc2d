"""Write text with a trained model.

    python scripts/sample.py --workdir=/tmp/waist --prompt='def main('
    python scripts/sample.py --workdir=/tmp/waist --prompt_file=start.py --temperature=0

The same seed writes the same text. Exit code 2 for bad input.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from narrows.scripts import command
from narrows.scripts.trained import load_trained, model_of, sample_text


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("workdir", None, "of a trained run (required)", flag_values=f)
    integer("step", None, "checkpoint; default the newest", 0, flag_values=f)
    text("prompt", "def ", "what the text begins with", flag_values=f)
    text("prompt_file", None, "instead of --prompt, a file", flag_values=f)
    integer("length", 300, "tokens to write", 1, flag_values=f)
    integer("seed", 0, "of the draws", 0, flag_values=f)
    real("temperature", 0.8, "0 takes the likeliest token", 0.0, flag_values=f)
    integer("top_k", 0, "draw among that many tokens; 0: all", 0, flag_values=f)
    real("top_p", 0.95, "draw among tokens of that much probability", flag_values=f)
    return f


def main(argv: Sequence[str]) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    with command.bad_input():
        if f.workdir is None:
            raise ValueError("workdir: give --workdir, the folder of a trained run")
        prompt = f.prompt
        if f.prompt_file is not None:
            prompt = pathlib.Path(f.prompt_file).read_text()
        trained = load_trained(f.workdir, step=f.step)
        text = sample_text(
            model_of(trained.state, trained.meta["model"]),
            trained.meta["tokenizer"],
            prompt,
            length=f.length,
            seed=f.seed,
            temperature=f.temperature,
            top_k=f.top_k,
            top_p=f.top_p,
        )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
