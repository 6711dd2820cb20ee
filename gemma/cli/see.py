# SPDX-License-Identifier: Apache-2.0
"""`gemma see`: asks a PaliGemma about a picture; objects it points at are listed and drawn.

The model runs in `_see_torch.py`; this module loads no framework until then. Boxes in text: `paligemma/detection.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma.cli import _common
from gemma.cli._progress import waiting
from gemma.errors import ConfigError, DependencyError, PromptError

if TYPE_CHECKING:
    import numpy as np

    from gemma.cli._see_torch import Answer
    from paligemma.detection import Detection

HELP = """\
Ask a PaliGemma about a picture, and print its answer.

PROMPT begins with a task: caption, answer (then a question), ocr, detect or segment (then what to look for; several
things are separated by " ; "). Found objects are printed one per line, with their box in pixels (left, top, right,
bottom) and how sure the model was, and drawn: into --out, or into NAME.boxes.png in the current folder, in the place of
an older one. A picture under 256 pixels is drawn enlarged.

The model named digits comes with gemmakit: a small PaliGemma that knows handwritten digits, light on dark, and nothing
else. It captions, detects, counts, reads and answers; it does not segment.

\b
Examples:
  gemma see scene.png "detect seven"
  gemma see scene.png "detect seven ; two" --out found.png
  gemma see scene.png "answer en how many sevens are there?"
  gemma see photo.jpg "detect cat" --model path/to/paligemma-3b-mix-224
  gemma see photo.jpg "segment cat" --model path/to/paligemma-3b-mix-224 --mask-decoder vae-oid.npz
