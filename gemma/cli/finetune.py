# SPDX-License-Identifier: Apache-2.0
"""`gemma finetune`: flags to a `RunConfig`, the run shown while it goes, and what it left.

The run is `gemma/gm/train/_run.py`, its settings `gemma/finetuning.py`, the display `_finetune_display.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma.cli import _common
from gemma.errors import ConfigError

if TYPE_CHECKING:
    from gemma.finetuning import RunConfig

HELP = """\
Train a model on a file of examples, and write it in formats that other programs read.

DATA is JSONL, JSON, CSV, TSV, Parquet or plain text; whether it holds chats, prompts with completions, pairs of answers
(dpo, orpo, simpo), rated answers (kto) or labelled texts (classify) is told by its columns. Methods: lora, qlora (over a
packed base), full, dpo, orpo, simpo, kto, qat (for the file of --quantize), classify.

Everything goes to one folder: checkpoints, metrics.csv, curves.png, an adapter for PEFT, merged safetensors, GGUF, a
README. Each export is opened again and compared before it appears. The same command goes on with a run that was
interrupted, exactly; Ctrl-C saves first. Settings come from --config, flags go before it, and --set reaches all of
them: see docs/training.md. Needs the extra gemmakit[train].

\b
Examples:
  gemma finetune chats.jsonl --dry-run
  gemma finetune chats.jsonl --method lora --steps 200 --eval-split 0.05
  gemma finetune pairs.jsonl --method dpo --model gemma-3-1b-it --set beta=0.05
  gemma finetune --config run.yaml --steps 400
"""

_Words = list[str] | None


def _flag(name: str, metavar: str, text: str, *more: str) -> Any:
    return typer.Option(name, *more, metavar=metavar, help=text, show_default=False)


Data = Annotated[list[Path] | None, typer.Argument(metavar="[DATA]...", help="Files of examples.", show_default=False)]
Config = Annotated[Path | None, _flag("--config", "FILE", "Settings as YAML, by the names of --set.")]
Model = Annotated[str | None, _flag("--model", "MODEL", "As for gemma generate.  [default: demo]", "-m")]
Method = Annotated[str | None, _flag("--method", "NAME", "How to train, see above.  [default: lora]")]
Output = Annotated[Path | None, _flag("--output", "FOLDER", "Of the run.  [default: finetuned/<data>-<method>]", "-o")]
Steps = Annotated[int | None, _flag("--steps", "N", "End after so many steps.")]
Epochs = Annotated[float | None, _flag("--epochs", "X", "Or see the data so many times.  [default: 1]")]
Batch = Annotated[int | None, _flag("--batch-size", "N", "Rows computed together.  [default: 4]")]
Accumulate = Annotated[int | None, _flag("--accumulate", "N", "Batches of one step.  [default: 1]")]
MaxLength = Annotated[int | None, _flag("--max-length", "N", "Tokens of an example.  [default: 512]")]
Truncate = Annotated[
    str | None,
    _flag("--truncate", "HOW", "Longer ones: error, drop, right, left, turns, split.  [default: error]"),
]
Packing = Annotated[bool, typer.Option("--packing", help="Put several short examples into one row.")]
Rate = Annotated[float | None, _flag("--learning-rate", "X", "The highest.  [default: by method]", "--lr")]
Rank = Annotated[int | None, _flag("--rank", "R", "Of the adapter.  [default: 16]")]
Quantize = Annotated[
    str | None,
    _flag("--quantize", "TYPE", "qlora: the base in it, or keep; qat: q4_0, int4, int8, sfp8."),
]
Adapter = Annotated[str | None, _flag("--adapter", "PATH", "Go on from this adapter: a PEFT folder or a GGUF.")]
Dtype = Annotated[str | None, _flag("--dtype", "TYPE", "float32 or bfloat16.  [default: float32 on a CPU]")]
EvalData = Annotated[_Words, _flag("--eval-data", "FILE", "Examples that are never trained on; may be repeated.")]
EvalSplit = Annotated[float | None, _flag("--eval-split", "X", "Or hold out so much of DATA: 0.05.")]
EvalEvery = Annotated[int | None, _flag("--eval-every", "N", "Steps between evaluations.  [default: at the end]")]
Sample = Annotated[_Words, _flag("--sample", "TEXT", "A prompt to go on from at each evaluation; may be repeated.")]
SaveEvery = Annotated[int | None, _flag("--save-every", "N", "Steps between checkpoints.  [default: as --eval-every]")]
Export = Annotated[
    _Words,
    _flag("--export", "KIND", "adapter, adapter-gguf, merged, gguf, none; may be repeated.  [default: by method]"),
]
Gguf = Annotated[_Words, _flag("--gguf", "TYPE", "Types of GGUF files; may be repeated.  [default: q8_0]")]
Seed = Annotated[int | None, _flag("--seed", "N", "Of the order, the adapter, dropout.  [default: 0]")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with a run that the folder holds, or refuse it.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out, and list them.")]
Setting = Annotated[_Words, _flag("--set", "NAME=VALUE", "Any other setting; may be repeated.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check data, folder and memory, and stop before weights are read."),
]


def command(
    data: Data = None,
    config: Config = None,
    model: Model = None,
    method: Method = None,
    output: Output = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    accumulate: Accumulate = None,
    max_length: MaxLength = None,
    truncate: Truncate = None,
    packing: Packing = False,
    learning_rate: Rate = None,
    rank: Rank = None,
    quantize: Quantize = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = None,
    eval_every: EvalEvery = None,
    sample: Sample = None,
    save_every: SaveEvery = None,
    export: Export = None,
    gguf: Gguf = None,
    seed: Seed = None,
    resume: Resume = True,
    skip_bad: SkipBad = False,
    settings: Setting = None,
    dry_run: DryRun = False,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    flags = {
        name: value for name, value in locals().items() if name not in ("config", "settings", "dry_run", "as_json")
    }
    run(made(config, flags, settings or []), dry_run=dry_run, as_json=as_json)


def made(config: Path | None, flags: dict[str, Any], settings: list[str]) -> RunConfig:
    """The settings of a run: flags over --set over the file."""
    from gemma.finetuning import RunConfig

    # Typer gives lists where a flag may be repeated, and False where a switch was not set.
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != []}
    given = {name: [str(v) for v in value] if isinstance(value, list) else value for name, value in given.items()}
    if given.pop("resume", None) is None:
        given["resume"] = False
    if "sample" in given:
        given["sample_prompts"] = [_common.unescape(text) for text in given.pop("sample")]
    if "export" in given:
        words = [word for text in given["export"] for word in text.split(",")]
        given["export"] = [] if words == ["none"] else words
    values = {**dict(_setting(text) for text in settings), **given}
    if config is None and "data" not in values:
        raise ConfigError("expected DATA, a file of examples, or --config; see `gemma finetune --help`")
    return RunConfig.from_flags(config, **values)


def _setting(text: str) -> tuple[str, Any]:
    """A name and a value, which is read as YAML reads it."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected NAME=VALUE, got {text[:80]!r}")
    from gemma.finetuning import parse_yaml

    return name.strip().replace("-", "_"), parse_yaml(value, f"--set {name}")


