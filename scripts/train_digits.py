# SPDX-License-Identifier: Apache-2.0
"""Trains the small PaliGemma that ships with gemmakit, on scenes of handwritten digits; every seed is fixed.

    python scripts/train_digits.py train      all stages, with checkpoints in --work: started again, it goes on
    python scripts/train_digits.py export     the averaged weights, the configuration and the vocabulary to --out
    python scripts/train_digits.py evaluate   the numbers of the model card, on digits never trained on
    python scripts/train_digits.py picture    the sample scene and docs/digits.png, from held-out digits

Stage `see` teaches the vision tower alone, with heads that are thrown away (`_digits_vision.py`); `tell`, `point` and
`settle` train the whole model on questions and answers (`_digits_tasks.py`), the heads still helping. Scenes are
`_digits_scenes.py`, the optimizer `_digits_optim.py`, the evaluation `_digits_eval.py`. Needs the extras [torch] and
[test].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _digits_eval import Seer, ceiling, classifier, evaluate, held_out
from _digits_optim import Average, Muon
from _digits_scenes import SIDE, Scenes, make_scenes
from _digits_tasks import CAPTION, PATCH, answer, model_config, prompts, vocabulary
from _digits_vision import PatchHeads, PatchTargets, centres, dense_loss, dense_scores, patch_targets, place_loss
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from gemma import hub, weights
from gemma._manifest import MANIFEST
from gemma.checkpoint import TokenizerSource
from gemma.cli.see import enlarged
from gemma.config import PaliGemmaConfig
from gemma.saving import from_arrays, save
from gemma.tokenizer import Tokenizer
from paligemma.detection import LOC_BINS, draw, parse_detections
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

ASSETS = Path(__file__).parents[1] / "gemma" / "_assets" / "digits"


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one stage is trained. `digits` are the fewest and most in a scene, `sizes` pixels of a digit's field."""

    name: str
    seed: int
    steps: int
    batch: int  # scenes
    rate: float  # of Muon; Adam's is half of it
    cooled: float  # share of the steps in which the rate falls to nothing, as a cosine
    digits: tuple[int, int]
    sizes: tuple[float, float]
    average: float  # decay of the running average
    answers: bool = True  # train the whole model on answers, not only the tower on patches
    place: float = 0.0  # share of the loss by which patches name their places
    waves: float = 0.0  # size of the waves that are added to the position embeddings when the stage begins
    until: int | None = None  # where it ends, if before `steps`; the rate's schedule stays that of `steps`

    @property
    def end(self) -> int:
        """The step at which it ends."""
        return self.steps if self.until is None else self.until


SEE = Stage("see", 1, 1018, 64, 2e-3, 0.0, (1, 7), (14.0, 23.0), 0.998, answers=False)
TELL = Stage("tell", 2, 789, 32, 1.5e-3, 0.0, (0, 5), (15.0, 25.0), 0.998)
POINT = Stage("point", 3, 1000, 32, 1.5e-3, 0.5, (0, 5), (15.0, 25.0), 0.998, place=0.5, waves=0.3)
SETTLE = Stage("settle", 4, 1800, 32, 1.5e-3, 0.7, (0, 5), (15.0, 25.0), 0.998, place=0.5, until=1285)
STAGES = (SEE, TELL, POINT, SETTLE)
WARM_UP = 100  # steps
QUERIES = 2  # prompts about each scene
EXAMPLE_EVERY = 10  # each so many steps, prompts come behind an example: two images, few-shot layout
DENSE_SHARE = 0.3  # of the dense loss where answers are trained
SAMPLE_SEED = 12  # of the pictures


