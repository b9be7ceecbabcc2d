"""Laws of corpora and batches: nothing is lost, repeated, leaked or reordered."""

import doctest
import itertools
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.data import corpus as corpus_module
from narrows.data import text as text_module
from narrows.data import tokens as tokens_module
from narrows.data.corpus import load_corpus, split_of
from narrows.data.text import SPLITS, batches, windows
from narrows.data.tokens import make_tokenizer

RUN: dict[str, Any] = {"batch_size": 8, "seq_len": 16, "seed": 3}
# Few characters of one to four bytes: all of Unicode takes seconds to tabulate.
TEXT = st.text(alphabet="ab1 \n\t'\x85é€𝄞")
BYTES = st.binary() | TEXT.map(str.encode)


@pytest.fixture(scope="module")
def library():
    return load_corpus()


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """1,000 bytes whose train split has 56 windows of 16: 7 steps of 8 an epoch."""
    path = tmp_path_factory.mktemp("numbers") / "numbers.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))
    return load_corpus(path)


@pytest.fixture(scope="module")
def bpe(shared_data):
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    folder = shared_data / "bpe_gpt2"
    if not folder.is_dir():
        pytest.skip(f"no vocabulary of GPT-2 at {folder}")
    return folder


@pytest.fixture(scope="module")
def shakespeare(shared_data, bpe):
    return load_corpus(shared_data / "tinyshakespeare" / "input.txt", tokenizer=bpe)


def write_folder(root: pathlib.Path, count: int = 200) -> pathlib.Path:
    """Files whose text is their own name, so a split shows what went into it."""
    for i in range(count):
        path = root / f"part{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[part{i % 7}/{i}.txt]")
    return root


def names_in(corpus, split) -> list[str]:
    text = bytes(corpus.splits[split]).decode()
    return text.removeprefix("[").removesuffix("]").split("][")


@pytest.mark.parametrize("module", [text_module, corpus_module, tokens_module])
def test_examples_of_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


