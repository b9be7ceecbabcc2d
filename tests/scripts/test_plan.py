"""The planner's command: tables of a real step, a ranking, and refusals."""

import io
import re

import pytest
from narrows.models.transformer import LLAMA_7B, TransformerConfig
from narrows.parallel.layout import Layout
from narrows.scripts import plan
from rich.console import Console

SMALL = ("--depth=2", "--width=32", "--heads=4", "--vocab_size=128", "--seq_len=16")


def said(*arguments) -> str:
    console = Console(file=io.StringIO(), record=True, width=200)
    assert plan.main(["plan", *arguments], console) == 0
    return console.export_text()


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        plan.main(["plan", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_step_for_simulated_devices(quick_compilation):
    """Every axis of the layout has its row; the closed form is near the compiled."""
    text = said(
        *SMALL, "--topology=cpu:8", "--mesh=data=2,tensor=4", "--precision=float32"
    )
    rows = dict(re.findall(r"bytes over (\w+), GB.*?│.*?│.*?│\s*([\d.]+) │", text))
    assert set(rows) == {"data", "tensor"}
    assert 0.8 < float(rows["data"]) < 1.2
    # XLA:CPU sums the gradients behind query, key and value, up and gate each apart
    assert 0.5 < float(rows["tensor"]) < 1.5
    assert "fits, left over" in text
    assert "binding: " in text
    assert "assumed: matmul share" in text


def test_a_search_ranks_by_time_and_shows_the_rules_of_thumb():
    text = said(
        "--preset=gpt_175b",
        "--machine=a100",
        "--devices=512",
        "--batch_size=1536",
        "--search",
        "--mesh=stage=8,data=8,tensor=8",
        "--microbatches=192",
        "--schedule=one_f_one_b",
    )
    times = [float(x) for x in re.findall(r"│ +\d+ │ \S+ +│ +\d+ │ +([\d.]+) │", text)]
    assert len(times) == 10
    assert times == sorted(times)
    (thumb,) = re.findall(r"rules of thumb │ (\S+) ", text)
    assert Layout.parse(thumb).tensor == 8
    assert "--mesh │ stage=8,data=8,tensor=8" in text


def test_a_layout_that_does_not_fit_names_its_largest(capsys):
    """Before anything is compiled, since parameters and moments are enough."""
    text = refused(
        capsys,
        "--preset=gpt_175b",
        "--topology=cpu:8",
        "--machine=v5p",
        "--mesh=fsdp=8",
    )
    assert "parameters and moments alone take 262." in text
    assert re.search(
        r"params/blocks/mlp/up/kernel \[96, 1536, 49152\] \d+\.\d+ GB", text
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--topology=cpu:8", "--mesh=data=3"), "takes 3 devices"),
        (("--topology=cpu:8", "--mesh=stage=8"), "nearest that fits"),
        (("--topology=cpu:8", "--mesh=tensor=8"), "heads: 4 do not divide"),
        (("--topology=v5p",), "cannot read"),
        ((), "give --topology"),
        (("--search",), "give --machine and --devices"),
        (
            ("--search", "--machine=v5e", "--devices=2", "--preset=gpt_1t"),
            "no layout of 2 v5e fits",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, arguments, named):
    assert named in refused(capsys, *SMALL, *arguments)


def test_presets_have_the_sizes_of_their_names():
    for name, config in plan.PRESETS.items():
        billions = plan.sizes_of(config, 2048).parameters / 1e9
        stated = {"7b": 6.7, "22b": 22, "175b": 175, "1t": 1008}[name.partition("_")[2]]
        assert billions == pytest.approx(stated, rel=0.02)
    small = TransformerConfig(depth=2, width=64, kv_heads=1, heads=2)
    assert plan.sizes_of(small, 16).key_width == 32
    assert plan.sizes_of(LLAMA_7B, 16).gated
