# SPDX-License-Identifier: Apache-2.0
"""How well a PaliGemma answers about scenes of held-out digits, through the ordinary loader, processor and `generate`.

The yardstick is a support-vector classifier on the same training digits: if it names a held-out digit rightly with
probability p, a scene of n digits can be captioned without an error with probability p^n. Scenes: `_digits_scenes.py`,
right answers: `_digits_tasks.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from _digits_scenes import SIDE, Scenes, load_split, make_scenes
from _digits_tasks import CAPTION, EXTREMES, PLURALS, WORDS, answer

from paligemma.detection import intersection_over_union, parse_detections
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor

SEED = 2026  # of the test scenes
MOST_TOKENS = 32  # four boxes with labels are 26
BATCH = 64
Box = tuple[float, float, float, float]


def held_out(count: int, digits: Sequence[int] = (1, 2, 3, 4)) -> Scenes:
    """`count` scenes for each number of digits, made of test digits as they are, only resized."""
    return make_scenes("test", np.repeat(np.array(digits), count), (SEED,), augment=False)


def classifier() -> tuple[float, dict[str, float], np.ndarray]:
    """The yardstick: its accuracy p on the test digits, its settings, and bool [n], which test digits it names rightly.

    A support-vector machine with a radial kernel on the 64 pixels; C and gamma are the best of a grid on the validation
    digits, and it is fitted on the training digits.
    """
    from sklearn.svm import SVC

    train, val, test = (load_split(name) for name in ("train", "val", "test"))

    def flat(digits):
        return digits.images.reshape(len(digits.images), -1) * 16

    best = None
    for c in (1.0, 10.0, 100.0):
        for gamma in (0.0005, 0.001, 0.002, 0.004):
            machine = SVC(C=c, gamma=gamma).fit(flat(train), train.labels)
            score = machine.score(flat(val), val.labels)
            if best is None or score > best[0]:
                best = score, dict(C=c, gamma=gamma), machine.predict(flat(test)) == test.labels
    _, settings, right = best
    return float(right.mean()), settings, right


class Seer:
    """A model and its processor, answering prompts in batches."""

    def __init__(self, path):
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        self.processor = PaliGemmaProcessor.from_pretrained(path)

    def answers(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[str]:
        """The greedy answer to each prompt about its image (uint8 [H, W, 3])."""
        texts = []
        for at in range(0, len(prompts), BATCH):
            inputs = self.processor(list(prompts[at : at + BATCH]), list(images[at : at + BATCH]))
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            with torch.inference_mode():
                rows = self.model.generate(**tensors, max_new_tokens=MOST_TOKENS)
            texts += [self.processor.decode(row) for row in rows[:, tensors["input_ids"].shape[1] :].tolist()]
        return texts


def _matched(truth: Sequence[tuple[str, Box]], given: Sequence[tuple[str, Box]]) -> list[float]:
    """For each true object the overlap with the best answer of its label that no other object has; 0: missed."""
    pairs = sorted(
        (
            (intersection_over_union(box, other), i, j)
            for i, (name, box) in enumerate(truth)
            for j, (label, other) in enumerate(given)
            if name == label
        ),
        reverse=True,
    )
    best, used = [0.0] * len(truth), set()
    done = set()
    for overlap, i, j in pairs:
        if i not in done and j not in used:
            best[i] = overlap
            done.add(i)
            used.add(j)
    return best


def _boxes(text: str) -> list[tuple[str, Box]]:
    return [(found.label, found.box) for found in parse_detections(text, SIDE, SIDE)]


def evaluate(seer: Seer, scenes: Scenes, *, seed: int = SEED) -> dict:
    """Accuracy of every task on these scenes; `iou` is the mean over all true digits, a missed or misnamed one being 0."""
    count, rng = len(scenes.images), random.Random(seed)
    found = [scenes.digits(b) for b in range(count)]
    numbers = np.array([len(digits) for digits in found])
    asked: dict[str, list[str]] = defaultdict(list)
    for digits in found:
        one = rng.choice(digits)[0] if digits and rng.random() < 0.5 else rng.randrange(10)
        asked["caption"].append(CAPTION)
        asked["detect digit"].append("detect digit")
        asked["detect <one>"].append(f"detect {WORDS[one]}")
        asked["ocr"].append("ocr")
        asked["count"].append("count")
        asked["count <one>"].append(f"count {PLURALS[one]}")
        asked["answer: is there"].append(f"answer en is there {'an' if one == 8 else 'a'} {WORDS[one]}?")
        asked["answer: extreme"].append(f"answer en what is the {rng.choice(EXTREMES)} digit?")
    result: dict = dict(scenes=count, digits=int(numbers.sum()))
    images = list(scenes.images)
    for name, prompts in asked.items():
        texts = seer.answers(images, prompts)
        truth = [answer(prompt, digits) for prompt, digits in zip(prompts, found)]
        if not name.startswith("detect"):
            right = np.array([text == true for text, true in zip(texts, truth)])
            result[name] = float(right.mean())
            if name == "caption":
                result["caption by digits"] = {int(n): float(right[numbers == n].mean()) for n in np.unique(numbers)}
            continue
        overlaps, extra, total = [], 0, 0
        for text, true in zip(texts, truth):
            wanted, given = _boxes(true), _boxes(text)
            best = _matched(wanted, given)
            overlaps += best
            total += len(given)
            extra += len(given) - sum(overlap > 0.5 for overlap in best)
        overlaps = np.array(overlaps)
        result[name] = dict(
            iou=float(overlaps.mean()),
            iou_where_found=float(overlaps[overlaps > 0].mean()) if (overlaps > 0).any() else 0.0,
            recall_50=float((overlaps > 0.5).mean()),
            precision_50=1 - extra / max(1, total),
        )
    return result


def ceiling(scenes: Scenes, p: float, right: np.ndarray) -> dict[str, float]:
    """What the classifier allows on these scenes: p^n, and the share of them whose digits it names rightly, each one."""
    place = {int(row): bool(ok) for row, ok in zip(load_split("test").index, right)}
    numbers = (scenes.labels >= 0).sum(1)
    whole = [all(place[int(row)] for row in sources if row >= 0) for sources in scenes.sources]
    return dict(classifier=p, p_to_the_n=float(np.mean(p**numbers)), all_named=float(np.mean(whole)))