def run(config: RunConfig, *, dry_run: bool, as_json: bool) -> None:
    """Runs what the settings say, and writes the report; exit code 1 if a dry run does not fit, 130 after Ctrl-C."""
    from gemma.cli._finetune_display import Display
    from gemma.gm import _compile_cache
    from gemma.gm.train import finetune

    _compile_cache.enable()
    with Display(as_json=as_json, log_every=config.log_every) as display:
        result = finetune(config, on_event=display, dry_run=dry_run)
    if as_json:
        _common.write(json.dumps(data_of(result), default=str) + "\n")
    elif not dry_run:
        _common.write(page(result))
    if dry_run:
        if not fits(result.memory):
            raise typer.Exit(_common.FAILED)
    elif not result.finished:
        _common.note(f"stopped after step {int(result.training.state.step)}; the same command goes on from there")
        raise typer.Exit(_common.INTERRUPTED)


def fits(memory: Any) -> bool:
    """Whether an estimate is within what the machine has."""
    return memory is None or memory.available is None or memory.total <= memory.available


def data_of(result: Any) -> dict[str, Any]:
    """The run as JSON has it."""
    training, memory = result.training, result.memory
    return {
        "folder": str(result.folder),
        "settings": result.config.to_dict(),
        "data": result.report.to_dict(),
        "memory": {"items": dict(memory.items), "total": memory.total, "available": memory.available},
        "fits": fits(memory),
        "steps": result.steps,
        "stopped_by": None if training is None else training.stopped_by,
        "history": [] if training is None else training.history,
        "exports": [
            {"kind": e.kind, "path": str(e.path), "bytes": e.bytes, "exact": e.exact, "tensors": e.tensors}
            | {"logits": None if e.logits is None else vars(e.logits)}
            for e in result.exports
        ],
    }


def page(result: Any) -> str:
    """What was made, as text."""
    from gemma.fit import format_bytes

    history = result.training.history
    losses = [row["loss"] for row in history if "loss" in row]
    scored = [row for row in history if "eval_loss" in row]
    rows = [("folder", result.folder), ("steps", f"{int(result.training.state.step)} of {result.steps}")]
    if losses:
        rows.append(("loss", f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last"))
    if scored:
        shown = ", ".join(f"{name.removeprefix('eval_')} {v:.4f}" for name, v in scored[-1].items() if name != "step")
        rows.append(("held out", shown))
    for done in result.exports:
        rows.append((done.kind, f"{done.path.name}, {format_bytes(done.bytes)}: {done}"))
    text = _common.columns(rows)
    adapter = next((e.path for e in result.exports if e.kind == "adapter"), None)
    gguf = next((e.path for e in result.exports if e.path.suffix == ".gguf" and e.kind != "adapter-gguf"), None)
    return text + _how_to_use(result.config.model, adapter, gguf)


def _how_to_use(model: str, adapter: Path | None, gguf: Path | None) -> str:
    """The command that tries out what was trained: a conversation where it learnt from turns."""
    from gemma.adapters import is_chat
    from gemma.cli import _backend

    if adapter is not None:
        verb = "chat" if is_chat(adapter) else 'generate "..."'
        return f"\n  gemma {verb} --model {model} --adapter {adapter}\n"
    if gguf is not None:
        verb = "chat" if _backend.is_tuned(gguf) else 'generate "..."'
        return f"\n  gemma {verb} --model {gguf}\n"
    return ""
