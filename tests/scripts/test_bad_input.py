"""Bad input is one sentence and exit code 2, and changes nothing on disk."""

import shutil

import pytest
from narrows.parallel.checkpoint import latest_step
from narrows.scripts import evaluate, sample, train

# flag, what the sentence must say
ANYWHERE = {
    "unknown flag": ("--stepps=3", ["stepps", "steps"]),
    "unknown value": ("--optimizer=adamx", ["optimizer", "adamx", "adamw", "sgd"]),
    "no number": ("--depth=two", ["depth", "two"]),
    "number out of range": ("--steps=0", ["steps", "0"]),
    "no flag at all": ("steps=3", ["steps=3", "--flag=value"]),
    "unreadable mesh": ("--mesh=rows=8", ["mesh", "rows=8", "data", "tensor"]),
    "mesh that does not fit": ("--mesh=data=3", ["mesh", "3 devices", "8"]),
    "axis that nothing uses": ("--mesh=data=4,expert=2", ["mesh", "expert=2"]),
    "layers that do not divide": ("--mesh=stage=8", ["depth: 2", "stage=8", "fits: 8"]),
    "heads that do not divide": ("--mesh=tensor=8", ["attention", "tensor=8"]),
    "rows that do not divide": ("--batch_size=12", ["batch_size", "12", "8"]),
    "microbatches": ("--microbatches=3", ["microbatches: 3", "8 rows", "fits: 1"]),
    "heads": ("--kv_heads=3", ["kv_heads", "3", "heads=4"]),
    "waist nowhere": ("--waist_at=3", ["waist_at", "3", "0..2"]),
    "no data": ("--data=/does/not/exist", ["data", "/does/not/exist"]),
    "no tokenizer": ("--tokenizer=/does/not/exist", ["tokenizer", "/does/not/exist"]),
    "longer than the text": ("--seq_len=1000000", ["seq_len", "1000000", "tokens"]),
    "profile backwards": ("--profile_steps=9:8", ["profile_steps", "9:8"]),
    "profile of one number": ("--profile_steps=9", ["profile_steps", "first:last"]),
    "profile before the start": ("--profile_steps=0:4", ["profile_steps", "1 to 40"]),
    "profile after the end": ("--profile_steps=39:41", ["profile_steps", "1 to 40"]),
    "half a cluster": ("--process_count=2", ["--coordinator", "--process_id"]),
}
RESUMED = {
    "wider": ("--width=64", ["width=64", "was 32"]),
    "another waist": ("--waist=none", ["waist=none", "was codebook"]),
    "more codes": ("--codes=64", ["codes=64", "was 32"]),
    "another precision": ("--precision=bfloat16", ["precision=bfloat16"]),
    "another seed": ("--seed=1", ["seed=1", "was 0"]),
    "another batch": ("--batch_size=16", ["batch_size=16", "was 8"]),
    "another length": ("--seq_len=8", ["seq_len=8", "was 16"]),
    "another optimizer": ("--optimizer=sgd", ["optimizer=sgd", "was adamw"]),
    "nothing left to profile": ("--profile_steps=2:4", ["profile_steps", "2:4"]),
}


@pytest.fixture
def refused(call, capsys):
    """`refused(script, *arguments)`: the sentence of a command that exits with 2."""

    def refused(script, *arguments):
        capsys.readouterr()
        assert call(script, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return refused


@pytest.mark.parametrize("case", ANYWHERE)
def test_a_new_run_refuses(refused, tiny, tmp_path, case):
    flag, words = ANYWHERE[case]
    said = refused(train, f"--workdir={tmp_path / 'new'}", *tiny, flag)
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_is_not_continued_as_another(refused, tiny, finished, listing, case):
    before = listing(finished)
    flag, words = RESUMED[case]
    said = refused(train, f"--workdir={finished}", *tiny, flag)
    assert all(word in said for word in words), said
    assert listing(finished) == before


def test_a_run_is_not_continued_on_another_text(
    refused, tiny, finished, books, listing, tmp_path
):
    other = tmp_path / "other.txt"
    other.write_bytes((books / "heapq.py").read_bytes())
    before = listing(finished)
    said = refused(train, f"--workdir={finished}", *tiny, f"--data={other}")
    assert "data=text of hash" in said
    assert listing(finished) == before


def test_a_run_needs_a_place(refused, tiny, tmp_path):
    assert "--workdir" in refused(train, *tiny)
    (tmp_path / "file").write_text("mine")
    refused(train, f"--workdir={tmp_path / 'file'}", *tiny)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("harm", ["header", "array", "truncated"])
def test_a_broken_checkpoint_is_named_and_left(
    refused, tiny, finished, listing, tmp_path, harm
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    newest = workdir / "checkpoints" / str(latest_step(finished / "checkpoints"))
    files = sorted(newest.rglob("*"), key=lambda path: path.stat().st_size)
    headers = [path for path in files if path.name == "_METADATA"]
    broken = headers[0] if harm == "header" else files[-1]
    held = broken.read_bytes()
    middle = len(held) // 2
    if harm == "truncated":
        broken.write_bytes(held[:middle])
    else:
        flipped = bytes(byte ^ 255 for byte in held[middle : middle + 64])
        broken.write_bytes(held[:middle] + flipped + held[middle + 64 :])
    before = listing(workdir)
    for script, flags in ((train, tiny), (sample, ()), (evaluate, ())):
        said = refused(script, f"--workdir={workdir}", *flags)
        assert str(newest) in said
        assert "step=20" in said  # the way out
    assert listing(workdir) == before


@pytest.mark.parametrize("script", [sample, evaluate])
def test_readers_need_a_trained_run(refused, script, tmp_path):
    assert "--workdir" in refused(script)
    assert "train" in refused(script, f"--workdir={tmp_path / 'none'}")
    (tmp_path / "checkpoints").mkdir()
    assert "checkpoint" in refused(script, f"--workdir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("script", "flag", "words"),
    [
        (sample, "--step=7", ["step 7", "[20, 40]"]),
        (sample, "--prompt=", ["prompt", "empty"]),
        (sample, "--prompt_file=/does/not/exist", ["/does/not/exist"]),
        (sample, "--length=0", ["length"]),
        (sample, "--top_p=2", ["top_p"]),
        (sample, "--temperature=-1", ["temperature"]),
        (evaluate, "--step=7", ["step 7", "[20, 40]"]),
        (evaluate, "--split=all", ["split", "validation", "test"]),
        (evaluate, "--rows=1", ["rows"]),
        (evaluate, "--batch_size=12", ["batch_size", "12"]),
        (evaluate, "--mesh=data=3", ["mesh", "3 devices"]),
        (evaluate, "--data=/does/not/exist", ["/does/not/exist"]),
    ],
)
def test_readers_refuse(refused, finished, listing, script, flag, words):
    before = listing(finished)
    said = refused(script, f"--workdir={finished}", flag)
    assert all(word in said for word in words), said
    assert listing(finished) == before
