# SPDX-License-Identifier: Apache-2.0
"""The file explorer: what it shows, and every way out of its root that must be closed."""

import os
import socket
import threading

import pytest

from gemma.errors import ToolError
from gemma.gm.tools import FileExplorer


@pytest.fixture
def tree(tmp_path):
    """root/ beside a secret, and a sibling whose name begins as the root's does."""
    root = tmp_path / "root"
    (root / "notes").mkdir(parents=True)
    (root / "notes/list.txt").write_text("milk\nbread\n")
    (root / "empty").mkdir()
    (root / "~").mkdir()
    (root / "~/home.txt").write_text("not a home")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2/secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "inner.txt").symlink_to("notes/list.txt")
    (root / "out").symlink_to(tmp_path)
    (root / "chain").symlink_to("out")
    (root / "loop").symlink_to("loop")
    return root


def test_cat_and_ls(tree):
    explorer = FileExplorer(root=tree)
    assert explorer.call(method="cat", path="notes/list.txt") == "milk\nbread\n"
    assert explorer.call(method="cat", path="./notes//list.txt") == "milk\nbread\n"
    assert explorer.call(method="cat", path=str(tree / "notes/list.txt")) == "milk\nbread\n"
    assert explorer.call(method="cat", path="~/home.txt") == "not a home"
    assert explorer.call(method="ls", path="notes") == "list.txt"
    assert explorer.call(method="ls", path="empty") == "(the folder is empty)"
    listed = explorer.call(method="ls", path=".").splitlines()
    assert listed == explorer.call(method="ls", path=str(tree)).splitlines() == explorer.call(method="ls").splitlines()
    assert listed[-1] == "~/" and "notes/" in listed and "link.txt (a link, not followed)" in listed


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "notes/../../secret.txt",
        "notes/../notes/list.txt",
        "..",
        "/etc/hostname",
        "/",
        "//etc/hostname",
        "{parent}/secret.txt",
        "{parent}/root2/secret.txt",
        "{root}2/secret.txt",
        "{root}/../secret.txt",
        "../root2/secret.txt",
        "link.txt",
        "inner.txt",
        "out/secret.txt",
        "chain/secret.txt",
        "out/root2/secret.txt",
        "loop",
        "loop/x",
        "notes/list.txt/x",
        "/proc/self/environ",
        f"{os.sep}proc/self/root{os.sep}etc/hostname",
        "~root",
        "nothing.txt",
        "a\0b",
        "..\0",
        "",
        "x" * 5000,
        "x/" * 1000,
        "\ud800",
        None,
        5,
        ["notes"],
        {"path": "notes"},
    ],
)
@pytest.mark.parametrize("method", ["cat", "ls"])
def test_no_way_out(tree, path, method):
    if isinstance(path, str):
        path = path.replace("{root}", str(tree)).replace("{parent}", str(tree.parent))
    with pytest.raises(ToolError, match="path: "):
        FileExplorer(root=tree).call(method=method, path=path)


@pytest.mark.parametrize("method", ["rm", "", None, "CAT", ["cat"], "write"])
def test_other_methods(tree, method):
    with pytest.raises(ToolError, match="expected cat or ls"):
        FileExplorer(root=tree).call(method=method, path="notes")


def test_cat_of_a_folder_and_ls_of_a_file(tree):
    with pytest.raises(ToolError, match="is not a regular file"):
        FileExplorer(root=tree).call(method="cat", path="notes")
    with pytest.raises(ToolError, match="no folder"):
        FileExplorer(root=tree).call(method="ls", path="notes/list.txt")


def test_pipes_sockets_and_devices_do_not_hang(tree, monkeypatch):
    os.mkfifo(tree / "pipe")
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(ToolError, match="regular file|cannot be opened"):
                FileExplorer(root=tree).call(method="cat", path=name)
    with pytest.raises(ToolError, match="regular file|cannot be opened"):
        FileExplorer(root="/dev").call(method="cat", path="zero")