class TestCorpus:
    def test_standard_library_is_real_text_in_about_90_5_5(self, library):
        size = sum(map(len, library.splits.values()))
        assert size > 3_000_000
        assert len(library.splits["train"]) / size == pytest.approx(0.9, abs=0.06)
        assert min(map(len, library.splits.values())) > 0.01 * size
        assert b"def __init__(self" in bytes(library.splits["validation"])
        assert library.hash == load_corpus().hash

    def test_standard_library_leaves_out_tests_and_packages(self):
        _, files = corpus_module._read(None)
        folders = {part for name in files for part in name.split("/")[:-1]}
        assert not folders & {"site-packages", "dist-packages", "test", "tests"}
        assert "json/decoder.py" in files
        assert list(files) == sorted(files)

    def test_every_file_is_in_one_split_and_in_order(self, tmp_path):
        corpus = load_corpus(write_folder(tmp_path))
        found = {split: names_in(corpus, split) for split in SPLITS}
        everything = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.txt")]
        assert sorted(itertools.chain(*found.values())) == sorted(
            path.as_posix() for path in everything
        )
        for split, names in found.items():
            assert names == sorted(names)
            assert {split_of(name) for name in names} == {split}

    def test_a_file_keeps_its_split_when_others_come(self, tmp_path):
        few = load_corpus(write_folder(tmp_path, 150))
        many = load_corpus(write_folder(tmp_path, 250))
        for split in SPLITS:
            assert set(names_in(few, split)) < set(names_in(many, split))

    def test_hash_fractions_are_uniform(self):
        """20,000 draws: five standard deviations of the share are below 0.011."""
        found = [split_of(f"some/file{i}.py") for i in range(20_000)]
        shares = [found.count(split) / len(found) for split in SPLITS]
        np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.011)

    @pytest.mark.parametrize("size", [40, 41, 59, 1000, 12345])
    def test_one_file_is_cut_by_position_without_loss(self, tmp_path, size):
        content = bytes(i % 251 for i in range(size))
        (tmp_path / "one.bin").write_bytes(content)
        corpus = load_corpus(tmp_path / "one.bin")
        assert b"".join(bytes(corpus.splits[s]) for s in SPLITS) == content
        assert min(map(len, corpus.splits.values())) >= 2
        assert len(corpus.splits["train"]) == size * 90 // 100
        assert "by position" in corpus.describe()

    def test_too_few_files_are_cut_by_position(self, tmp_path):
        (tmp_path / "a.txt").write_text("a" * 50)
        (tmp_path / "b.txt").write_text("b" * 50)
        corpus = load_corpus(tmp_path)
        assert [len(corpus.splits[s]) for s in SPLITS] == [90, 5, 5]
        assert bytes(corpus.splits["train"]) == b"a" * 50 + b"b" * 40

    def test_binary_and_hidden_files_are_left_out(self, tmp_path):
        before = load_corpus(write_folder(tmp_path)).hash
        (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
        (tmp_path / ".hidden").write_text("hidden")
        assert load_corpus(tmp_path).hash == before

    def test_hash_ignores_the_place_of_the_folder(self, tmp_path):
        here, there = write_folder(tmp_path / "a"), write_folder(tmp_path / "b" / "c")
        assert load_corpus(here).hash == load_corpus(there).hash
        (there / "part3" / "3.txt").write_text("[part3/3.txT]")
        changed = load_corpus(there).hash
        assert load_corpus(here).hash != changed
        (there / "part3" / "3.txt").write_text("[part3/3.txt]")
        assert load_corpus(here).hash == load_corpus(there).hash

    def test_hash_sees_each_byte_and_the_order(self, tmp_path):
        """A hundred texts that differ from the first, and each other, in one place."""
        path = tmp_path / "text"
        texts = [b"a" * 100] + [b"a" * i + b"b" + b"a" * (99 - i) for i in range(100)]
        hashes = set()
        for text in texts:
            path.write_bytes(text)
            hashes.add(load_corpus(path).hash)
        assert len(hashes) == len(texts)

    def test_tokens_are_small_and_read_only(self, numbers):
        for tokens in numbers.splits.values():
            assert tokens.dtype == np.uint8
            with pytest.raises(ValueError, match="read-only"):
                tokens[0] = 0
        assert set(numbers.bytes_per_token.values()) == {1.0}

    @settings(deadline=None, max_examples=30)
    @given(BYTES)
    def test_bytes_round_trip(self, numbers, data):
        assert numbers.decode(numbers.encode(data)) == data

    @settings(deadline=None, max_examples=30)
    @given(TEXT)
    def test_strings_round_trip(self, numbers, text):
        assert numbers.decode(numbers.encode(text).tolist()).decode() == text

    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            ([256], "0 to 255"),
            ([-1, 3], "0 to 255"),
            ([[1]], "one dim"),
            ([1.0], "float64"),
        ],
    )
    def test_decode_refuses_what_is_no_token(self, numbers, tokens, words):
        with pytest.raises(ValueError, match=words):
            numbers.decode(tokens)

    def test_nothing_at_the_path(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^data is .*nowhere"):
            load_corpus(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"^data is ''"):
            load_corpus("")

    @pytest.mark.parametrize("content", [b"", b"x" * 39])
    def test_too_little_text(self, tmp_path, content):
        (tmp_path / "short.txt").write_bytes(content)
        for path in (tmp_path, tmp_path / "short.txt"):
            with pytest.raises(ValueError, match=r"^data is .*at least 40 bytes"):
                load_corpus(path)

    def test_an_unreadable_file_is_not_skipped(self, tmp_path, monkeypatch):
        """A stand-in for a file without permission, since root may read those too."""
        write_folder(tmp_path)
        read = pathlib.Path.read_bytes

        def refuse(path):
            if path.name == "3.txt":
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"^data is .*3\.txt"):
            load_corpus(tmp_path)


