# SPDX-License-Identifier: Apache-2.0
"""Result 3: the assistant that `gemma chat` uses with the demo weights, a small LoRA adapter over Gemma 3 270M.

    python scripts/results/assistant.py              train, write gemma/_assets/assistant/, evaluate, write card and page
    python scripts/results/assistant.py --evaluate   evaluate what is in gemma/_assets/assistant/ and write both again
    python scripts/results/assistant.py --steps 3    see whether everything works; nothing is written but build/results

Data: the conversations in `assistant_data/`, written for this project (Apache-2.0); those in `held_out/` are never
trained on. Evaluation and card are `_assistant_card.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import _assistant_card
import _runs

from gemma.finetuning import RunConfig

DATA = Path(__file__).parent / "assistant_data"
HELD = DATA / "held_out" / "prompts.jsonl"
ASSET = _runs.ROOT / "gemma" / "_assets" / "assistant"


def config(work: Path, steps: int | None = None) -> RunConfig:
    return RunConfig(
        data=tuple(str(path) for path in sorted(DATA.glob("*.jsonl"))),
        eval_data=(str(HELD),),
        model="demo",
        method="lora",
        output=str(work / ("run" if steps is None else f"run-{steps}")),
        max_length=256,
        packing=True,
        batch_size=2,
        epochs=2,
        steps=steps,
        learning_rate=3e-4,
        rank=8,
        eval_every=30 if steps is None else None,
        save_every=30,
        export=("adapter",),
        tensorboard=False,
        seed=1,
    )


def ship(adapter: Path, target: Path) -> None:
    """The adapter in bfloat16, marked as one that is spoken to in the chat template."""
    from ml_dtypes import bfloat16

    from gemma import adapters, hub
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(hub.resolve("demo")) as checkpoint:
        shape = checkpoint.config()
    file = adapters.open_adapter(adapter, shape)
    tensors = {
        name: dataclasses.replace(low, a=low.a.astype(bfloat16), b=low.b.astype(bfloat16))
        for name, low in file.tensors.items()
    }
    file = dataclasses.replace(file, tensors=tensors, chat=True, base_model=hub.DEMO_REPOSITORY)
    adapters.save_adapter_file(target, file, shape, replace=True)


def perplexity(adapter: Path | None) -> float:
    """Of the held-out answers in the chat template, their end markers included."""
    from gemma import gm, peft

    loaded = gm.text.load_model("demo")
    model, params = loaded.model, loaded.params
    if adapter is not None:
        found = peft.load_adapter(adapter, model, params, dtype="float32")
        model, params = found.model, peft.merge_params(params, found.lora)
    options = dict(batch_size=2, max_length=256, packing=True, shuffle=False, epochs=1)
    loader = gm.data.Loader(gm.data.read_examples(HELD), loaded.tokenizer, **options)
    return gm.train.evaluate(gm.train.Supervised(model), params, loader)["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="a trial of so many steps; nothing is written but the work folder")
    parser.add_argument("--evaluate", action="store_true", help="do not train; evaluate what ships")
    parser.add_argument("--work", type=Path, default=_runs.WORK / "assistant", help="folder of the run")
    args = parser.parse_args()
    target = ASSET if args.steps is None else args.work / f"asset-{args.steps}"
    if not args.evaluate:
        run = _runs.train(config(args.work, args.steps))
        ship(run.adapter, target)
        log = dict(steps=run.steps, tokens=run.tokens, seconds=run.seconds, losses=run.losses, scores=run.scores)
        (target / "training.json").write_text(json.dumps(log | {"machine": _runs.machine(), "data": run.report}) + "\n")
        _runs.curve(target / "curve.png", run, "eval_loss", "The assistant")
    clock = _runs.Clock()
    rows = [json.loads(line) for line in HELD.read_text(encoding="utf-8").splitlines()]
    held = rows if args.steps is None else rows[:4]
    found = _assistant_card.evaluate(held, target)
    found = dataclasses.replace(found, perplexity=(perplexity(None), perplexity(target)))
    log = json.loads((target / "training.json").read_text(encoding="utf-8"))
    (target / "README.md").write_text(_assistant_card.card(found, log, target), encoding="utf-8")
    block = _assistant_card.page(found, log, None if args.evaluate else run.seconds + clock.seconds)
    print(block)
    if args.steps is None:
        _runs.write_block("assistant", block)


if __name__ == "__main__":
    main()
