# SPDX-License-Identifier: Apache-2.0
"""Preparation of the data of docs/results.md, on made-up archives: what is read, how it is split, how it is scored."""

import hashlib
import io
import math
import tarfile
import zipfile

import _messages
import _packages
import _ratings
import pytest
from _messages import Pair
from _ratings import Snippet

from gemma.errors import DataError


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_an_archive_in_an_archive_is_read_without_being_unpacked():
    movies = b"1\t2.5\tA  joy from end to end .\n\n2\t-3.0\tNobody needs this\n"
    news = b"1_1\t0.4\tThe council met.\n1_2\t-0.2\tIt adjourned.\n2_1\t0\tRain is coming.\n"
    inner = tar({f"hutto/{_ratings.FILES['movies']}": movies, f"hutto/{_ratings.FILES['news']}": news})
    rows = _ratings.read_snippets(tar({"vader/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert [(r.source, r.id, r.rating) for r in rows[:2]] == [("movies", "1", 2.5), ("movies", "2", -3.0)]
    assert rows[0].text == "A joy from end to end ."
    assert rows[2].group == rows[3].group != rows[4].group, "sentences of one article stay together"
    with pytest.raises(DataError, match=r"nothing\.txt: expected in the archive"):
        _packages.tar_member(inner, "nothing.txt")


@pytest.mark.parametrize("line", ["1\t2.5", "1\tgood\tA text", "1\t4.5\tA text"])
def test_a_line_that_is_no_rating_is_named(line):
    with pytest.raises(DataError, match="news, line 2: expected id, rating"):
        _ratings.parse_ratings(f"1\t0\tfine\n{line}\n".encode(), "news")


def test_other_bytes_are_refused(tmp_path):
    archive = _packages.Archive("a==1", "a.whl", hashlib.sha256(b"right").hexdigest(), "MIT")
    (tmp_path / "a.whl").write_bytes(b"wrong")
    with pytest.raises(DataError, match="expected SHA-256"):
        _packages.fetch(archive, tmp_path)
    (tmp_path / "a.whl").write_bytes(b"right")
    assert _packages.fetch(archive, tmp_path).read_bytes() == b"right"


def test_near_duplicates_are_on_one_side_and_the_split_is_a_function_of_the_rows():
    long = "the slow and careful film about a lighthouse keeper never loses its way"
    rows = [Snippet("movies", str(i), 0.0, " ".join(f"w{i}x{j}" for j in range(7))) for i in range(200)]
    rows += [Snippet("movies", "a", 1.0, long), Snippet("movies", "b", 1.2, long.upper() + " !")]
    rows += [Snippet("movies", "c", 0.9, f"I think {long}"), Snippet("movies", "d", -1.0, "the slow and late film")]
    grouped = _ratings.with_groups(rows)
    by_id = {row.id: row.group for row in grouped}
    assert by_id["a"] == by_id["b"] == by_id["c"] != by_id["d"]
    train, held = _ratings.split(grouped, 0.3)
    assert not {row.group for row in train} & {row.group for row in held}
    assert len(train) + len(held) == len(rows) and 30 < len(held) < 90
    again, _ = _ratings.split(list(reversed(grouped)), 0.3)
    assert [row.id for row in again] == [row.id for row in train], "neither sides nor order come from the file"
    assert [row.id for row in _ratings.first_of_each(train, {"movies": 3})] == [row.id for row in train[:3]]


def test_labels_and_correlation():
    assert [_ratings.label(r) for r in (-4, -3.5, -0.51, -0.5, 0.49, 3.5, 4)] == list("0134488"[:7])
    assert math.isclose(_ratings.pearson([1, 2, 3, 4], [2, 1, 4, 3]), 0.6)
    low, high = _ratings.interval(0.5, 103)
    assert math.isclose(math.atanh(high) - math.atanh(0.5), 0.1959964, rel_tol=1e-6) and low < 0.5
    with pytest.raises(DataError, match="all the same"):
        _ratings.pearson([1, 2], [3, 3])


PO = r"""# Translators
msgid ""
msgstr ""
"Language: de\n"

#: a.py:1
msgid "Hello"
msgstr "Hallo"

#, fuzzy
msgid "Old text"
msgstr "Alter Text"

msgctxt "month"
msgid ""
"May has "
"%(days)s days"
msgstr "Der Mai hat %(days)s Tage"
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid "Not \"done\""
msgstr ""

#~ msgid "Gone"
#~ msgstr "Weg"
"""


def test_po_files():
    assert list(_messages.parse_po(PO)) == [
        ("Hello", "Hallo"),
        ("May has %(days)s days", "Der Mai hat %(days)s Tage"),
        ("%d file", "%d Datei"),
    ]
    for text in ('msgid "a"\nwhat is this\n', '"alone"\n', 'msgid "open\n'):
        with pytest.raises(DataError, match="expected msgid, msgstr or a quoted string"):
            list(_messages.parse_po(text))


def test_pairs_of_a_wheel(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/locale/de/LC_MESSAGES/django.po", PO)
        archive.writestr("y/locale/de/LC_MESSAGES/django.po", 'msgid "Hello"\nmsgstr "Guten Tag"\n')
        archive.writestr("x/locale/fr/LC_MESSAGES/django.po", 'msgid "Hello"\nmsgstr "Bonjour"\n')
        archive.writestr("x/locale/es/LC_MESSAGES/django.po", 'msgid "Hello"\nmsgstr "Hola"\n')
    pairs = _messages.read_pairs(wheel)
    assert [(p.language, p.message, p.translation) for p in pairs] == [
        ("de", "Hello", "Hallo"),
        ("de", "May has %(days)s days", "Der Mai hat %(days)s Tage"),
        ("de", "%d file", "%d Datei"),
        ("fr", "Hello", "Bonjour"),
    ]
    prompt = _messages.few_shot(pairs, "Good %s", "de", 1)
    assert prompt == "English: Hello\nGerman: Hallo\n\nEnglish: Good %s\nGerman:"


def test_a_message_is_on_one_side_in_all_languages():
    pairs = [
        Pair(lang, f"Message {chr(97 + i)}{chr(97 + j)} of %(n)s", "x")
        for lang in ("de", "fr")
        for i in range(12)
        for j in range(12)
    ]
    pairs += [Pair("de", "message AA, of {count}!", "x"), Pair("fr", "Delete?", "x"), Pair("fr", "delete %(it)s", "x")]
    train, held = _messages.split(pairs, 0.25)
    assert not {pair.group for pair in train} & {pair.group for pair in held}
    assert not {pair.message for pair in train} & {pair.message for pair in held}
    assert len(train) + len(held) == len(pairs) and len(held) > 20
    assert pairs[-1].group == pairs[-2].group


def test_placeholders():
    one = _messages.placeholders('See <a href="/en/">%(name)s</a> and {x}, %d %% of %s')
    assert one == _messages.placeholders("%s, %d: {x} <a href='/de/'>%(name)s</a>")
    assert one != _messages.placeholders("%s, %d: {x} %(name)s")
    assert not _messages.placeholders("100 % sure")