# --- batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """Scenes uint8 [B, S, S, 3], what their patches show, and Q prompts with answers about them.

    `images` int64 [Q, n]: the scenes of each prompt. `ids`, `labels` int64 [Q, L]: text behind the image tokens, labels
    -100 outside the answer. `groups` int64 [Q, L]: 1 for the prompt, 0 for the answer and the padding.
    """

    scenes: torch.Tensor
    targets: PatchTargets
    images: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    groups: torch.Tensor | None = None


def make_batch(stage: Stage, step: int, tokenizer: Tokenizer) -> Batch:
    """The batch of one step; the same arguments give the same batch."""
    low, high = stage.digits
    counts = np.random.default_rng((stage.seed, step)).integers(low, high + 1, stage.batch)
    scenes = make_scenes("train", counts, (stage.seed, step), augment=True, sizes=stage.sizes)
    targets, pixels = patch_targets(scenes, PATCH), torch.from_numpy(scenes.images)
    if not stage.answers:
        return Batch(pixels, targets)
    rng = random.Random(1_000_003 * stage.seed + step)
    with_example = step % EXAMPLE_EVERY == EXAMPLE_EVERY - 1
    return Batch(pixels, targets, *ask(scenes, tokenizer, rng, with_example=with_example))


def ask(
    scenes: Scenes, tokenizer: Tokenizer, rng: random.Random, *, with_example: bool = False
) -> tuple[torch.Tensor, ...]:
    """`images`, `ids`, `labels` and `groups` of a Batch; with an example, the scenes are used two by two."""
    rows: list[tuple[tuple[int, ...], str, str]] = []
    if with_example:
        for b in range(0, len(scenes.images) - 1, 2):
            first, second = scenes.digits(b), scenes.digits(b + 1)
            for prompt in prompts(second, rng, QUERIES):
                rows.append(((b, b + 1), f"{prompt}\n{answer(prompt, first)}\n{prompt}", answer(prompt, second)))
    else:
        for b in range(len(scenes.images)):
            found = scenes.digits(b)
            rows += [((b,), prompt, answer(prompt, found)) for prompt in prompts(found, rng, QUERIES)]
    return encode_rows(rows, tokenizer)


def encode_rows(rows: Sequence[tuple[tuple[int, ...], str, str]], tokenizer: Tokenizer) -> tuple[torch.Tensor, ...]:
    """(scenes, prompt, answer) to padded tensors, laid out as the processor does."""
    special, newline = tokenizer.special, tokenizer.encode("\n", parse_special=False)
    pairs = []
    for _, prompt, text in rows:
        prefix = [special.bos]
        for line in prompt.split("\n"):
            prefix += tokenizer.encode(line) + newline
        pairs.append((prefix, [*tokenizer.encode(text), special.eos]))
    length = max(len(prefix) + len(suffix) for prefix, suffix in pairs)
    ids = torch.full((len(rows), length), special.pad)
    labels, groups = torch.full_like(ids, -100), torch.zeros_like(ids)
    for at, (prefix, suffix) in enumerate(pairs):
        end = len(prefix) + len(suffix)
        ids[at, :end] = torch.tensor(prefix + suffix)
        labels[at, len(prefix) : end] = torch.tensor(suffix)
        groups[at, : len(prefix)] = 1
    return torch.tensor([images for images, _, _ in rows]), ids, labels, groups


class Stream(torch.utils.data.IterableDataset):
    """The batches of a stage from a step on, made by a process beside the training."""

    def __init__(self, stage: Stage, start: int, vocabulary_file: Path):
        self.stage, self.start, self.vocabulary_file = stage, start, vocabulary_file

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        tokenizer = Tokenizer.from_file(self.vocabulary_file)
        for step in range(self.start, self.stage.end):
            yield make_batch(self.stage, step, tokenizer)


# --- the model


class Student(nn.Module):
    """The model and the heads that only its training needs."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.model = PaliGemmaForConditionalGeneration(config)
        self.heads = PatchHeads(config.vision_config.hidden_size)
        self.places = nn.Linear(config.projection_dim, 4 * config.projection_dim, bias=False)


