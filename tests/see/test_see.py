# SPDX-License-Identifier: Apache-2.0
"""`gemma see` with the model that ships: answers, boxes, the drawn picture, and every way to use it wrongly."""

import importlib.util
import json
import re
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from gemma import hub
from gemma.cli import see
from gemma.cli.__main__ import run
from gemma.errors import PromptError
from paligemma.detection import Detection

pytest.importorskip("torch")

SCENE = hub.resolve("digits") / "scene.png"
DIGITS = ["three", "zero", "five", "zero"]  # what is in it, as the boxes stand
CAPTION, NUMBER = "two zeros, a three and a five", "four"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def gemma(capsys, monkeypatch, tmp_path):
    """gemma("see", ...) in an empty folder -> Result(code, out, err)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> Result:
        code = run([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return call


# --- answers


def test_captions_by_default_and_writes_nothing(gemma, tmp_path):
    result = gemma("see", SCENE)
    assert result.code == 0 and result.out == CAPTION + "\n" and not result.err
    assert not list(tmp_path.iterdir())


def test_detect_prints_boxes_and_draws_them(gemma, tmp_path):
    result = gemma("see", SCENE, "detect digit", "--out", "found.png")
    lines = result.out.splitlines()
    assert result.code == 0 and sorted(line.split()[0] for line in lines) == sorted(DIGITS)
    for line in lines:
        left, top, right, bottom, score = line.split()[1:]
        assert 0 <= int(left) < int(right) <= 64 and 0 <= int(top) < int(bottom) <= 64
        assert 50 <= int(score.removesuffix("%")) <= 100
    assert "found.png" in result.err and [path.name for path in tmp_path.iterdir()] == ["found.png"]
    drawn, scene = np.asarray(Image.open("found.png")), np.asarray(Image.open(SCENE))
    assert drawn.shape == (448, 448, 3)  # 64 pixels are enlarged seven times
    changed = (drawn != np.repeat(np.repeat(scene, 7, 0), 7, 1)).any(-1)
    assert 0.005 < changed.mean() < 0.5


def test_without_out_the_picture_is_named_after_its_source(gemma, tmp_path):
    assert gemma("see", SCENE, f"detect {DIGITS[0]}").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scene.boxes.png"]


def test_json(gemma, tmp_path):
    result = gemma("see", SCENE, "detect digit", "--json")
    values = json.loads(result.out)
    assert values["image"] == {"width": 64, "height": 64} and values["complete"] and values["out"] is None
    assert sorted(found["label"] for found in values["objects"]) == sorted(DIGITS)
    assert values["answer"].count("<loc") == 4 * len(DIGITS) and not list(tmp_path.iterdir())


def test_boxes_are_in_pixels_of_the_picture_that_was_given(gemma, tmp_path):
    Image.open(SCENE).resize((640, 320), Image.Resampling.BICUBIC).save(tmp_path / "wide.png")
    for picture, width, height in ((SCENE, 64, 64), ("wide.png", 640, 320)):
        values = json.loads(gemma("see", picture, "detect digit", "--json").out)
        bins = np.array([int(n) for n in re.findall(r"<loc(\d{4})>", values["answer"])]).reshape(-1, 4)
        wanted = bins[:, [1, 0, 3, 2]] / 1023 * [width, height, width, height]  # the answer says y1 x1 y2 x2
        assert len(bins) == len(DIGITS) == len(values["objects"])
        assert np.allclose([found["box"] for found in values["objects"]], wanted, atol=0.01 * width / 64)


def test_questions(gemma):
    assert gemma("see", SCENE, "answer how many digits are there?").out == f"{NUMBER}\n"
    assert gemma("see", SCENE, "count").out == f"{NUMBER}\n"


def test_nothing_found_says_so(gemma, tmp_path):
    absent = next(w for w in ("zero", "one", "two", "three", "four", "five") if w not in DIGITS)
    result = gemma("see", SCENE, f"detect {absent}")
    assert result.code == 0 and not result.out and "nothing of the kind" in result.err
    assert not list(tmp_path.iterdir())


def test_standard_input(gemma, monkeypatch):
    class Pipe:
        buffer = SCENE.open("rb")

    monkeypatch.setattr("sys.stdin", Pipe)
    assert gemma("see", "-").out == CAPTION + "\n"


# --- wrong use: one line that says what to do


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png"),
        ([__file__], "picture"),
        ([SCENE, " "], "begin with a task"),
        ([SCENE, "detect"], "what to look for"),
        ([SCENE, "answer en"], "what is asked"),
        ([SCENE, "caption <image>"], "<image>"),
        ([SCENE, "detect one", "--out", "x.gif"], ".png or .jpg"),
        ([SCENE, "detect one", "--dtype", "int8"], "--dtype"),
        ([SCENE, "detect one", "-n", "0"], "--max-new-tokens"),
        ([SCENE, "segment one", "--mask-decoder", "missing.npz"], "missing.npz"),
        ([SCENE, "caption en", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_one_line_says_what_is_wrong(gemma, tmp_path, arguments, words):
    result = gemma("see", *arguments)
    assert result.code == 2 and words in result.err and not result.out
    assert result.err.count("\n") == 1 and result.err.startswith("gemma: error: ")
    assert not list(tmp_path.iterdir())


def test_a_text_model_has_no_eyes(gemma, tmp_path):
    from gemma.testing import tiny_config, write_tiny_safetensors

    write_tiny_safetensors(tmp_path / "text", tiny_config())
    result = gemma("see", SCENE, "--model", tmp_path / "text")
    assert result.code == 2 and "needs a PaliGemma" in result.err


def test_without_torch_the_pip_command_is_named(gemma, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else found(name, *rest)
    )
    result = gemma("see", SCENE)
    assert result.code == 2 and 'pip install "gemmakit[torch]"' in result.err


def test_an_answer_that_was_cut_is_reported(gemma):
    result = gemma("see", SCENE, "caption en", "-n", "1")
    assert result.code == 0 and "--max-new-tokens" in result.err


# --- parts


@pytest.mark.parametrize(
    ("given", "complete"),
    [
        ("caption", "caption en"),
        ("caption de", "caption de"),
        ("  detect   cat ;\ndog ", "detect cat ; dog"),
        ("answer how many?", "answer en how many?"),
        ("answer de wie viele?", "answer de wie viele?"),
        ("ocr", "ocr"),
    ],
)
def test_prompts_are_completed(given, complete):
    assert see.complete(given) == complete


def test_an_empty_prompt_is_refused():
    with pytest.raises(PromptError, match="begin with a task"):
        see.complete("")


def test_only_small_pictures_are_enlarged():
    box = Detection("x", (1.0, 2.0, 3.0, 4.0), 0.5, mask=np.ones((20, 40), bool))
    picture, [moved] = see.enlarged(np.zeros((20, 40, 3), np.uint8), [box])
    assert picture.shape == (460, 920, 3) and moved.box == (23.0, 46.0, 69.0, 92.0) and moved.mask.shape == (460, 920)
    large = np.zeros((300, 400, 3), np.uint8)
    assert see.enlarged(large, [box])[0] is large
    strip, _ = see.enlarged(np.zeros((1, 900, 3), np.uint8), [])
    assert max(strip.shape) <= 8 * 448
