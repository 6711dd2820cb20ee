# SPDX-License-Identifier: Apache-2.0
"""Snippets that people rated, out of the archive of the VADER paper: rows, near duplicates, sides of a split, labels.

A rating is the mean of some 20 people's, between -4 (extremely negative) and 4. The model picks one of nine digits;
the expected value of its distribution over them is its rating. The run itself is `sentiment.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

from _packages import tar_member

from gemma.errors import DataError

FILES = {"movies": "movieReviewSnippets_GroundTruth.txt", "news": "nytEditorialSnippets_GroundTruth.txt"}
PUBLISHED = {"movies": 0.451, "news": 0.492}  # VADER's r with the mean rating, table 4 of the paper in the archive
LABELS = tuple("012345678")  # ratings -4 ... 4, rounded; each is one token
TEMPLATE = "{text}\nRating from 0 to 8: "  # 0 is the most negative, 4 neutral; a digit is a token of its own
SEED = 20
SHINGLE = 4  # words
NEIGHBOURS = 50  # earlier rows with the same words that a row is compared with


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A rated text. `source` is a key of FILES; `group` is what must not be torn apart by a split."""

    source: str
    id: str
    rating: float
    text: str
    group: str = ""


def read_snippets(archive: Path | bytes) -> list[Snippet]:
    """All snippets of the source archive of vaderSentiment, in file order, their groups set."""
    inner = tar_member(archive, "hutto_ICWSM_2014.tar.gz")
    rows = []
    for source, name in FILES.items():
        rows += parse_ratings(tar_member(inner, name), source)
    return with_groups(rows)


def parse_ratings(data: bytes, source: str) -> list[Snippet]:
    """Lines of `id TAB rating TAB text`.

    Raises:
      DataError: a line that is none, or a rating outside -4..4; with its number.
    """
    rows = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t", 2)
        try:
            rating = float(parts[1])
        except (IndexError, ValueError):
            rating = math.nan
        if len(parts) != 3 or not -4 <= rating <= 4:
            raise DataError(f"{source}, line {number}: expected id, rating from -4 to 4 and text, got {line[:80]!r}")
        rows.append(Snippet(source, parts[0].strip(), rating, " ".join(parts[2].split())))
    return rows


def with_groups(rows: Sequence[Snippet]) -> list[Snippet]:
    """The rows with groups: near duplicates are in one, and all sentences of one article of the news.

    Near duplicates have the same words, or share at least half of the shorter one's runs of four words.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[object, list[int]] = {}
    shingles = []
    for i, row in enumerate(rows):
        words = re.findall(r"\w+", row.text.lower())
        runs = {tuple(words[j : j + SHINGLE]) for j in range(len(words) - SHINGLE + 1)} or {tuple(words)}
        shingles.append(runs)
        if row.source == "news":
            seen.setdefault(("article", row.id.split("_")[0]), []).append(i)
        for run in runs:
            seen.setdefault(run, []).append(i)
    for key, places in seen.items():
        article = key[0] == "article" and len(key) == 2
        for at, i in enumerate(places):
            for j in places[max(0, at - NEIGHBOURS) : at]:
                shared = len(shingles[j] & shingles[i])
                if article or 2 * shared >= min(len(shingles[j]), len(shingles[i])):
                    parent[max(root(j), root(i))] = min(root(j), root(i))
    return [dataclasses.replace(row, group=f"{rows[root(i)].source}-{rows[root(i)].id}") for i, row in enumerate(rows)]


def split(rows: Sequence[Snippet], held_share: float = 0.2, seed: int = SEED) -> tuple[list[Snippet], list[Snippet]]:
    """(for training, held out): whole groups, by a hash of their name. Each part is in the hash's order, not the file's,
    so that its first rows are a fair sample.
    """
    train, held = [], []
    for row in rows:
        (held if _draw(f"{seed} side {row.group}") < held_share else train).append(row)
    for part in (train, held):
        part.sort(key=lambda row: _draw(f"{seed} order {row.source} {row.id} {row.text}"))
    return train, held


def first_of_each(rows: Iterable[Snippet], counts: dict[str, int]) -> list[Snippet]:
    """The first rows of each source, so many as `counts` says."""
    left = dict(counts)
    chosen = []
    for row in rows:
        if left.get(row.source, 0) > 0:
            left[row.source] -= 1
            chosen.append(row)
    return chosen


def label(rating: float) -> str:
    """The digit of a rating: the nearest, a half upwards."""
    return LABELS[min(max(math.floor(rating + 4.5), 0), len(LABELS) - 1)]


def pearson(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's r, in float64.

    Raises:
      DataError: fewer than two pairs, or values that are all the same.
    """
    n = len(left)
    if n != len(right) or n < 2:
        raise DataError(f"pearson: expected two lists of one length, at least 2, got {n} and {len(right)}")
    mean_l, mean_r = math.fsum(left) / n, math.fsum(right) / n
    cross = math.fsum((a - mean_l) * (b - mean_r) for a, b in zip(left, right))
    square = math.fsum((a - mean_l) ** 2 for a in left) * math.fsum((b - mean_r) ** 2 for b in right)
    if square <= 0:
        raise DataError("pearson: expected values that differ, they are all the same")
    return cross / math.sqrt(square)


def interval(r: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a correlation of n pairs, by Fisher's transform."""
    middle, half = math.atanh(r), 1.959964 / math.sqrt(n - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def lexicon_scores(archive: Path, texts: Sequence[str]) -> list[float]:
    """What the package itself says of each text, -1 to 1: its module is run from the archive that was checked."""
    source = tar_member(archive, "vaderSentiment-3.3.2/vaderSentiment/vaderSentiment.py").decode("utf-8")
    lexicon = tar_member(archive, "vaderSentiment/vader_lexicon.txt").decode("utf-8")
    module = types.ModuleType("vaderSentiment")
    exec(compile(source, "vaderSentiment.py", "exec"), module.__dict__)
    analyzer = object.__new__(module.SentimentIntensityAnalyzer)  # its __init__ looks for the files beside the module
    analyzer.lexicon_full_filepath = lexicon  # the texts, whatever the names say
    analyzer.emoji_full_filepath = tar_member(archive, "vaderSentiment/emoji_utf8_lexicon.txt").decode("utf-8")
    analyzer.lexicon, analyzer.emojis = analyzer.make_lex_dict(), analyzer.make_emoji_dict()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def _draw(text: str) -> float:
    """A number in [0, 1) that is the text's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