def initialize(student: Student, tokenizer: Tokenizer) -> None:
    """Random weights from a fixed seed. Neighbouring locations begin with similar embeddings."""
    torch.manual_seed(0)
    for name, p in student.model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.trunc_normal_(p, std=0.02 if "position" in name else p[0].numel() ** -0.5)
    table = embedding(student.model).weight
    first, width = tokenizer.id_of("<loc0000>"), table.shape[1]
    at = torch.arange(LOC_BINS)[:, None] / LOC_BINS
    waves = 2 * torch.pi * at * torch.logspace(-2, 5, width // 2, base=2.0)[None]
    with torch.no_grad():
        table[first : first + LOC_BINS] = torch.cat([waves.sin(), waves.cos()], 1) * (2 / width) ** 0.5


@torch.no_grad()
def add_waves(student: Student, size: float) -> None:
    """Writes each patch's row and column into its position embedding, as a random mixture of slow and fast waves.

    Patches that only had to say where a box lies from their own middle have no use for their own place, and a decoder
    that reads them row by row can tell rows apart by distance, but not columns.
    """
    table = student.model.model.vision_tower.embeddings.position_embedding.weight
    place = torch.from_numpy(centres(SIDE // PATCH) / SIDE).float()[:, :, None] * torch.pi
    waves = place * torch.tensor([1.0, 2.0, 4.0, 8.0])
    waves = torch.cat([waves.sin(), waves.cos()], -1).flatten(1)  # [P, 16]
    mixture = torch.randn(waves.shape[1], table.shape[1], generator=torch.Generator().manual_seed(0))
    table += size * (waves - waves.mean(0)) @ mixture * (2 / waves.shape[1]) ** 0.5


def to_pixels(scenes: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] to what the tower takes, float32 [B, 3, S, S] in -1..1."""
    return (scenes.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def read(model: PaliGemmaForConditionalGeneration, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Activations [Q, L, D] of the texts, each behind its images' features."""
    features = model.model.multi_modal_projector(patches)[batch.images].flatten(1, 2)
    embeds = torch.cat([features, embedding(model)(batch.ids)], 1)
    groups = torch.cat([torch.ones(features.shape[:2], dtype=torch.long), batch.groups], 1)
    # Padding stands on the right in group 0, so that nothing before it sees it.
    out = model.model.language_model(inputs_embeds=embeds, token_groups=groups)["last_hidden_state"]
    return out[:, features.shape[1] :]


def embedding(model: PaliGemmaForConditionalGeneration) -> nn.Module:
    """The table of the text model, which is its head, too."""
    return model.model.language_model.embed_tokens


def answers_loss(model: PaliGemmaForConditionalGeneration, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the answers' tokens; a longer answer counts by the root of its length."""
    hidden = read(model, patches, batch)[:, :-1]
    labels = batch.labels[:, 1:]
    on = labels != -100
    weight = on.sum(1).float().rsqrt()[:, None].expand(on.shape)[on]
    logits = hidden[on] @ embedding(model).weight.T
    return (F.cross_entropy(logits, labels[on], reduction="none") * weight).sum() / weight.sum()


def stage_loss(stage: Stage, student: Student, batch: Batch, place: int) -> torch.Tensor:
    """What a stage minimizes on a batch; `place` is the id of the first location token."""
    patches = student.model.model.vision_tower(to_pixels(batch.scenes))
    loss = dense_loss(student.heads, patches, batch.targets)
    if stage.answers:
        loss = answers_loss(student.model, patches, batch) + DENSE_SHARE * loss
    if stage.place:
        features, table = student.model.model.multi_modal_projector(patches), embedding(student.model).weight
        locations = table[place : place + LOC_BINS]
        loss = loss + stage.place * place_loss(student.places, features, batch.targets, locations)
    return loss


# --- training


def optimizers(student: Student, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for all else that this stage trains."""
    inner = {id(p) for n, p in student.named_parameters() if p.ndim == 2 and ".layers." in n}
    trained = list(student.parameters())
    if not stage.answers:
        trained = [*student.model.model.vision_tower.parameters(), *student.heads.parameters()]
    matrices = [p for p in trained if id(p) in inner]
    others = [p for p in trained if id(p) not in inner]
    return [Muon(matrices, lr=stage.rate), torch.optim.AdamW(others, stage.rate / 2, (0.9, 0.98), weight_decay=0.0)]


def rate_at(stage: Stage, step: int) -> float:
    """The share of the full rate at a step: warm-up, plateau, cosine."""
    left = (stage.steps - step) / max(1.0, stage.cooled * stage.steps)
    return min(1.0, (step + 1) / WARM_UP) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def train_stage(stage: Stage, student: Student, work: Path, tokenizer_file: Path, minutes: float) -> Average:
    """Trains until the stage's last step, or for so many minutes; returns the running average."""
    saved, step, started = work / f"{stage.name}.pt", 0, time.time()
    if stage.waves and not saved.exists():
        add_waves(student, stage.waves)
    average = Average(student, stage.average)
    both = optimizers(student, stage)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        student.load_state_dict(state["student"])
        average.module.load_state_dict(state["average"])
        for optimizer, values in zip(both, state["optimizers"]):
            optimizer.load_state_dict(values)
        step = state["step"]
    first, last_save, losses = step, time.time(), []
    tokenizer = Tokenizer.from_file(tokenizer_file)
    place = tokenizer.id_of("<loc0000>")
    stream = torch.utils.data.DataLoader(
        Stream(stage, step, tokenizer_file), batch_size=None, num_workers=1, prefetch_factor=8
    )
    for batch in stream:
        for optimizer, rate in zip(both, (stage.rate, stage.rate / 2)):
            optimizer.param_groups[0]["lr"] = rate * rate_at(stage, step)
        loss = stage_loss(stage, student, batch, place)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 2.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(student, step)
        step += 1
        losses.append(loss.item())
        over = (time.time() - started) / 60 > minutes
        if step % 200 == 0 or step == stage.end:
            row = dict(stage=stage.name, step=step, loss=round(float(np.mean(losses)), 4))
            row |= validate(average.module, tokenizer, stage) | dict(
                scenes_per_second=round((step - first) * stage.batch / (time.time() - started), 1)
            )
            losses.clear()
            print(json.dumps(row), flush=True)
            with open(work / "curve.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if over or step == stage.end or time.time() - last_save > 120:
            state = dict(student=student.state_dict(), average=average.module.state_dict(), step=step)
            torch.save(state | dict(optimizers=[o.state_dict() for o in both]), work / "unfinished.pt")
            os.replace(work / "unfinished.pt", saved)
            last_save = time.time()
        if over:
            break
    return average if step == stage.end else None


@torch.no_grad()
def validate(student: Student, tokenizer: Tokenizer, stage: Stage) -> dict[str, float]:
    """How it does on scenes of the validation digits, undistorted; 1 to 4 digits a scene.

    Captions are compared token by token given the right beginning: all of them right is the same as writing the right
    caption greedily.
    """
    scenes = make_scenes("val", np.arange(240) % 4 + 1, (99,), augment=False)
    patches = student.model.model.vision_tower(to_pixels(torch.from_numpy(scenes.images)))
    scores = dense_scores(student.heads, patches, patch_targets(scenes, PATCH))
    if stage.answers:
        found = [scenes.digits(b) for b in range(len(scenes.images))]
        for name, prompt in (("caption", CAPTION), ("detect", "detect digit"), ("ocr", "ocr")):
            rows = [((b,), prompt, answer(prompt, digits)) for b, digits in enumerate(found)]
            batch = Batch(scenes.images, None, *encode_rows(rows, tokenizer))
            hidden, labels = read(student.model, patches, batch)[:, :-1], batch.labels[:, 1:]
            given = (hidden @ embedding(student.model).weight.T).argmax(-1)
            right = (given == labels) | (labels == -100)
            scores[name] = right.all(1).float().mean().item()
            if name == "detect":
                low = tokenizer.id_of("<loc0000>")
                where = (labels >= low) & (labels < low + LOC_BINS)
                scores["pixels_off"] = (
                    ((given - labels)[where].abs().clamp(max=LOC_BINS) * SIDE / LOC_BINS).mean().item()
                )
    return {name: round(value, 4) for name, value in scores.items()}


def train(work: Path, minutes: float) -> None:
    """All stages, as far as the minutes reach."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_file = work / "tokenizer.model"
    tokenizer_file.write_bytes(vocabulary())
    tokenizer = Tokenizer.from_file(tokenizer_file)
    torch.manual_seed(0)
    student = Student(model_config(tokenizer.vocab_size))
    initialize(student, tokenizer)
    begin = time.time()
    for stage in STAGES:
        average = train_stage(stage, student, work, tokenizer_file, minutes - (time.time() - begin) / 60)
        if average is None:
            print(f"stopped in stage {stage.name}; the same command goes on from there")
            return
        student = average.module.requires_grad_(True)


# --- what comes out


def export(work: Path, out: Path) -> None:
    """The averaged weights in bfloat16, the configuration and the vocabulary, as a folder that every loader opens."""
    vocabulary_file = work / "tokenizer.model"
    tokenizer = Tokenizer.from_file(vocabulary_file)
    config = model_config(tokenizer.vocab_size)
    state = torch.load(work / f"{STAGES[-1].name}.pt", weights_only=True)
    weights_of = {name.removeprefix("model."): value for name, value in state["average"].items()}
    values = {tensor.name: weights_of[tensor.slots["hf"].name].numpy() for tensor in weights.tensors(config)}
    kept = {path.name: path.read_bytes() for path in out.glob("*") if path.suffix in (".md", ".png")}
    source = TokenizerSource("sentencepiece", path=vocabulary_file)
    written = save(
        out, from_arrays(values, config), config, format="safetensors", tokenizer=source, dtype="bfloat16", replace=True
    )
    for name, content in kept.items():
        (out / name).write_bytes(content)
    shutil.copy(work / "curve.jsonl", out)
    (out / MANIFEST).unlink()  # the installed package has its own; card and pictures come and go
    print(f"{written.bytes} bytes in {out}")


def report(model: str, count: int) -> dict:
    """Evaluates a model on `count` held-out scenes for each number of digits, beside the classifier."""
    begin, scenes = time.time(), held_out(count)
    p, settings, right = classifier()
    result = evaluate(Seer(hub.resolve(model)), scenes) | ceiling(scenes, p, right) | dict(classifier_settings=settings)
    result["caption / p^n"] = result["caption"] / result["p_to_the_n"]
    result["seconds"] = time.time() - begin
    for name, value in result.items():
        inner = value if isinstance(value, dict) else {"": value}
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in inner.items())
        print(f"{name:22} {shown.strip()}")
    print(json.dumps(result))
    return result


def picture(scene_file: Path, page_file: Path) -> None:
    """A sample scene of held-out digits for `gemma see`, and a picture of six more with what the shipped model finds."""
    seer = Seer(hub.resolve(hub.DIGITS))
    scenes = make_scenes("test", np.array([4, 3, 4, 4, 2, 4, 3]), (SAMPLE_SEED,), augment=False)
    Image.fromarray(scenes.images[0]).save(scene_file, optimize=True)
    images = list(scenes.images[1:])
    boxes = seer.answers(images, ["detect digit"] * len(images))
    captions = seer.answers(images, [CAPTION] * len(images))
    cells = []
    for image, text, caption in zip(images, boxes, captions):
        objects = parse_detections(text, SIDE, SIDE)
        drawn = Image.fromarray(draw(*enlarged(image, objects))).resize((300, 300), Image.Resampling.LANCZOS)
        cell = Image.new("RGB", (300, 324), "white")
        cell.paste(drawn)
        ImageDraw.Draw(cell).text((4, 303), caption, fill="black", font=ImageFont.load_default(15))
        cells.append(np.asarray(cell))
    page = np.concatenate([np.concatenate(cells[at : at + 3], 1) for at in (0, 3)])
    Image.fromarray(page).quantize(128).save(page_file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("train", "export", "evaluate", "picture"))
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="checkpoints and the learning curve")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the trained model goes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop training after so long")
    parser.add_argument("--model", default=hub.DIGITS, help="what is evaluated")
    parser.add_argument("--scenes", type=int, default=250, help="test scenes for each number of digits")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "train":
        train(given.work, given.minutes)
    elif given.what == "export":
        export(given.work, given.out)
    elif given.what == "evaluate":
        report(given.model, given.scenes)
    else:
        picture(ASSETS / "scene.png", ASSETS.parents[2] / "docs" / "digits.png")


if __name__ == "__main__":
    main()
