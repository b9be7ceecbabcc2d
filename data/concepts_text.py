"""Passages of four bodies of English text, with concepts that their letters decide.

Which text a passage is from is the class. A concept is a question about its characters
or words, such as whether it holds a digit: nothing in it knows the class.
"""

import gzip
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Integer
from sklearn.feature_extraction.text import HashingVectorizer

SOURCES = ("shakespeare", "war_and_peace", "les_miserables", "wikipedia")
FILES = {
    "shakespeare": "tinyshakespeare/input.txt",
    "war_and_peace": "gutenberg_en/war_and_peace.txt.gz",
    "les_miserables": "gutenberg_en/les_miserables.txt.gz",
    "wikipedia": "wikitext2/train.txt.gz",
}
OLD = re.compile(r"\b(thou|thee|thy|thine|hath|doth|art|'tis|ye|o'er)\b", re.I)
CONCEPTS: Mapping[str, Callable[[str], bool]] = {
    "digits": lambda t: bool(re.search(r"\d", t)),
    "question": lambda t: "?" in t,
    "exclamation": lambda t: "!" in t,
    "old_words": lambda t: bool(OLD.search(t)),
    "first_person": lambda t: bool(re.search(r"\b(I|me|my|mine)\b", t)),
    "past": lambda t: len(re.findall(r"\b(was|were|had|\w+ed)\b", t)) >= 3,
    "semicolon": lambda t: ";" in t or ":" in t,
    "long_words": lambda t: len(re.findall(r"\b\w{10,}\b", t)) >= 2,
    "names": lambda t: len(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", t)) >= 2,
}


class Passages(NamedTuple):
    text: list[str]
    concepts: Integer[np.ndarray, "n 9"]  # CONCEPTS, 0 or 1
    labels: Integer[np.ndarray, " n"]  # where its source stands in SOURCES


def load_passages(
    folder: str | pathlib.Path, n: int, *, seed: int, length: int = 200
) -> tuple[Passages, Passages]:
    """n passages to learn from and n to test: the first 80 % of a text, and the rest.

    Passages are windows of `length` characters, drawn with replacement, as many of each
    text; white space counts as one blank, and tokens that only Wikipedia's preparation
    has ("<unk>", " @-@ ", headings' signs, blanks before stops) are taken out.
    Raises FileNotFoundError where the folder lacks a text.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[str], list[str]] = ([], [])
    labels = np.arange(n) % len(SOURCES)
    whole = {source: _read(pathlib.Path(folder) / FILES[source]) for source in SOURCES}
    for part, (first, last) in zip(parts, ((0.0, 0.8), (0.8, 1.0)), strict=True):
        for label in labels:
            text = whole[SOURCES[label]]
            start = rng.integers(int(first * len(text)), int(last * len(text)) - length)
            part.append(text[start : start + length])
    learn, test = (Passages(text, text_concepts(text), labels) for text in parts)
    return learn, test


def text_concepts(text: list[str]) -> Integer[np.ndarray, "n 9"]:
    """CONCEPTS of each passage, 0 or 1.

    >>> text_concepts(["Hath it 9 lives?"])[0].tolist()
    [1, 1, 0, 1, 0, 0, 0, 0, 0]
    """
    return np.array([[int(ask(t)) for ask in CONCEPTS.values()] for t in text])


def text_features(text: list[str], width: int = 512) -> Float32[np.ndarray, "n width"]:
    """Hashed counts of words and pieces of words, each row of length 1."""
    words = HashingVectorizer(n_features=width // 2, token_pattern=r"\w+|[^\w\s]")
    pieces = HashingVectorizer(
        n_features=width - width // 2, analyzer="char_wb", ngram_range=(2, 3)
    )
    both = [of.transform(text).toarray() for of in (words, pieces)]
    return np.concatenate(both, 1).astype(np.float32) / np.sqrt(2)


def _read(path: pathlib.Path) -> str:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    for pattern, instead in ((r"<unk>|=", " "), (r" @([-,.])@ ", r"\1"), (r"\s+", " ")):
        text = re.sub(pattern, instead, text)
    text = re.sub(r" ([,.;:!?')])", r"\1", text)
    return re.sub(r" '(s|t|d|ll|re|ve|m)\b", r"'\1", text)
