# SPDX-License-Identifier: Apache-2.0
"""Result 1: the 270M learns how people rate sentences of film reviews and of newspaper editorials.

    python scripts/results/sentiment.py              fetch, train, evaluate, write its block of docs/results.md
    python scripts/results/sentiment.py --steps 3    see whether everything works; the page stays as it is

Data and split are `_ratings.py`. LoRA classification: nine digits stand for ratings from -4 to 4, the expected value of
the model's distribution over them is its rating. Yardstick: the VADER lexicon, as published and on the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _packages
import _ratings
import _runs
import numpy as np
from _ratings import Snippet

from gemma.finetuning import RunConfig

TRAIN = {"movies": 1000, "news": 800}
CHECK = {"movies": 40, "news": 40}  # of the training side, for the curve; never trained on
HELD = {"movies": 400, "news": 400}
NAMES = {"movies": "film reviews", "news": "newspaper editorials"}


def config(data: Path, check: Path, work: Path, steps: int | None = None) -> RunConfig:
    return RunConfig(
        data=(str(data),),
        eval_data=(str(check),),
        model="demo",
        method="classification",
        labels=tuple((digit, digit) for digit in _ratings.LABELS),
        template=_ratings.TEMPLATE,
        output=str(work / ("run" if steps is None else f"run-{steps}")),
        max_length=128,
        truncate="drop",
        batch_size=16,
        epochs=1,
        steps=steps,
        learning_rate=4e-4,
        rank=8,
        eval_every=25 if steps is None else None,
        save_every=25,
        export=("adapter",),
        tensorboard=False,
        seed=1,
    )


def expected_ratings(adapter: Path | None, snippets: Sequence[Snippet]) -> list[float]:
    """The model's rating of each text, -4 to 4, with an adapter or as it is."""
    import jax
    import jax.numpy as jnp

    from gemma import gm, peft

    loaded = gm.text.load_model("demo")
    model, params = loaded.model, loaded.params
    if adapter is not None:
        found = peft.load_adapter(adapter, model, params, dtype="float32")
        model, params = found.model, peft.merge_params(params, found.lora)
    labels = {digit: digit for digit in _ratings.LABELS}
    # The label in a row only marks the place that is read; what it says is not looked at.
    rows = [gm.data.Labelled(snippet.text, _ratings.LABELS[0]) for snippet in snippets]
    loader = gm.data.Loader(
        rows,
        loaded.tokenizer,
        batch_size=16,
        max_length=256,
        shuffle=False,
        epochs=1,
        labels=labels,
        template=_ratings.TEMPLATE,
    )

    @jax.jit
    def scores(params, batch):
        hidden = gm.losses.hidden_states(model, params, batch)
        at = jnp.argmax(batch["loss_mask"], axis=1)
        logits = gm.losses.head(model, params)(jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0])
        share = jax.nn.softmax(jnp.take(logits, jnp.asarray(loader.label_ids), axis=1).astype(jnp.float32))
        return share @ jnp.arange(-4.0, 5.0)

    found = []
    for batch in loader:
        real = np.asarray(batch["loss_mask"]).any(axis=1)
        found += np.asarray(scores(params, {k: jnp.asarray(v) for k, v in batch.items()}))[real].tolist()
    assert len(found) == len(snippets), "every text has its place"
    return found


def table(held: Sequence[Snippet], columns: dict[str, Sequence[float]]) -> list[str]:
    """Rows of Markdown: r of each column with the people's ratings, for each source."""
    lines = ["| | rows | VADER, published | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for source, name in NAMES.items():
        at = [i for i, snippet in enumerate(held) if snippet.source == source]
        people = [held[i].rating for i in at]
        cells = []
        for values in columns.values():
            r = _ratings.pearson(people, [values[i] for i in at])
            low, high = _ratings.interval(r, len(at))
            cells.append(f"{r:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | {len(at):,} | {_ratings.PUBLISHED[source]:.3f} | " + " | ".join(cells) + " |")
    return lines


def page(run: _runs.Trained, lines: Sequence[str], used: dict[str, int], seconds: float) -> str:
    return f"""
{chr(10).join(lines)}

Pearson's r with the mean rating of about 20 people, on held-out snippets; in brackets the 95 % interval. "VADER,
published" is table 4 of its paper, on all snippets; "VADER 3.3.2" is the package itself on the held-out rows here.

* Data: {used["movies"]:,} snippets of film reviews and {used["news"]:,} of editorials to learn from, out of the source
  archive of vaderSentiment 3.3.2 (MIT). Sides are drawn by group: near duplicates, and all sentences of one article,
  are on one side.
* Run: classification, LoRA rank 8, {run.steps} steps of 16 snippets, {run.tokens:,} tokens, one epoch, in
  {_runs.minutes(run.seconds)}; everything with evaluation {_runs.minutes(seconds)}. {_runs.machine()}, shared with other work.

![loss](results_sentiment.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="a trial of so many steps, on few rows; the page stays as it is")
    parser.add_argument("--work", type=Path, default=_runs.WORK / "sentiment", help="folder of data and run")
    args = parser.parse_args()
    archive = _packages.fetch(_packages.VADER)
    train, held = _ratings.split(_ratings.read_snippets(archive))
    used = _ratings.first_of_each(train, TRAIN)
    check = _ratings.first_of_each((row for row in train if row not in set(used)), CHECK)
    groups = {row.group for row in check}
    used = [row for row in used if row.group not in groups]
    held = _ratings.first_of_each(held, HELD if args.steps is None else {"movies": 16, "news": 16})
    files = []
    for name, rows in (("train", used), ("check", check)):
        labelled = ({"text": row.text, "label": _ratings.label(row.rating)} for row in rows)
        files.append(_runs.write_rows(args.work / f"{name}.jsonl", labelled))
    run = _runs.train(config(*files, args.work, args.steps))
    clock = _runs.Clock()
    columns = {
        "VADER 3.3.2": _ratings.lexicon_scores(archive, [row.text for row in held]),
        "270M, untrained": expected_ratings(None, held),
        "270M, trained": expected_ratings(run.adapter, held),
    }
    lines = table(held, columns)
    print("\n".join(lines))
    if args.steps is None:
        counts = {source: sum(row.source == source for row in used) for source in NAMES}
        _runs.curve(_runs.PAGE.with_name("results_sentiment.png"), run, "eval_loss", "Rating sentences")
        _runs.write_block("sentiment", page(run, lines, counts, run.seconds + clock.seconds))


if __name__ == "__main__":
    main()