class TestBPE:
    def test_splits_spell_the_file(self, shared_data, shakespeare):
        text = (shared_data / "tinyshakespeare" / "input.txt").read_bytes()
        spelled = [shakespeare.decode(shakespeare.splits[s]) for s in SPLITS]
        assert b"".join(spelled) == text
        assert shakespeare.vocab_size == 50257
        for split, part in zip(SPLITS, spelled, strict=True):
            tokens = shakespeare.splits[split]
            assert tokens.dtype == np.uint16
            assert shakespeare.bytes_per_token[split] == len(part) / len(tokens)

    def test_train_has_the_published_number_of_tokens(self, shakespeare):
        """301,966: the count nanoGPT's README gives for the first 90 % of this file."""
        assert len(shakespeare.splits["train"]) == 301_966

    def test_encoding_in_pieces_changes_no_token(self, shakespeare, bpe, monkeypatch):
        text = shakespeare.decode(shakespeare.splits["validation"]) + b" \n\t\n x\n\n"
        whole = shakespeare.encode(text)
        monkeypatch.setattr(tokens_module, "_PIECE", 1)
        pieces = list(tokens_module._pieces(text.decode()))
        assert len(pieces) > 1000
        np.testing.assert_array_equal(shakespeare.encode(text), whole)

    @settings(deadline=None, max_examples=30)
    @given(BYTES)
    def test_round_trip(self, shakespeare, data):
        assert shakespeare.decode(shakespeare.encode(data)) == data

    def test_every_byte_is_a_token(self, shakespeare):
        for byte in map(int.to_bytes, range(256)):
            [token] = shakespeare.encode(byte)
            assert shakespeare.decode([token]) == byte

    def test_tokenizer_is_part_of_the_hash(self, shared_data, shakespeare):
        plain = load_corpus(shared_data / "tinyshakespeare" / "input.txt")
        assert plain.hash != shakespeare.hash

    def test_an_empty_file_among_others(self, tmp_path, bpe):
        write_folder(tmp_path)
        (tmp_path / "empty.txt").touch()
        tools = load_corpus(tmp_path, tokenizer=bpe)
        assert tools.decode(tools.splits["test"]).startswith(b"[part")

    def test_missing_files_and_missing_library(self, tmp_path, bpe, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"^tokenizer is .*encoder\.json"):
            make_tokenizer(tmp_path)
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=r"pip install 'narrows\[bpe\]'"):
            make_tokenizer(bpe)

    @pytest.mark.parametrize(
        ("vocabulary", "words"),
        [("not json", "are no BPE"), ('{"a": 0, "b": 1}', "byte-level")],
    )
    def test_other_files(self, tmp_path, vocabulary, words):
        pytest.importorskip("tokenizers")
        (tmp_path / "encoder.json").write_text(vocabulary)
        (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
        with pytest.raises(ValueError, match=words):
            make_tokenizer(tmp_path)


class TestBatches:
    """The train split of `numbers` has 56 windows: seven steps of eight an epoch."""

    @staticmethod
    def take(corpus, steps, **changes):
        stream = batches(corpus, "train", **(RUN | changes))
        return [next(stream) for _ in range(steps)]

    @staticmethod
    def rows(taken):
        return [row.tobytes() for batch in taken for row in batch["tokens"]]

    def test_targets_are_the_next_tokens(self, numbers):
        text = bytes(numbers.splits["train"])
        for batch in self.take(numbers, 7):
            assert batch["tokens"].shape == batch["targets"].shape == (8, 16)
            assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
            for tokens, targets in zip(*batch.values(), strict=True):
                window = bytes([*tokens.tolist(), targets[-1]])
                assert text.index(window) % 16 == 0
                np.testing.assert_array_equal(tokens[1:], targets[:-1])

    def test_an_epoch_shows_each_window_once_and_the_next_reorders(self, numbers):
        taken = self.rows(self.take(numbers, 14))
        first, second = taken[:56], taken[56:]
        assert len(set(first)) == 56
        assert set(first) == set(second)
        assert first != second

    def test_the_seed_decides_the_order(self, numbers):
        """Seed 4 is not seed 3 one epoch later either."""
        taken = self.rows(self.take(numbers, 14))
        assert taken == self.rows(self.take(numbers, 14))
        other = self.rows(self.take(numbers, 7, seed=4))
        assert other not in (taken[:56], taken[56:])

    @pytest.mark.parametrize("batch_size", [8, 12])
    def test_shards_in_order_are_the_global_batch(self, numbers, batch_size):
        """Batches of 12 straddle the end of an epoch of 56 windows."""
        whole = self.take(numbers, 10, batch_size=batch_size)
        for count in (1, 2, 4):
            parts = [
                self.take(numbers, 10, batch_size=batch_size, shard=(index, count))
                for index in range(count)
            ]
            for step, batch in enumerate(whole):
                for name, value in batch.items():
                    joined = np.concatenate([part[step][name] for part in parts])
                    np.testing.assert_array_equal(joined, value)

    @pytest.mark.parametrize("start", [3, 7, 11])
    def test_start_is_the_step_on_any_count(self, numbers, start):
        """The run that stops has one shard, the one that goes on one, two or four."""
        expected = self.take(numbers, 16)[start:]
        for count in (1, 2, 4):
            parts = [
                self.take(numbers, 16 - start, shard=(index, count), start=start)
                for index in range(count)
            ]
            for step, batch in enumerate(expected):
                joined = np.concatenate([part[step]["tokens"] for part in parts])
                np.testing.assert_array_equal(joined, batch["tokens"])

    def test_state_is_the_number_of_steps_taken(self, numbers):
        stream = batches(numbers, "train", **RUN, start=5)
        assert stream.get_state() == {"next_index": 5}
        for _ in range(4):
            next(stream)
        assert stream.get_state() == {"next_index": 9}
        expected = next(stream)["tokens"]
        stream.set_state({"next_index": 9})  # back, with batches in the buffer
        np.testing.assert_array_equal(next(stream)["tokens"], expected)
        other = batches(numbers, "train", **RUN)
        other.set_state({"next_index": 9})
        np.testing.assert_array_equal(next(other)["tokens"], expected)

    def test_a_batch_may_hold_more_rows_than_the_split(self, numbers):
        [batch] = self.take(numbers, 1, batch_size=60)
        assert len(set(self.rows([batch]))) == 56

    def test_the_longest_window_is_the_split(self, numbers):
        n = len(numbers.splits["test"])
        batch = next(batches(numbers, "test", batch_size=2, seq_len=n - 1, seed=0))
        expected = np.tile(numbers.splits["test"][1:], (2, 1))
        np.testing.assert_array_equal(batch["targets"], expected)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"batch_size": 6, "shard": (0, 4)}, "batch_size is 6.*multiple of 4"),
            ({"seq_len": 50}, "seq_len is 50.*'test' has 50 tokens.*at most 49"),
            ({"batch_size": 0}, "batch_size is 0; allowed is 1"),
            ({"seq_len": 0}, "seq_len is 0; allowed is 1"),
            ({"start": -1}, "start is -1; allowed is 0"),
            ({"seed": -1}, "seed is -1; allowed is 0"),
            ({"shard": (2, 2)}, r"shard is \(2, 2\); allowed"),
            ({"shard": (0, 0)}, r"shard is \(0, 0\); allowed"),
            ({"split": "dev"}, "split is 'dev'; allowed are train, validation, test"),
        ],
    )
    def test_refusals(self, numbers, changes, words):
        with pytest.raises(ValueError, match=words):
            batches(numbers, **({"split": "test"} | RUN | changes))


