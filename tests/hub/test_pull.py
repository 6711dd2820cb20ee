# SPDX-License-Identifier: Apache-2.0
"""Downloading from an imitation of the hub: whole, resumed, refused, damaged, without a connection; hostile names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import COMMIT, Repository, serving

from gemma import _hub_download, _hub_names, hub, testing
from gemma._atomic import MANIFEST, verify_manifest
from gemma.errors import CheckpointNotFound, HubError, SaveError

REPO = "google/gemma-3-1b-it"
FILES = {
    "model.safetensors": bytes(range(256)) * 4000,
    "config.json": b'{"model_type": "gemma3_text"}',
    "tokenizer.model": b"tokenizer" * 500,
    "README.md": b"read me",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"something else",
    ".gitattributes": b"x",
}
TAKEN = {"model.safetensors", "config.json", "tokenizer.model", "README.md"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def online(monkeypatch):
    """The suite forbids connections by HF_HUB_OFFLINE; here the hub is on this machine."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is written at a time; these files are small
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's waits between its attempts
    assert huggingface_hub.get_token() is None


@pytest.fixture
def repository(cache, online, monkeypatch):
    repo = Repository(FILES)
    del repo.files[".gitattributes"]
    with serving(repo) as address:
        repo.address = address
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield repo


def pull(repo, model=REPO, **options):
    return hub.pull(model, endpoint=repo.address, **options)


def gets(repo, name):
    return [span for method, path, span in repo.asked if method == "GET" and path.endswith(f"/{name}")]


def test_a_whole_model(repository, cache):
    seen = []
    done = pull(repository, progress=lambda *step: seen.append(step))
    assert done.path == cache / "gemma-3-1b-it" and done.revision == COMMIT and set(done.files) == TAKEN
    for name in TAKEN:
        assert (done.path / name).read_bytes() == FILES[name]
    assert {p.name for p in done.path.iterdir()} == TAKEN | {MANIFEST, _hub_download.SOURCE}
    assert done.size == done.downloaded == sum(len(FILES[name]) for name in TAKEN)
    assert seen[-1][1:] == (done.size, done.size) and [step[1] for step in seen] == sorted(step[1] for step in seen)
    verify_manifest(done.path)
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]
    assert not gets(repository, "modeling_evil.py") and not gets(repository, "pytorch_model.bin")
    assert json.loads((done.path / _hub_download.SOURCE).read_text())["repository"] == REPO


def test_it_is_found_under_every_name(repository, cache):
    path = pull(repository, "gemma3-1b").path
    for name in (
        REPO,
        "gemma-3-1b-it",
        "gemma3_1b",
        "gemma3-1b-it",
        "Gemma-3-1B",
        "gs://gemma-data/checkpoints/gemma3-1b-it",
    ):
        assert hub.resolve(name) == path, name
    with pytest.raises(CheckpointNotFound):
        hub.resolve("gemma3_1b_pt")


def test_a_second_pull_downloads_nothing(repository):
    first = pull(repository)
    asked = len(repository.asked)
    second = pull(repository)
    assert second.path == first.path and second.downloaded == 0 and len(repository.asked) == asked + 1
    (first.path / "config.json").write_bytes(b"")  # truncated since: it is fetched again, and the rest with it
    assert pull(repository).downloaded == first.size
    verify_manifest(first.path)


def test_a_new_commit_replaces_the_old_one(repository):
    first = pull(repository)
    repository.commit, repository.files["config.json"] = "f" * 40, b'{"new": 1}'
    second = pull(repository)
    assert second.path == first.path and (second.path / "config.json").read_bytes() == b'{"new": 1}'
    pinned = pull(repository, revision="v1")
    assert pinned.path.name == "gemma-3-1b-it@v1"


