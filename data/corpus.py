"""A corpus: the tokens of a text in three splits, and what it takes to trust them."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Mapping

import numpy as np
from jaxtyping import Integer

from .tokens import Tokenizer, make_tokenizer

SPLITS = ("train", "validation", "test")
_UNTIL = (0.90, 0.95, 1.0)  # where each split ends, as a fraction of files or of bytes
_LEAST = 40  # bytes: a split by position then has two, so one to predict, in each

# Test folders and build records of the standard library are left out because many
# distributions remove or patch them; what stays depends on Python's version alone.
_SKIP_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "idle_test")
_SKIP_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens by split. Made by `load_corpus`; the arrays are read-only.

    A loss in nats per token is `loss / ln 2 / bytes_per_token[split]` bits per byte,
    which compares models across tokenizers.
    """

    splits: Mapping[str, Integer[np.ndarray, "t"]]  # smallest unsigned type that fits
    vocab_size: int
    bytes_per_token: Mapping[str, float]
    hash: str  # of the tokens, their order and split, and the tokenizer; not of paths
    source: str  # where it came from and how it was split, for people
    tokenizer: Tokenizer

    def encode(self, text: bytes | str) -> Integer[np.ndarray, "t"]:
        """Tokens of a text; a string is taken as UTF-8."""
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        return self.tokenizer.encode(text)

    def decode(self, tokens) -> bytes:
        """The bytes that tokens (any sequence of integers) spell.

        `decode(encode(x)) == x` for any bytes. For people, and for models that may stop
        inside a character: `decode(tokens).decode("utf-8", "replace")`.
        """
        tokens = np.asarray(tokens)
        if not tokens.size:
            return b""
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens is a {tokens.dtype} array of shape {tokens.shape}; "
                "allowed is one dimension of integers"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"tokens spans {tokens.min()} to {tokens.max()}; allowed is 0 to "
                f"{self.vocab_size - 1}: mask the padded part of the vocabulary"
            )
        return self.tokenizer.decode(tokens)

    def describe(self) -> str:
        """One line for a log."""
        sizes = ", ".join(
            f"{split} {len(self.splits[split]):,} tokens of "
            f"{self.bytes_per_token[split]:.3g} bytes"
            for split in SPLITS
        )
        return (
            f"{self.source}; tokenizer {self.tokenizer.name}, vocabulary "
            f"{self.vocab_size:,}; {sizes}; hash {self.hash[:12]}"
        )


def load_corpus(
    data: str | os.PathLike | None = None, *, tokenizer: str | os.PathLike = "bytes"
) -> Corpus:
    """Read a text, split it about 90/5/5 and turn it into tokens.

    data: None is the source text of the running Python's standard library (`*.py`
    without test folders and installed packages: some 10 MB of real text on every
    machine; another Python version is another corpus, hence another hash). Otherwise a
    file or a folder. Of a folder every file without a NUL byte is read, recursively, in
    order of relative path; hidden names and linked folders are left out. Files are
    joined with nothing between.

    A folder is split by file, by a hash of its relative path, so a file stays in its
    split when others come or go. Where that leaves a split with less than two bytes,
    and for a single file, the joined text is cut by position at 90 and 95 %;
    `describe()` says which it was.

    tokenizer: "bytes", or a folder with `encoder.json` and `vocab.bpe`
    (see `narrows.data.tokens.make_tokenizer`).

    >>> corpus = load_corpus()
    >>> corpus.vocab_size, corpus.splits["train"].dtype
    (256, dtype('uint8'))
    >>> corpus.decode(corpus.encode("waist"))
    b'waist'

    Raises: FileNotFoundError if there is nothing at `data`, ValueError if it cannot be
    read or holds less than 40 bytes of text.
    """
    tools = make_tokenizer(tokenizer)  # first: a wrong name costs no reading
    try:
        source, files = _read(data)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"data is '{data}', which cannot be read ({error}): allowed is a file or "
            "folder that this user may read"
        ) from error
    size = sum(map(len, files.values()))
    if size < _LEAST:
        raise ValueError(
            f"data is {source} with {size} bytes of text in {len(files)} files: "
            f"allowed is at least {_LEAST} bytes, so that no split is empty"
        )

    documents = _split_by_file(files)
    how = "split by file"
    if min(sum(map(len, documents[split])) for split in SPLITS) < 2:
        documents = _split_by_position(b"".join(files.values()))
        how = "split by position"
    tokens, ratio = {}, {}
    digest = hashlib.blake2b(tools.digest, digest_size=16, person=tools.name.encode())
    for split in SPLITS:
        tokens[split] = np.concatenate([tools.encode(d) for d in documents[split]])
        tokens[split].flags.writeable = False
        ratio[split] = sum(map(len, documents[split])) / len(tokens[split])
        digest.update(f"{split} {len(tokens[split])} {tokens[split].dtype}".encode())
        digest.update(tokens[split].data)
    return Corpus(
        splits=tokens,
        vocab_size=tools.vocab_size,
        bytes_per_token=ratio,
        hash=digest.hexdigest(),
        source=f"{source}, {len(files):,} file{'s' * (len(files) > 1)} {how}",
        tokenizer=tools,
    )


def split_of(path: str) -> str:
    """The split of a file, by the blake2b hash of its relative path (with slashes).

    >>> split_of("json/decoder.py")
    'train'
    """
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return next(s for s, end in zip(SPLITS, _UNTIL, strict=True) if place < end)


def _read(data) -> tuple[str, dict[str, bytes]]:
    """What to call the text, and its files by relative path, in order."""
    if data is None:
        folder = pathlib.Path(sysconfig.get_path("stdlib"))
        names = [n for n in _list(folder, _SKIP_FOLDERS) if n.endswith(".py")]
        names = [n for n in names if not n.startswith(_SKIP_PREFIXES)]
        source = f"the standard library of Python {platform.python_version()}"
        return source, {n: (folder / n).read_bytes() for n in names}
    path = pathlib.Path(data).expanduser()
    if not os.fspath(data) or not path.exists():
        raise FileNotFoundError(
            f"data is '{data}', where there is nothing: allowed is the path of a text "
            "file or of a folder of them, or None for Python's standard library"
        )
    if not path.is_dir():
        return f"'{path.name}'", {path.name: path.read_bytes()}
    read = {name: (path / name).read_bytes() for name in _list(path)}
    return f"'{path.name}'", {n: text for n, text in read.items() if b"\0" not in text}


def _list(folder: pathlib.Path, skip: tuple[str, ...] = ()) -> list[str]:
    """Relative paths of the files below a folder, sorted, with slashes."""

    def refuse(error):  # os.walk leaves out what it may not read, without a word
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        paths = [pathlib.Path(parent, n) for n in names if not n.startswith(".")]
        found += [p.relative_to(folder).as_posix() for p in paths if p.is_file()]
    return sorted(found)


def _split_by_file(files: dict[str, bytes]) -> dict[str, list[bytes]]:
    documents = {split: [] for split in SPLITS}
    for name, text in files.items():
        documents[split_of(name)].append(text)
    return documents


def _split_by_position(text: bytes) -> dict[str, list[bytes]]:
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    parts = text[:first], text[first:second], text[second:]
    return {split: [part] for split, part in zip(SPLITS, parts, strict=True)}