class TestWindows:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 70), st.integers(1, 9))
    def test_every_target_is_scored_once_in_order(self, numbers, seq_len, batch_size):
        tokens = numbers.splits["test"].astype(np.int32)
        seen, scored = [], []
        for batch in windows(numbers, "test", seq_len, batch_size=batch_size):
            assert {value.shape for value in batch.values()} == {(batch_size, seq_len)}
            assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
            assert batch["mask"].any()
            assert not batch["targets"][~batch["mask"]].any()
            seen.append(batch["tokens"][batch["mask"]])
            scored.append(batch["targets"][batch["mask"]])
        assert sum(map(len, scored)) == len(tokens) - 1
        np.testing.assert_array_equal(np.concatenate(seen), tokens[:-1])
        np.testing.assert_array_equal(np.concatenate(scored), tokens[1:])

    @pytest.mark.parametrize(("limit", "scored"), [(1, 16), (3, 48), (4, 49), (9, 49)])
    def test_limit_counts_windows(self, numbers, limit, scored):
        """The split of 50 tokens has three whole windows of 16 and one target more."""
        found = windows(numbers, "test", 16, batch_size=2, limit=limit)
        assert sum(int(batch["mask"].sum()) for batch in found) == scored

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"seq_len": 0}, "seq_len is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"limit": 0}, "limit is 0"),
            ({"split": "dev"}, "split is 'dev'"),
        ],
    )
    def test_refusals_come_at_the_call(self, numbers, arguments, words):
        call: dict[str, Any] = {"split": "test", "seq_len": 4, "batch_size": 2}
        with pytest.raises(ValueError, match=words):
            windows(numbers, **(call | arguments))
