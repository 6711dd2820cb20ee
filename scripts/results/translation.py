# SPDX-License-Identifier: Apache-2.0
"""Result 2: the 270M learns to translate the messages of a program into German and French.

    python scripts/results/translation.py              fetch, train, evaluate, write its block of docs/results.md
    python scripts/results/translation.py --steps 3    see whether everything works; the page stays as it is

Data and split are `_messages.py`. Scores: chrF of sacrebleu, and the share of messages whose placeholders are all there
again. Before: the model as it is, asked with the same prompt, and with four translated messages in front.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import _messages
import _packages
import _runs
from _messages import Pair

from gemma.finetuning import RunConfig


def config(data: Path, check: Path, work: Path, steps: int | None = None) -> RunConfig:
    return RunConfig(
        data=(str(data),),
        eval_data=(str(check),),
        model="demo",
        method="lora",
        output=str(work / ("run" if steps is None else f"run-{steps}")),
        max_length=256,
        truncate="drop",
        packing=True,
        batch_size=2,
        epochs=2,
        steps=steps,
        learning_rate=4e-4,
        rank=16,
        eval_every=30 if steps is None else None,
        save_every=30,
        export=("adapter",),
        tensorboard=False,
        seed=1,
    )


def translations(held: Sequence[Pair], write: Callable[[Pair], str]) -> list[str]:
    found = []
    for n, pair in enumerate(held, 1):
        found.append(write(pair))
        if n % 50 == 0:
            print(f"{n} of {len(held)} messages", flush=True)
    return found


def scores(held: Sequence[Pair], texts: Sequence[str], language: str) -> dict[str, float]:
    """chrF of a language, and the shares of messages with all placeholders (of those that have some) and exact."""
    from sacrebleu.metrics import CHRF

    at = [i for i, pair in enumerate(held) if pair.language == language]
    truth = [held[i].translation.strip() for i in at]
    some = [i for i in at if _messages.placeholders(held[i].message)]
    kept = sum(_messages.placeholders(held[i].message) == _messages.placeholders(texts[i]) for i in some)
    return {
        "chrf": CHRF().corpus_score([texts[i] for i in at], [truth]).score,
        "kept": kept / len(some) if some else 1.0,
        "exact": sum(texts[i] == wanted for i, wanted in zip(at, truth)) / len(at),
        "rows": len(at),
        "some": len(some),
    }


def table(held: Sequence[Pair], systems: dict[str, Sequence[str]]) -> list[str]:
    lines = ["| | messages | | chrF | placeholders kept | exact |", "|---|---|---|---|---|---|"]
    for language, name in _messages.LANGUAGES.items():
        for system, texts in systems.items():
            found = scores(held, texts, language)
            kept = f"{found['kept']:.0%} of {found['some']}"
            first = (f"English to {name}", f"{found['rows']}") if system == next(iter(systems)) else ("", "")
            lines.append(
                f"| {first[0]} | {first[1]} | {system} | {found['chrf']:.1f} | {kept} | {found['exact']:.0%} |"
            )
    return lines


def page(run: _runs.Trained, lines: Sequence[str], used: int, seconds: float) -> str:
    return f"""
{chr(10).join(lines)}

Held-out messages, greedy. chrF as sacrebleu computes it by default (0 to 100); "placeholders kept" counts, among the
messages with a `%(name)s`, `%s`, `{{name}}` or tag in them, those whose translation has exactly the same ones; "exact"
is the translators' own text, to the letter.

* Data: {used:,} messages with their translations, out of the `.po` files of the wheel of Django 5.2.19 (BSD-3-Clause).
  Sides are drawn by message: it is on one side in both languages, with all that differ from it in case, punctuation and
  placeholders only.
* Run: LoRA rank 16, packed, {run.steps} steps of 2 x 256 tokens, {run.tokens:,} tokens, two epochs, in
  {_runs.minutes(run.seconds)}; everything with evaluation {_runs.minutes(seconds)}. {_runs.machine()}, shared with other work.

![loss](results_translation.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="a trial of so many steps, on few rows; the page stays as it is")
    parser.add_argument("--work", type=Path, default=_runs.WORK / "translation", help="folder of data and run")
    args = parser.parse_args()
    train, held = _messages.split(_messages.read_pairs(_packages.fetch(_packages.DJANGO)))
    files = []
    for name, rows in (
        ("train", train),
        ("check", held[:60]),
    ):  # the curve is drawn from held-out ones; nothing is chosen by it
        pairs = (
            {"prompt": _messages.prompt(p.message, p.language), "completion": f" {p.translation.strip()}"} for p in rows
        )
        files.append(_runs.write_rows(args.work / f"{name}.jsonl", pairs))
    run = _runs.train(config(*files, args.work, args.steps))
    clock = _runs.Clock()
    held = held if args.steps is None else held[:12]
    base, trained = _runs.Writer(), None
    systems = {
        "as it is": translations(held, lambda p: base.completion(_messages.prompt(p.message, p.language))),
        "as it is, four examples": translations(
            held, lambda p: base.completion(_messages.few_shot(train, p.message, p.language))
        ),
    }
    trained = _runs.Writer(run.adapter)
    systems["trained"] = translations(held, lambda p: trained.completion(_messages.prompt(p.message, p.language)))
    lines = table(held, systems)
    print("\n".join(lines))
    for i, pair in enumerate(held[:8]):
        print(f"{pair.message!r}\n  {pair.translation!r}\n  {systems['trained'][i]!r}")
    if args.steps is None:
        _runs.curve(_runs.PAGE.with_name("results_translation.png"), run, "eval_loss", "Translating messages")
        _runs.write_block("translation", page(run, lines, len(train), run.seconds + clock.seconds))


if __name__ == "__main__":
    main()
