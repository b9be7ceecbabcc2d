"""Text as integers: bytes as they are, or the byte-level BPE of GPT-2."""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

# A run of bytes that are not UTF-8, as `surrogateescape` shows them in a string.
_NOT_TEXT = re.compile("([\udc80-\udcff]+)")
# GPT-2's pattern never joins a visible character and the newline behind it, so text
# may be cut there and encoded in pieces without changing one token.
_SAFE_CUT = re.compile(r"(?<=[!-~])(?=\n)")
_PIECE = 2**16  # characters encoded at a time: bounds the memory of the encoder


class Tokenizer(NamedTuple):
    """A lossless map of bytes to integers: `decode(encode(x)) == x` for any bytes x."""

    name: str
    vocab_size: int
    encode: Callable[[bytes], Integer[np.ndarray, "t"]]
    decode: Callable[[Integer[np.ndarray, "t"]], bytes]
    digest: bytes  # of the vocabulary, so that two of one name are told apart


def make_tokenizer(tokenizer: str | os.PathLike = "bytes") -> Tokenizer:
    """The tokenizer called "bytes", or the BPE whose files lie in a folder.

    The folder holds `encoder.json` (token to id) and `vocab.bpe` (merges in order), in
    GPT-2's format. Bytes that are not UTF-8 become one token each, so nothing is lost.
    Tokens have the smallest unsigned type that holds the vocabulary.

    >>> tokens = make_tokenizer("bytes").encode(b"waist")
    >>> tokens
    array([119,  97, 105, 115, 116], dtype=uint8)
    >>> make_tokenizer("bytes").decode(tokens)
    b'waist'

    Raises: FileNotFoundError without these files, ImportError without the library
    `tokenizers`, ValueError if the files hold no byte-level BPE.
    """
    if tokenizer == "bytes":
        return Tokenizer("bytes", 256, _encode_bytes, _decode_bytes, b"")
    return _bpe(pathlib.Path(tokenizer).expanduser())


def _encode_bytes(data):
    return np.frombuffer(data, np.uint8)


def _decode_bytes(tokens):
    return tokens.astype(np.uint8).tobytes()


def _bpe(folder: pathlib.Path) -> Tokenizer:
    files = [folder / "encoder.json", folder / "vocab.bpe"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer is '{folder}', where there is no file {file.name}: "
                'allowed are "bytes" and a folder with encoder.json and vocab.bpe'
            )
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"tokenizer is '{folder}', and BPE needs the library tokenizers, which is "
            "not installed: pip install 'narrows[bpe]'"
        ) from error
    try:
        model = tokenizers.models.BPE.from_file(*map(str, files))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"tokenizer is '{folder}', whose files are no BPE ({error}): they must be "
            "encoder.json and vocab.bpe in GPT-2's format"
        ) from error
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    byte_of = _stand_ins()
    vocabulary = engine.get_vocab(with_added_tokens=False)
    dense = sorted(vocabulary.values()) == list(range(len(vocabulary)))
    spelled = all(byte_of.keys() >= set(token) for token in vocabulary)
    if not (dense and spelled and byte_of.keys() <= vocabulary.keys()):
        raise ValueError(
            f"tokenizer is '{folder}', whose encoder.json is not a byte-level BPE: its "
            "ids must be 0, 1, 2, ... and every byte must be a token of its own"
        )
    dtype = np.min_scalar_type(len(vocabulary) - 1)
    spelling = [b""] * len(vocabulary)
    for token, index in vocabulary.items():
        spelling[index] = bytes(byte_of[c] for c in token)
    id_of_byte = np.zeros(256, dtype)
    for character, byte in byte_of.items():
        id_of_byte[byte] = vocabulary[character]

    def encode(data):
        parts = [np.zeros(0, dtype)]
        text = data.decode("utf-8", "surrogateescape")
        for i, run in enumerate(_NOT_TEXT.split(text)):
            if i % 2:  # split() alternates between text and what it was split by
                raw = run.encode("utf-8", "surrogateescape")
                parts.append(id_of_byte[np.frombuffer(raw, np.uint8)])
                continue
            for piece in _pieces(run):
                # "fast" leaves out the position of each token, a quarter of the time.
                [found] = engine.encode_batch_fast([piece], add_special_tokens=False)
                parts.append(np.array(found.ids, dtype))
        return np.concatenate(parts)

    def decode(tokens):
        return b"".join(spelling[i] for i in tokens.tolist())

    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return Tokenizer("bpe", len(vocabulary), encode, decode, digest.digest())


@functools.cache
def _stand_ins() -> dict[str, int]:
    """The character by which GPT-2's files spell each byte, and that byte.

    What Latin-1 prints stands for itself, the others follow in order from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    characters = [*visible, *range(256, 256 + len(hidden))]
    return dict(zip(map(chr, characters), visible + hidden, strict=True))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PIECE)
        stop = cut.start() if cut else len(text)
        yield text[start:stop]
        start = stop