@pytest.mark.parametrize("cut", [0, 5000, 700_000])
def test_a_cut_download_continues(repository, cache, cut):
    repository.faults["model.safetensors"] = [("cut", cut), 503]  # the line breaks, then the server is down
    with pytest.raises(HubError, match="answered 503; try again later, what has arrived is kept"):
        pull(repository)
    assert not (cache / "gemma-3-1b-it").exists()
    (part,) = cache.glob(".*.partial/model.safetensors.part")
    kept = part.stat().st_size
    assert cut - 4096 < kept <= cut and part.read_bytes() == FILES["model.safetensors"][:kept]
    repository.asked.clear()
    done = pull(repository)
    assert gets(repository, "model.safetensors") == [f"bytes={kept}-" if kept else ""]
    assert done.downloaded == len(FILES["model.safetensors"]) - kept
    assert (done.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_line_that_breaks_often(repository):
    repository.faults["model.safetensors"] = [("cut", 200_000)] * 3
    done = pull(repository)
    assert len(gets(repository, "model.safetensors")) == 4 and done.downloaded == done.size
    assert (done.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_server_without_ranges(repository, cache):
    repository.faults["model.safetensors"] = [("cut", 5000), 503, "no ranges"]
    with pytest.raises(HubError):
        pull(repository)
    done = pull(repository)
    assert (done.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("fault", ["damaged", "wrong hash", "too much", "too little"])
def test_what_arrives_damaged_is_not_kept(repository, cache, fault):
    name = "model.safetensors"
    if fault == "wrong hash":
        repository.hashes[name] = "0" * 64
    else:
        repository.faults[name] = fault
    with pytest.raises(HubError, match="damaged|more than|did not arrive completely"):
        pull(repository)
    assert not (cache / "gemma-3-1b-it").exists()
    repository.faults.clear()
    repository.hashes.clear()
    done = pull(repository)
    assert (done.path / name).read_bytes() == FILES[name]


def test_a_damaged_small_file(repository):
    repository.faults["config.json"] = "damaged"
    with pytest.raises(HubError, match="config.json arrived damaged.*SHA-1"):
        pull(repository)


def test_a_damaged_rest_of_an_earlier_download(repository, cache):
    repository.faults["model.safetensors"] = [("cut", 5000), 503]
    with pytest.raises(HubError):
        pull(repository)
    (part,) = cache.glob(".*.partial/model.safetensors.part")
    part.write_bytes(b"\xff" * part.stat().st_size)
    repository.faults.clear()
    with pytest.raises(HubError, match="arrived damaged"):
        pull(repository)
    assert (pull(repository).path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


STATUS = {
    "no token": (
        dict(gated=True),
        None,
        r"access token is needed \(401\).*settings/tokens.*HF_TOKEN.*accept the licence",
    ),
    "a wrong token": (dict(), "wrong", r"access token is needed \(401\).*HF_TOKEN"),
    "no licence": (dict(gated=True), "new", r"may not read it \(403\)\. Accept the licence at http.*gemma-3-1b-it"),
}


@pytest.mark.parametrize("case", STATUS)
def test_rights(repository, case):
    state, token, says = STATUS[case]
    vars(repository).update(state)
    with pytest.raises(HubError, match=says) as caught:
        pull(repository, token=token)
    assert "wrong" not in str(caught.value)  # a token is in no message
    repository.gated = True
    assert pull(repository, token="good").downloaded


def test_the_token_of_the_environment(repository, monkeypatch):
    repository.gated = True
    monkeypatch.setenv("HF_TOKEN", "good")
    assert pull(repository).downloaded
    assert repository.tokens == {"good"}


def test_what_is_not_there(repository):
    with pytest.raises(HubError, match="no such repository for this account.*Check the spelling"):
        pull(repository, "google/gemma-9")
    with pytest.raises(HubError, match="no revision 'v9'"):
        pull(repository, revision="v9")
    with pytest.raises(HubError, match="expected owner/name.*did you mean gemma3_1b"):
        pull(repository, "gemm3_1b")
    repository.listed = [*repository.files, "model-2.safetensors"]
    with pytest.raises(HubError, match=r"model-2.safetensors is not there \(404\)"):
        pull(repository)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server(repository, cache, status):
    repository.faults["api"] = status
    with pytest.raises(HubError, match="wait 7 seconds" if status == 429 else f"answered {status}; try again later"):
        pull(repository)
    repository.faults["api"] = None
    repository.faults["model.safetensors"] = [429, 429]  # the client waits and asks again
    assert (pull(repository).path / "model.safetensors").exists() or status != 429


def test_no_connection(cache, online, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached.*copy the files"):
        hub.pull(REPO, endpoint="http://127.0.0.1:9")


def test_offline(cache):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids connections"):
        hub.pull(REPO)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub.resolve("gs://gemma-data/checkpoints/gemma3-1b-it", download=True)
    with pytest.raises(CheckpointNotFound, match="gemma pull google/gemma-3-1b-it"):
        hub.resolve("gs://gemma-data/checkpoints/gemma3-1b-it")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "new\nline.safetensors", "a//b.safetensors", "x" * 600],
)  # fmt: skip
def test_names_that_would_escape(repository, cache, tmp_path, name):
    repository.listed = ["config.json", "model.safetensors", name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HubError, match="would leave its folder"):
        pull(repository)
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_files_of_git_do_not_matter(repository):
    repository.files |= {".gitattributes": b"x", ".bashrc": b"y", "a/.ssh/z.safetensors": b"z"}
    assert set(pull(repository).files) == TAKEN


def test_links_in_an_unfinished_download(repository, cache, tmp_path):
    folder = cache / f".gemma-3-1b-it.{COMMIT[:12]}.partial"
    folder.mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"mine")
    (folder / "config.json.part").symlink_to(tmp_path / "outside")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(HubError, match="symbolic link"):
        pull(repository)
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_a_folder_that_is_somebody_elses(repository, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(HubError, match="was not downloaded by gemmakit"):
        pull(repository, to=tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="expected a folder to replace"):
        pull(repository, to=tmp_path / "file")
    assert pull(repository, to=tmp_path / "new" / "folder").path == tmp_path / "new" / "folder"


def test_too_little_room(repository, monkeypatch):
    monkeypatch.setattr(_hub_download.shutil, "disk_usage", lambda path: type("U", (), {"free": 1 << 20})())
    with pytest.raises(HubError, match="GB are needed"):
        pull(repository)
    assert not gets(repository, "model.safetensors")


VARIANTS = {"a-Q4_0.gguf": b"4" * 2000, "a-Q8_0.gguf": b"8" * 2000, "config.json": b"{}"}


def test_variants(repository):
    repository.files = dict(VARIANTS)
    with pytest.raises(HubError, match="several variants, say which with --file: a-Q4_0.gguf, a-Q8_0.gguf"):
        pull(repository)
    done = pull(repository, patterns=["*Q8_0.gguf"])
    assert set(done.files) == {"a-Q8_0.gguf", "config.json"}
    with pytest.raises(HubError, match=r"no file matches \*Q5\*; it has: a-Q4_0.gguf"):
        pull(repository, patterns=["*Q5*"])
    again = pull(repository, patterns=["*Q4_0.gguf"])  # another choice replaces the first
    assert {p.name for p in again.path.glob("*.gguf")} == {"a-Q4_0.gguf"}


def test_kinds_of_weights(repository):
    repository.files = {"pytorch_model.bin": b"x", "config.json": b"{}"}
    with pytest.raises(HubError, match="Pickled weights are not downloaded"):
        pull(repository)
    repository.files = {
        "_METADATA": b"{}",
        "manifest.ocdbt": b"x",
        "d/0": b"y" * 5000,
        "other/x.py": b"",
        "tokenizer.model": b"t",
    }
    assert set(pull(repository).files) == {"_METADATA", "manifest.ocdbt", "d/0", "tokenizer.model"}
    repository.commit = "e" * 40
    repository.files = {"model.safetensors": b"x", "Model.safetensors": b"y"}
    with pytest.raises(HubError, match="differ only in case"):
        pull(repository)


def test_other_owners(repository, cache):
    repository.name = "someone/gemma-3-1b-it"
    assert pull(repository, "someone/gemma-3-1b-it").path == cache / "someone--gemma-3-1b-it"
    assert hub.resolve("someone/gemma-3-1b-it").name == "someone--gemma-3-1b-it"
    with pytest.raises(CheckpointNotFound):
        hub.resolve("gemma3_1b")  # not what that name means


def test_the_folder_of_the_environment_wins(repository, tmp_path, monkeypatch):
    pull(repository)
    own = tmp_path / "own" / "gemma-3-1b-it"
    own.mkdir(parents=True)
    monkeypatch.setenv("GEMMA_CHECKPOINT_DIR", f"{tmp_path / 'nothing'}{os.pathsep}{tmp_path / 'own'}")
    assert hub.resolve(REPO) == own


def test_two_at_once(repository, cache):
    """The lock is on the open folder, so two threads exclude each other as two processes do."""
    answers = []

    def work():
        try:
            answers.append(pull(repository).path)
        except HubError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert cache / "gemma-3-1b-it" in answers
    assert all(a == cache / "gemma-3-1b-it" or "another process is downloading" in a for a in answers)
    verify_manifest(cache / "gemma-3-1b-it")


def test_killed_while_downloading(repository, cache):
    repository.files["model.safetensors"] = data = os.urandom(1 << 20) * 24
    code = (
        "import os, sys\nfrom huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = False\nfrom gemma import hub\n"
        f"hub.pull({REPO!r}, endpoint={repository.address!r}, progress=lambda n, here, all: print(here, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    while (line := process.stdout.readline()) and int(line) < 5 << 20:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if line:  # else it was quicker than the signal
        assert not (cache / "gemma-3-1b-it").exists()
        repository.asked.clear()
    done = pull(repository)
    assert (done.path / "model.safetensors").read_bytes() == data
    if line:
        assert gets(repository, "model.safetensors")[0].startswith("bytes=") and done.downloaded < len(data)


def test_pulled_weights_are_read(repository):
    folder = Path(os.environ["GEMMA_CACHE_DIR"]) / "tiny"
    folder.mkdir(parents=True)
    testing.write_tiny_safetensors(folder, testing.tiny_config("gemma3"))
    repository.files = {p.name: p.read_bytes() for p in folder.iterdir()}
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(pull(repository).path) as checkpoint:
        assert checkpoint.config() == testing.tiny_config("gemma3") and len(checkpoint.tensors) > 10


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gemma3_1b", "google/gemma-3-1b-it"),
        ("gemma3-4b-pt", "google/gemma-3-4b-pt"),
        ("gemma_2b", "google/gemma-2b-it"),
        ("gemma-7b-pt", "google/gemma-7b"),
        ("gemma2_9b", "google/gemma-2-9b-it"),
        ("gs://gemma-data/checkpoints/gemma2-2b-pt", "google/gemma-2-2b"),
        ("gs://gemma-data/checkpoints/gemma3n-e2b-it", "google/gemma-3n-E2B-it"),
        ("gs://gemma-data/checkpoints/gemma3n-e4b-pt", "google/gemma-3n-E4B"),
        ("gemma4_e2b", "google/gemma-4-E2B-it"),
        ("gemma-4-26b-a4b-pt", "google/gemma-4-26B-A4B"),
        ("gemma4_2b", None),
        ("codegemma_7b", "google/codegemma-7b-it"),
        ("shieldgemma_2b", "google/shieldgemma-2b"),
        ("shieldgemma2_4b", "google/shieldgemma-2-4b-it"),
        ("medgemma_4b", "google/medgemma-4b-it"),
        ("functiongemma-270m", "google/functiongemma-270m-it"),
        ("paligemma2_3b_448", "google/paligemma2-3b-pt-448"),
        ("t5gemma_b_b", "google/t5gemma-b-b-prefixlm"),
        ("embeddinggemma_300m", "google/embeddinggemma-300m"),
        ("a/b", "a/b"),
        ("gemma3_5b", None),
        ("a/../b", None),
        ("../b", None),
        ("/b", None),
        ("a/b/c", None),
        ("gs://gemma-data/checkpoints/../../x", None),
        ("", None),
    ],
)
def test_names(name, repository):
    assert _hub_names.repository(name) == repository


def test_the_command(repository, cache, capsys):
    from gemma.cli.__main__ import run

    assert run(["pull", "gemma3-1b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["path"] == str(cache / "gemma-3-1b-it") and shown["downloaded"] == shown["bytes"]
    assert run(["pull", REPO]) == 0
    out = capsys.readouterr()
    assert out.out == f"{cache / 'gemma-3-1b-it'}\n" and "was here already; checksums agree" in out.err
    assert run(["pull", REPO, "--to", str(cache / "other"), "--revision", "v1"]) == 0
    assert (cache / "other" / "config.json").is_file()
    capsys.readouterr()
    assert run(["pull", "nobody/nothing"]) == 2
    assert "gemma: error: nobody/nothing: no such repository" in capsys.readouterr().err
