# SPDX-License-Identifier: Apache-2.0
"""`RunConfig`: everything that decides a fine-tuning run, as checked data, from flags, a YAML file or Python.

Defaults depend on the method and are filled in by `resolved()`. Nothing is opened or computed here: a run is
`gemma/gm/train/_run.py`, the command line `gemma/cli/finetune.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from gemma._finetuning_checks import EXPORTS, METHODS, TUNES, check_combinations, check_numbers, check_words, converted
from gemma.errors import ConfigError, DependencyError

__all__ = ["EXPORTS", "METHODS", "TUNES", "RunConfig", "parse_yaml", "read_yaml"]

_ALIASES = {"classify": "classification"}

# What a method starts with where nothing else is said. A full update moves every weight, so its rate is a hundredth of
# an adapter's; preferences compare with where they began and want smaller steps still.
_RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
_PREFERENCE_RATES = {"lora": 5e-5, "qlora": 5e-5, "full": 1e-6}
_PREFERENCE = ("dpo", "orpo", "simpo", "kto")
_BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A fine-tuning run. A field that is None gets the method's own value, see `resolved`.

    Attributes:
      data: files of examples; formats are those of `gm.data.read_examples`.
      model: what `gemma.hub.resolve` takes: a path, a preset that was pulled, or demo.
      method: one of METHODS.
      tune: lora, qlora or full: what the methods that are named after a loss (dpo, ..., classification) train.
      output: folder of the run; left out: `finetuned/<data>-<method>`.
      format: of the data; "auto" looks at the first rows.
      sample_by: of text files, what one example is: a line, a paragraph or the whole document.
      columns: (role, column) pairs where a table names its columns in its own way: `prompt=question`.
      labels: of a classification: (label, the text of one token that stands for it) pairs; left out: those of the data.
      template: of a classification: the text that the label follows, with `{text}` in it; left out: a turn of a chat.
      eval_data: files of examples that are never trained on.
      eval_split: or so much of `data`, 0 to 0.5.
      limit: use the first rows only.
      skip_bad: leave malformed rows out, and list them, instead of stopping.
      max_length: tokens of an example.
      truncate: what becomes of longer ones: error, drop, right, left, turns, split; plain text is split where it says
        error.
      packing: several short examples in one row, which do not see each other.
      shuffle: examples, anew in each epoch, by `seed`.
      batch_size: rows computed at a time.
      accumulate: so many batches make one step.
      epochs: times that the data is seen.
      steps: or so many steps.
      learning_rate: the highest.
      schedule: after the warm-up: cosine, linear, constant, wsd.
      warmup_steps: steps in which the rate rises; left out: 3 % of all.
      weight_decay, clip_norm: of AdamW; norms are not decayed.
      ema: keep a running mean of the trained weights, with this share of the old (0.999), and export that.
      rank, alpha, dropout, targets, use_dora, use_rslora: of the adapter, see `gemma.peft.LoRASpec`.
      adapter: go on from this adapter (a PEFT folder or a GGUF adapter) instead of a new one.
      quantize: of qlora: how the base is packed, keep or a recipe; of qat: q4_0, int4, int8 or sfp8.
      beta, preference, label_smoothing, gamma: of the preference losses; preference is the form of DPO: sigmoid, hinge,
        ipo, npo.
      dtype: of frozen weights and activations: float32, bfloat16, or auto (float32 on a CPU); what is trained is float32.
      remat: what of a layer is kept for the backward pass: dots (products with weights; the rest is computed again,
        which costs next to no time), block (its input: a quarter more time), none (everything).
      sharding: how to spread over devices: none, data, fsdp, tensor.
      tensor: with the last of these, how many devices share one product.
      seed: of everything that is random.
      eval_every: steps between evaluations; left out: at the end.
      early_stop: end after so many of them without a better loss, and export the best.
      sample_prompts: continued at each evaluation, and printed; of data that are chats, what a user says, which is
        answered.
      log_every: steps between lines.
      save_every: steps between checkpoints; left out: as `eval_every`, and at the end. With `early_stop` also at each
        evaluation that is the best so far.
      keep: so many checkpoints.
      resume: go on from the newest checkpoint of the folder; false: refuse a folder that holds a run.
      export: any of adapter, adapter-gguf, merged, gguf, and of qat "quantized": the file whose grid was trained on.
      gguf: types of the GGUF files.
      merged_dtype: of the merged safetensors.
      proof_logits: also compare the answers of what was written with the trained model's, not the values alone.
      tensorboard: also write event files.
    """

    data: tuple[str, ...]
    model: str = "demo"
    method: str = "lora"
    tune: str | None = None
    output: str | None = None
    format: str = "auto"
    sample_by: str = "line"
    columns: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    template: str | None = None
    eval_data: tuple[str, ...] = ()
    eval_split: float = 0.0
    limit: int | None = None
    skip_bad: bool = False
    max_length: int = 512
    truncate: str = "error"
    packing: bool = False
    shuffle: bool = True
    batch_size: int = 4
    accumulate: int = 1
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = 1.0
    ema: float | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "mlp")
    use_dora: bool = False
    use_rslora: bool = False
    adapter: str | None = None
    quantize: str | None = None
    beta: float | None = None
    preference: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 1.0
    dtype: str = "auto"
    remat: str = "dots"
    sharding: str = "none"
    tensor: int = 1
    seed: int = 0
    eval_every: int | None = None
    early_stop: int | None = None
    sample_prompts: tuple[str, ...] = ()
    log_every: int = 1
    save_every: int | None = None
    keep: int = 2
    resume: bool = True
    export: tuple[str, ...] | None = None
    gguf: tuple[str, ...] | None = None
    merged_dtype: str = "bfloat16"
    proof_logits: bool = True
    tensorboard: bool = True

    def __post_init__(self):
        for name, kind in _HINTS.items():
            object.__setattr__(self, name, converted(name, kind, getattr(self, name)))
        object.__setattr__(self, "method", _ALIASES.get(self.method.lower(), self.method.lower()))
        check_words(self)
        check_numbers(self)
        check_combinations(self)

    # What follows from the fields.

    @property
    def tuned(self) -> str:
        """What is trained: "lora", "qlora" or "full"."""
        own = {"lora": "lora", "qlora": "qlora", "full": "full", "qat": "full"}
        return own.get(self.method) or self.tune or "lora"

    @property
    def objective(self) -> str:
        """The loss: "supervised", "preference", "kto" or "classification"."""
        if self.method == "kto":
            return "kto"
        return "preference" if self.method in _PREFERENCE else _OBJECTIVES.get(self.method, "supervised")

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        if self.output is not None:
            return Path(self.output)
        return Path("finetuned") / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(self.data[0]).stem)}-{self.method}"

    def resolved(self) -> RunConfig:
        """The same with a value in each field that had none, but for those that depend on the number of steps."""
        rates = _PREFERENCE_RATES if self.objective in ("preference", "kto") else _RATES
        lora = self.tuned != "full"
        chosen = {
            "tune": self.tuned,
            "output": str(self.folder),
            "learning_rate": rates[self.tuned],
            "weight_decay": 0.0 if lora else 0.01,
            "alpha": 2.0 * self.rank,
            "beta": _BETA.get(self.method, 0.1),
            "quantize": {"qat": "q4_0"}.get(self.method, "keep" if self.tuned == "qlora" else None),
            "export": ("adapter", "merged", "gguf") if lora else ("merged", "gguf"),
            "gguf": ({"q4_0": "q4_0_pure"}.get(self.quantize or "q4_0", "q8_0"),)
            if self.method == "qat"
            else ("q8_0",),
        }
        return dataclasses.replace(self, **{k: v for k, v in chosen.items() if getattr(self, k) is None})

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint of a run must have in common with the run that goes on from it.

        Files are known by their content there, not by their names: the data by the loader's state. How long the run is,
        what it reports, and the devices and memory that it uses may change.
        """
        return {name: value for name, value in self.resolved().to_dict().items() if name not in _MAY_CHANGE}

    # In and out.

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists for tuples; `from_dict` reads them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "RunConfig") -> RunConfig:
        """A run from names and values.

        Raises:
          ConfigError: unknown names, with the nearest one that exists; values that cannot be.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected names and values, got {type(values).__name__}")
        values = {str(name).replace("-", "_"): value for name, value in values.items()}
        unknown = [name for name in values if name not in _HINTS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], _HINTS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown setting {unknown[0]!r}{meant}; the settings are {', '.join(_HINTS)}")
        if "data" not in values:
            raise ConfigError(f"{where}: expected `data`, the files of examples")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **changes: Any) -> RunConfig:
        """A run from a YAML file of names and values; `changes`, where not None, go before it.

        Raises:
          ConfigError: no such file, no YAML, or as `from_dict`. DependencyError: PyYAML is not installed.
        """
        values = {**read_yaml(path), **{name: value for name, value in changes.items() if value is not None}}
        return cls.from_dict(values, where=str(path))

    def to_yaml(self) -> str:
        """The run as YAML, for `from_yaml`."""
        return _yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_flags(cls, path: str | os.PathLike[str] | None = None, **flags: Any) -> RunConfig:
        """Flags over a YAML file, or over nothing; a flag that is None was not given."""
        if path is not None:
            return cls.from_yaml(path, **flags)
        return cls.from_dict({name: value for name, value in flags.items() if value is not None}, where="flags")


_HINTS = get_type_hints(RunConfig)
_OBJECTIVES = {"classification": "classification"}
# Files, which may move, and what may be other when a run goes on: its length, its reports, its exports.
_FILES = frozenset(["data", "eval_data", "sample_by", "model", "adapter", "output"])
_LENGTH = frozenset(["steps", "epochs", "eval_every", "early_stop", "save_every", "keep", "skip_bad", "resume"])
_REPORTS = frozenset(["log_every", "sample_prompts", "tensorboard", "export", "gguf", "merged_dtype", "proof_logits"])
_MACHINE = frozenset(["remat", "sharding", "tensor"])  # a run may go on elsewhere, or in less memory
_MAY_CHANGE = _FILES | _LENGTH | _REPORTS | _MACHINE


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names and values of a YAML file, with the errors of `RunConfig.from_yaml`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines `name: value`, got {type(values).__name__}")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text as plain values; `where` begins the error of one that is none."""
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}{line}: expected YAML ({problem})") from error


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise DependencyError("yaml", "train", "a run as YAML") from error
    return yaml


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
