# SPDX-License-Identifier: Apache-2.0
"""What the assistant is worth: greedy answers to held-out prompts, counted, and its model card. Training: `assistant.py`.

Nothing is chosen or edited: the samples are every third held-out prompt with the whole answer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _runs

from gemma.chat import Turn

MOST = 128  # tokens of an answer
SYSTEMS = ("base, in a text that shows turns", "base, in the chat template", "assistant")


@dataclasses.dataclass(frozen=True)
class Found:
    """Answers of each of SYSTEMS to the held-out rows, whether they ended by themselves, perplexities of the references
    in the chat template (without and with the adapter)."""

    rows: Sequence[Mapping[str, Any]]
    answers: Mapping[str, list[str]]
    ended: Mapping[str, list[bool]]
    perplexity: tuple[float, float] = (0.0, 0.0)

    @property
    def closed(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.get("accept")]

    def right(self, system: str) -> int:
        """Closed questions whose answer holds an accepted one."""
        return sum(accepted(self.answers[system][i], self.rows[i]["accept"]) for i in self.closed)

    def exact(self, system: str) -> int:
        """Closed questions that are answered by an accepted answer or the reference, and nothing else."""
        return sum(exactly(self.answers[system][i], self.rows[i]) for i in self.closed)


def accepted(answer: str, wanted: Sequence[str]) -> bool:
    """Whether one of the accepted strings stands in an answer, as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in wanted)


