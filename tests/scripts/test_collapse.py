"""The suite on collapse: arms differ in their waist alone, and it says what it saw."""

import gzip
import json

import jax
import numpy as np
import pytest
from flax import nnx
from narrows.scripts import benchmark
from narrows.scripts.benchmarks import collapse

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def pictures(tmp_path):
    place = tmp_path / "fashion_mnist"
    place.mkdir()
    draw = np.random.default_rng(0)
    for file in ("train", "t10k"):
        for kind, shape in (("images-idx3", (40, 28, 28)), ("labels-idx1", (40,))):
            array = draw.integers(0, 10, shape, np.uint8)
            sizes = b"".join(n.to_bytes(4, "big") for n in shape)
            packed = gzip.compress(bytes([0, 0, 8, len(shape)]) + sizes + array.data)
            (place / f"{file}-{kind}-ubyte.gz").write_bytes(packed)
    return tmp_path


def test_the_suite_runs_and_records(pictures, capsys):
    sizes = ["--collapse_codes=16", "--collapse_steps=2", "--collapse_seeds=2"]
    folders = [f"--images_dir={pictures}", f"--results_dir={pictures}", "--record"]
    arguments = ["benchmark", "--suite=collapse", "--arms=plain", *sizes, *folders]
    assert benchmark.main(arguments) == 0
    assert "plain" in capsys.readouterr().out
    text = (pictures / "benchmark_collapse.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for line in lines:
        used = line["usage"] * line["codes"]
        assert used == round(used) >= 1
        assert 0 <= line["bits"] <= np.log2(used) + 1e-9 <= line["capacity"] + 1e-9


def test_an_arm_that_is_not_there_is_refused(pictures, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(
            ["benchmark", "--suite=collapse", "--arms=vqq", f"--images_dir={pictures}"]
        )
    assert ended.value.code == 2
    assert "['vqq'] are none of" in capsys.readouterr().err


def test_arms_share_all_but_their_waist():
    def around(arm):
        model = collapse.Autoencoder(arm, 16, rngs=nnx.Rngs(0))
        return nnx.state((model.encoder, model.decoder))

    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), around("plain"), around("fsq")
    )
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("counts", "bits"), [([4, 4, 4, 4], 2.0), ([9, 0, 0], 0.0), ([1, 1, 2, 0], 1.5)]
)
def test_bits_are_the_entropy_of_the_counts(counts, bits):
    assert collapse.entropy_bits(np.array(counts)) == pytest.approx(bits)