def test_binary_files_are_named_not_shown(tree):
    for data in (b"\x89PNG\r\n\x1a\n\0\0", b"abc\0def", b"\xff\xfe\x00", b"caf\xe9"):
        (tree / "binary").write_bytes(data)
        with pytest.raises(ToolError, match=rf"is not a text file \({len(data)} bytes\)"):
            FileExplorer(root=tree).call(method="cat", path="binary")


def test_long_files_are_cut_between_characters(tree):
    text = "é" * 100
    (tree / "long.txt").write_text(text, encoding="utf-8")
    found = FileExplorer(root=tree, max_bytes=51).call(method="cat", path="long.txt")
    assert found == "é" * 25 + "\n[... cut after 51 of 200 bytes]"
    assert FileExplorer(root=tree, max_bytes=200).call(method="cat", path="long.txt") == text


def test_a_huge_sparse_file_is_read_no_further_than_needed(tree):
    with open(tree / "huge", "wb") as file:
        file.write(b"begin")
        file.truncate(10 << 30)
    with pytest.raises(ToolError, match="not a text file"):  # what follows is NUL
        FileExplorer(root=tree).call(method="cat", path="huge")
    assert FileExplorer(root=tree, max_bytes=5).call(method="cat", path="huge").startswith("begin\n[... cut after 5 of")


def test_long_folders_are_cut(tree):
    (tree / "many").mkdir()
    for n in range(30):
        (tree / f"many/{n:02}").touch()
    lines = FileExplorer(root=tree, max_entries=10).call(method="ls", path="many").splitlines()
    assert lines == [f"{n:02}" for n in range(10)] + ["[... 20 more]"]


def test_names_that_are_no_text_or_imitate_lines(tree):
    (tree / "odd").mkdir()
    for name in (b"caf\xe9", b"two\nlines", b"\x1b[31mred"):
        with open(os.fsencode(tree) + b"/odd/" + name, "w"):
            pass
    listed = FileExplorer(root=tree).call(method="ls", path="odd")
    assert listed.count("\n") == 2 and "\x1b" not in listed and r"caf\xe9" in listed and r"two\nlines" in listed


def test_a_folder_swapped_for_a_link_while_reading(tree):
    """Whatever the moment, the secret is never read."""
    (tree / "swap").mkdir()
    (tree / "swap/secret.txt").write_text("harmless")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            os.rename(tree / "swap", tree / "aside")
            os.symlink(tree.parent, tree / "swap")
            os.unlink(tree / "swap")
            os.rename(tree / "aside", tree / "swap")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        explorer, seen = FileExplorer(root=tree), set()
        for _ in range(2000):
            try:
                seen.add(explorer.call(method="cat", path="swap/secret.txt"))
            except ToolError:
                seen.add("refused")
    finally:
        stop.set()
        thread.join()
    assert "secret" not in seen


def test_the_root_is_fixed_when_it_is_made(tree, monkeypatch):
    monkeypatch.chdir(tree / "notes")
    explorer = FileExplorer()
    monkeypatch.chdir(tree.parent)
    assert explorer.call(method="ls") == "list.txt"
    (tree.parent / "alias").symlink_to(tree)
    aliased = FileExplorer(root=tree.parent / "alias")
    for spelled in (tree.parent / "alias", tree):
        assert aliased.call(method="cat", path=f"{spelled}/notes/list.txt") == "milk\nbread\n"


def test_no_descriptor_is_left_open(tree):
    explorer, before = FileExplorer(root=tree), len(os.listdir("/proc/self/fd"))
    for path in ("notes/list.txt", "link.txt", "out/secret.txt", "notes", "nothing/at/all"):
        for method in ("cat", "ls"):
            try:
                explorer.call(method=method, path=path)
            except ToolError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("arguments", [dict(root="/no/such"), dict(root=5), dict(max_bytes=0), dict(max_entries=0)])
def test_settings_are_checked(arguments):
    with pytest.raises(ToolError, match="root|above 0"):
        FileExplorer(**arguments)