"""
_NOT_FOUND = 'nothing of the kind was found (the model answered "{}")'
_ENLARGE_BELOW = 256  # pixels of the shorter side; captions on smaller pictures would hide them
_ENLARGED = 448
_TASKS = "caption en, answer en <question>, ocr, detect <thing>, segment <thing>"

Image = Annotated[
    str,
    typer.Argument(metavar="IMAGE", help="A picture of any common format; - is standard input.", show_default=False),
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="A task and what it needs.")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="digits, or the folder of a PaliGemma 1 or 2 checkpoint."),
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE", help="Where the picture with boxes goes: .png or .jpg.")
]
MaskDecoder = Annotated[
    str | None, typer.Option("--mask-decoder", metavar="FILE", help="Weights for the masks of segment: vae-oid.npz.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Most tokens of an answer.")]


def command(
    image: Image,
    prompt: Prompt = "caption en",
    model: Model = "digits",
    out: Out = None,
    mask_decoder: MaskDecoder = None,
    max_new_tokens: MaxNewTokens = 256,
    as_json: _common.Json = False,
    dtype: _common.Dtype = "float32",
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import fit, hub
    from gemma.image import read_image
    from paligemma.segmentation import MaskCodec

    text = complete(prompt)
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
    if dtype not in fit.DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(fit.DTYPES)}, got {dtype!r}")
    if out is not None:
        _check_out(out)
    picture = read_image(sys.stdin.buffer.read() if image == "-" else Path(image).expanduser(), name=image)
    codec = None if mask_decoder is None else MaskCodec.from_file(mask_decoder)
    path = hub.resolve(model)
    if importlib.util.find_spec("torch") is None:
        raise DependencyError("torch", "torch", "gemma see")
    with waiting(f"looking at {image}"):
        from gemma.cli._see_torch import look

        answer = look(path, picture, text, max_new_tokens=max_new_tokens, dtype=dtype)
    objects = found_objects(answer, picture, codec)
    target = out or (_default_out(image) if objects and not as_json else None)
    if target is not None:
        _write_picture(target, picture, objects)
    if as_json:
        _common.write(json.dumps(_result(model, picture, text, answer, objects, target), ensure_ascii=False) + "\n")
        return
    _print(text, answer, objects)
    if target is not None:
        _common.note(f"the picture with {len(objects)} {'box' if len(objects) == 1 else 'boxes'} is {target}")
    if codec is None and any(found.codes for found in objects):
        _common.note("the model drew outlines, too: they need the weights of the mask decoder (--mask-decoder)")


def complete(prompt: str) -> str:
    """The prompt as the models were trained on it: one line, and a language where a task wants one and none is there."""
    text = " ".join(prompt.split())
    if not text:
        raise PromptError(f"the prompt is empty: begin with a task ({_TASKS})")
    task, _, rest = text.partition(" ")
    if task in ("detect", "segment") and not rest:
        raise PromptError(f'{task}: say what to look for, for example "{task} cat"')
    if task == "answer" and not re.sub(r"^[a-z]{2}( |$)", "", rest):
        raise PromptError('answer: say what is asked, for example "answer en how many cats are there?"')
    if task in ("caption", "cap", "describe") and not rest:
        return f"{task} en"
    if task == "answer" and not re.match(r"[a-z]{2} ", rest):
        return f"answer en {rest}"
    return text


def found_objects(answer: Answer, picture: np.ndarray, codec) -> list[Detection]:
    """The objects in an answer, in pixels of the picture uint8 [H, W, 3]; with masks where there is a decoder for them."""
    height, width = picture.shape[:2]
    objects = answer.processor.detections(answer.ids, width, height, logprobs=answer.logprobs)
    return objects if codec is None else codec.add_masks(objects, width, height)


def _print(prompt: str, answer: Answer, objects: list[Detection]) -> None:
    if objects:
        rows = [(found.label, *(f"{v:.0f}" for v in found.box), f"{found.score:.0%}") for found in objects]
        _common.write(_common.columns(rows, right=[1, 2, 3, 4, 5], indent=""))
    elif prompt.startswith(("detect ", "segment ")):
        _common.note(_NOT_FOUND.format(_common.one_line(PromptError(answer.text)) if answer.text.strip() else ""))
    else:
        _common.write(answer.text + "\n")
    if not answer.complete:
        _common.note("the answer was cut at --max-new-tokens")


def _check_out(out: str) -> None:
    if Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--out: expected a name that ends in .png or .jpg, got {out!r}")


def _default_out(image: str) -> str:
    return f"{Path(image).stem if image != '-' else 'picture'}.boxes.png"


def _write_picture(target: str, picture: np.ndarray, objects: list[Detection]) -> None:
    """Draws, and writes the file whole or not at all."""
    from PIL import Image as images

    from gemma._atomic import atomic_file
    from paligemma.detection import draw

    drawn = images.fromarray(draw(*enlarged(picture, objects)))
    content = io.BytesIO()
    drawn.save(content, format="PNG" if target.lower().endswith(".png") else "JPEG", optimize=True)
    with atomic_file(Path(target).expanduser(), replace=True) as file:
        file.write(content.getvalue())


def enlarged(picture: np.ndarray, objects: list[Detection]) -> tuple[np.ndarray, list[Detection]]:
    """A small picture and its objects, each pixel a square; others as they are."""
    import numpy as np

    shorter = min(picture.shape[:2])
    if shorter >= _ENLARGE_BELOW or max(picture.shape[:2]) > 4 * _ENLARGED:
        return picture, objects
    times = math.ceil(_ENLARGED / shorter)
    if max(picture.shape[:2]) * times > 8 * _ENLARGED:  # a thin strip
        times = max(1, 8 * _ENLARGED // max(picture.shape[:2]))

    def big(array):
        return np.repeat(np.repeat(array, times, 0), times, 1)

    moved = [
        dataclasses.replace(
            found,
            box=tuple(v * times for v in found.box),
            mask=None if found.mask is None else big(found.mask),
        )
        for found in objects
    ]
    return big(picture), moved


def _result(model: str, picture: np.ndarray, prompt: str, answer: Answer, objects, target) -> dict:
    """What --json prints; boxes in pixels as left, top, right, bottom, times in seconds."""
    return {
        "model": model,
        "image": {"width": picture.shape[1], "height": picture.shape[0]},
        "prompt": prompt,
        "answer": answer.text,
        "complete": answer.complete,
        "objects": [
            {"label": found.label, "box": [round(v, 2) for v in found.box], "score": round(found.score, 4)}
            for found in objects
        ],
        "out": target,
        "timings": {"load": round(answer.load_seconds, 4), "answer": round(answer.answer_seconds, 4)},
    }