def exactly(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer is an accepted string or the reference, but for case and punctuation at its ends."""
    bare = [text.strip().strip(".!\"'").casefold() for text in (answer, row["messages"][-1]["content"], *row["accept"])]
    return bare[0] in bare[1:]


def prompt_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    return tuple(Turn(message["role"], message["content"]) for message in row["messages"][:-1])


def evaluate(rows: Sequence[Mapping[str, Any]], adapter: Path) -> Found:
    base, tuned = _runs.Writer(), _runs.Writer(adapter)
    answers: dict[str, list[str]] = {name: [] for name in SYSTEMS}
    ended: dict[str, list[bool]] = {name: [] for name in SYSTEMS}
    for row in rows:
        turns = prompt_of(row)
        three = (
            base.answer(turns, most=MOST, base=True),
            base.answer(turns, most=MOST),
            tuned.answer(turns, most=MOST),
        )
        for name, (text, stopped) in zip(SYSTEMS, three, strict=True):
            answers[name].append(text)
            ended[name].append(stopped)
    return Found(rows, answers, ended)


def numbers(found: Found) -> str:
    """The table of both pages."""
    n, closed = len(found.rows), len(found.closed)
    lines = [
        f"| {n} held-out prompts, greedy | " + " | ".join(SYSTEMS) + " |",
        "|---|" + "---|" * len(SYSTEMS),
        f"| ends by itself within {MOST} tokens | " + " | ".join(f"{sum(found.ended[s])}" for s in SYSTEMS) + " |",
        f"| accepted answer in it, {closed} closed questions | "
        + " | ".join(f"{found.right(s)}" for s in SYSTEMS)
        + " |",
        f"| nothing but the answer, {closed} closed questions | "
        + " | ".join(f"{found.exact(s)}" for s in SYSTEMS)
        + " |",
        f"| perplexity of the reference answers | | {found.perplexity[0]:.1f} | {found.perplexity[1]:.2f} |",
    ]
    return "\n".join(lines)


def quoted(text: str) -> str:
    return "\n".join(f"> {line}" if line else ">" for line in text.splitlines()) or ">"


def samples(found: Found, count: int = 20) -> str:
    """Every third held-out prompt with the whole answer."""
    chosen = list(range(0, len(found.rows), 3))[:count]
    parts = []
    for number, i in enumerate(chosen, 1):
        asked = prompt_of(found.rows[i])[-1].content
        ending = "" if found.ended[SYSTEMS[2]][i] else f"\n\n(cut after {MOST} tokens)"
        parts.append(f"**{number}.** {asked}\n\n{quoted(found.answers[SYSTEMS[2]][i])}{ending}")
    return "\n\n".join(parts)


def losses(log: Mapping[str, Any]) -> str:
    """The curve as a table."""
    train = dict(log["losses"])
    lines = ["| step | training loss, mean of the last 10 steps | held-out loss |", "|---|---|---|"]
    for step, row in log["scores"]:
        last = [train[s] for s in range(max(1, step - 9), step + 1) if s in train]
        mean = f"{sum(last) / len(last):.3f}" if last else ""
        lines.append(f"| {step} | {mean} | {row['eval_loss']:.3f} |")
    return "\n".join(lines)


def page(found: Found, log: Mapping[str, Any], seconds: float | None) -> str:
    """The block of docs/results.md."""
    whole = "" if seconds is None else f"; everything with evaluation {_runs.minutes(seconds)}"
    return f"""
{numbers(found)}

`gemma chat` loads it by default with the demo weights. Its card, with 20 unedited samples and what it is bad at, is
[gemma/_assets/assistant/README.md](../gemma/_assets/assistant/README.md).

* Data: 1,019 short conversations that were written for this project (`scripts/results/assistant_data/`, Apache-2.0). The
  60 prompts in `held_out/` were never trained on; one thing was chosen by their loss: two epochs, after a first run with
  three, whose last one made it worse (1.32 after two, 1.39 after three).
* Run: LoRA rank 8 on attention and MLP, packed, {log["steps"]} steps of 2 x 256 tokens, {log["tokens"]:,} tokens, in
  {_runs.minutes(log["seconds"])}{whole}. {log["machine"]}, shared with other work.

![loss](../gemma/_assets/assistant/curve.png)
"""


def card(found: Found, log: Mapping[str, Any], folder: Path) -> str:
    """The model card."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    return f"""\
# assistant: short answers from Gemma 3 270M

A LoRA adapter (rank 8 on attention and MLP, bfloat16, {size:.1f} MB, PEFT's format) over the pretrained Gemma 3 270M. The base
continues text; with this it answers short questions in Gemma's chat format and stops. `gemma chat` loads it by default with
the demo weights; `gemma chat --no-adapter` leaves it out. It is for trying things out, not for relying on.

    gemma chat
    gemma generate --model demo --adapter gemma/_assets/assistant "..."          the same adapter by path

## Notice

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. This adapter is a Model
Derivative of Gemma: **the files in this folder are modifications**, made by fine-tuning; they are not Google's, and Google
neither made nor endorses them. Use is subject to the restrictions in section 3.2 of those terms and to the Gemma Prohibited
Use Policy (ai.google.dev/gemma/prohibited_use_policy); whoever passes this adapter on has to pass on the terms, these
restrictions and this notice. The training data is Apache-2.0.

## Data

1,019 conversations, 942 of one turn and 77 of several turns or with a system text, written for this project:
`scripts/results/assistant_data/*.jsonl`. They greet, say what the assistant is, admit what it cannot know, answer simple
questions about the world, define and explain, list, rewrite, summarize, extract, translate short phrases, and show small
pieces of code; 96 are in German, French or Spanish alone. No text of others was used.

## Training

`make results-assistant`: `gm.train.finetune`, AdamW, learning rate 3e-4 with a cosine to 0, {log["steps"]} steps of
2 rows of 256 tokens, packed, loss on the answers only, seed 1; {log["tokens"]:,} tokens in {_runs.minutes(log["seconds"])}
on {log["machine"]}, shared with other work. The base is the model named demo: Q4_K_M, computed in float32.

{losses(log)}

![loss](curve.png)

## Numbers

{numbers(found)}

"Base" is the same model without the adapter: once in the few-shot text that `gemma chat --no-adapter` uses, once in a chat
template that it was never taught. An accepted answer counts wherever it stands in the answer, as whole words. The prompts
and accepted answers are `held_out/prompts.jsonl`, written by the same hand as the training data, so the numbers say how
well the style carries over, not how much the model knows: none of them was trained on, but 20 of the 60 have the form of
a training question (the capital of another country, the opposite of another word). One thing was chosen by the held-out
loss: two epochs, after a first run with three, whose last one made it worse (1.32 after two, 1.39 after three).

## What it is bad at

* Facts. It says wrong things in the same calm tone as right ones; 270 million parameters in four bits know little.
* Arithmetic beyond small numbers, counting letters, logic, and anything that takes several steps.
* Long texts, long conversations, and following several instructions at once.
* German, French and Spanish are clearly worse than English; other languages were not trained.
* It refuses only what its few examples resemble. It is not a safety-tuned model, and no substitute for one.
* It knows nothing of the present, of you, or of files and pages; it should say so and sometimes invents instead.

## 20 samples

Greedy, whole and unedited: every third of the held-out prompts, in their order, run by `gemma chat`'s own code on the native CPU
backend where it is available.

{samples(found)}
"""
