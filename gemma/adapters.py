# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as files and as changes of tensors, in canonical names and axes; no framework.

    adapter = open_adapter("my-adapter", config)              # a PEFT folder or a GGUF adapter
    adapter.tensors["layers.0.attn.q"].apply(weight)          # W + scale * b @ a
    save("merged.gguf", fused(load_tensors(source), adapter), config, format="gguf")
    save_adapter_file("adapter.gguf", adapter, config)        # from PEFT's format to llama.cpp's

The bytes of the two formats are `_adapter_peft.py` and `_adapter_gguf.py`. Adapters as trees of a JAX model are
`gemma.peft`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma import weights
from gemma.errors import CheckpointError, ConfigError, FormatError, UnsupportedError, WeightsMismatch

_SAMPLES = 64  # values of each tensor that the checksum of a base looks at
# Keys of a file's metadata.
CHECKSUM, CHAT, CLASSIFICATION = "gemmakit.base_checksum", "gemmakit.chat", "gemmakit.classification"


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one tensor W [out, in].

    Attributes:
      a: [r, in].
      b: [out, r].
      scale: of the product.
      magnitude: [out]; with it (DoRA) every row of the changed tensor gets this norm.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that it changes."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> np.ndarray:
        """`scale * b @ a`, float32 [out, in]."""
        return (self.b.astype(np.float32) @ self.a.astype(np.float32)) * np.float32(self.scale)

    def apply(self, weight: np.ndarray) -> np.ndarray:
        """The changed tensor, float32."""
        moved = weight.astype(np.float32) + self.delta()
        if self.magnitude is None:
            return moved
        size = np.linalg.norm(moved, axis=1)
        factor = np.divide(self.magnitude.astype(np.float32), size, out=np.ones_like(size), where=size > 0)
        return moved * factor[:, None]


@dataclasses.dataclass(frozen=True)
class Classification:
    """What an adapter was trained to tell apart.

    Attributes:
      labels: (label, the text of one token that stands for it) pairs, in the order of training.
      template: the text that a label follows, with `{text}` in it; None: a turn of a chat.
    """

    labels: tuple[tuple[str, str], ...]
    template: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter as a file describes it.

    Attributes:
      tensors: canonical name to its change.
      use_rslora: scales are alpha / sqrt(r), so that a trainer goes on with the same rule.
      dropout: with which it was trained.
      tied: a change of the embedding table also acts on the output head.
      base_model: name of the model that it was trained on, "" if it does not say.
      base_checksum: of the tensors that it changes, as `checksum` computes it; "" if it does not say.
      path: of the file or folder; None for one that was made in memory.
      chat: it was trained on turns in the model's chat template, and is to be spoken to in it.
      classification: the labels that it was trained on; None: it was trained on something else, or does not say.
    """

    tensors: Mapping[str, LowRank]
    use_rslora: bool = False
    dropout: float = 0.0
    tied: bool = True
    base_model: str = ""
    base_checksum: str = ""
    path: Path | None = None
    chat: bool = False
    classification: Classification | None = None

    @property
    def use_dora(self) -> bool:
        """Whether it rescales rows."""
        return any(low.magnitude is not None for low in self.tensors.values())

    def check(self, config: Any) -> dict[str, weights.Tensor]:
        """The tensors of a model that it changes; refuses an adapter of another model.

        Raises:
          WeightsMismatch: tensors that the model does not have, or of another shape.
          CheckpointError: NaN or infinite factors, or none at all.
        """
        where = self.path or "adapter"
        table = {tensor.name: tensor for tensor in weights.tensors(config)}
        unknown = [name for name in self.tensors if name not in table]
        wrong = [
            f"{name}: expected {table[name].shape}, got {low.shape}"
            for name, low in self.tensors.items()
            if name in table and low.shape != table[name].shape
        ]
        if unknown or wrong:
            hint = "the adapter belongs to another model"
            raise WeightsMismatch(where, unexpected=unknown, misshaped=wrong, hint=hint)
        if not self.tensors:
            raise CheckpointError(f"{where}: expected an adapter, but it changes no tensor")
        for name, low in self.tensors.items():
            for part in (low.a, low.b, low.magnitude):
                if part is not None and not np.isfinite(part.astype(np.float32)).all():
                    raise CheckpointError(f"{where}: {name}: the adapter holds NaN or infinite values")
        return {name: table[name] for name in self.tensors}

    def check_base(self, read: Callable[[str], np.ndarray]) -> None:
        """Refuses another base than the one that the adapter was trained on, where the file says which.

        Args:
          read: canonical name to the tensor of the base, in canonical axes.
        """
        if self.base_checksum and checksum({name: read(name) for name in self.tensors}) != self.base_checksum:
            name = f" ({self.base_model})" if self.base_model else ""
            raise CheckpointError(
                f"{self.path or 'adapter'}: was trained on a base{name} with other weights than these (another version, "
                f"tuned further, or quantized): use the base that it was trained on, or say that any base will do "
                f"(check_base=False)"
            )


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Recognizes the base of an adapter: SHA-256 of names, shapes and 64 values of each tensor, rounded to bfloat16.

    Equal for the same weights in float32 and in bfloat16, in any layout.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        places = np.unique(np.linspace(0, array.size - 1, _SAMPLES).astype(np.int64))
        values = array[np.unravel_index(places, array.shape)].astype(np.float32).astype(ml_dtypes.bfloat16)
        digest.update(f"{name} {tuple(array.shape)}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def open_adapter(path: str | os.PathLike[str], config: Any) -> AdapterFile:
    """Reads an adapter and binds it to a model.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors, that safetensors file, or a GGUF adapter.
      config: of the model.

    Raises:
      CheckpointNotFound, FormatError, UnsupportedError: not there, broken, or of a kind that is not read.
      WeightsMismatch, CheckpointError: see `AdapterFile.check`.
    """
    from gemma import _adapter_gguf, _adapter_peft

    path = Path(path)
    is_gguf = path.is_file() and path.suffix != ".safetensors"
    adapter = (_adapter_gguf if is_gguf else _adapter_peft).read(path, config)
    adapter.check(config)
    return adapter


def is_chat(path: str | os.PathLike[str]) -> bool:
    """Whether an adapter's file says that it was trained on turns in a chat template; False where it cannot be read."""
    return says_chat(_metadata(path))


def classification_of(path: str | os.PathLike[str]) -> Classification | None:
    """`AdapterFile.classification` of a file, without its tensors; None where it cannot be read.

    Raises:
      FormatError: what it says of its labels is damaged.
    """
    return read_classification(_metadata(path), path)


def _metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Of an adapter's file; none where it cannot be read: what is wrong with it is said when its tensors are."""
    from gemma import _adapter_peft
    from gemma.checkpoint import open_checkpoint

    path = Path(path)
    file = path / _adapter_peft.WEIGHTS if path.is_dir() else path
    try:
        with open_checkpoint(file) as opened:
            return dict(opened.metadata)
    except CheckpointError:
        return {}


def says_chat(metadata: Mapping[str, Any]) -> bool:
    """`AdapterFile.chat` of a file's metadata."""
    return str(metadata.get(CHAT, "")) == "true"


def read_classification(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> Classification | None:
    """`AdapterFile.classification` of a file's metadata; `path` is for the message.

    Raises:
      FormatError: it is damaged.
    """
    if CLASSIFICATION not in metadata:
        return None
    try:
        found = json.loads(str(metadata[CLASSIFICATION]))
    except (ValueError, RecursionError):
        found = None
    labels, template = (found.get("labels"), found.get("template")) if isinstance(found, dict) else (None, None)
    good = isinstance(labels, dict) and len(labels) > 1 and all(isinstance(text, str) for text in labels.values())
    if not good or not (template is None or (isinstance(template, str) and "{text}" in template)):
        rule = 'expected JSON {"labels": {name: text, ...}, "template": text with {text}, or null}'
        raise FormatError(path, None, f"{CLASSIFICATION}: {rule}, got {str(metadata[CLASSIFICATION])!r:.80}")
    return Classification(tuple(labels.items()), template)


def describes(adapter: AdapterFile) -> dict[str, str]:
    """What `says_chat` and `read_classification` read, for the metadata of a file."""
    said = {CHAT: "true"} if adapter.chat else {}
    if adapter.classification is not None:
        value = {"labels": dict(adapter.classification.labels), "template": adapter.classification.template}
        said[CLASSIFICATION] = json.dumps(value)  # not sorted: the order of labels is that of training
    return said


def save_adapter_file(
    path: str | os.PathLike[str], adapter: AdapterFile, config: Any, *, format: str | None = None, replace: bool = False
) -> None:
    """Writes an adapter for other programs.

    Args:
      path: of the folder (PEFT) or file (GGUF) to be.
      adapter: what to write.
      config: of the model that it belongs to.
      format: "peft" or "gguf"; None: by the name, GGUF if it ends in .gguf.
      replace: overwrite what is there.

    Raises:
      UnsupportedError: something that the format cannot hold.
      SaveError: it could not be written.
    """
    from gemma import _adapter_gguf, _adapter_peft

    path = Path(path)
    format = format or ("gguf" if path.suffix == ".gguf" else "peft")
    if format not in ("peft", "gguf"):
        raise ConfigError(f"format: expected peft or gguf, got {format!r}")
    table = adapter.check(config)
    (_adapter_gguf if format == "gguf" else _adapter_peft).write(path, adapter, config, table, replace=replace)


class _FusedReader:
    """Reads a tensor with an adapter's change in it: float32 sums, rounded once."""

    def __init__(self, reader: Any, low: LowRank):
        self._reader, self._low = reader, low
        self.dtype = reader.dtype if reader.dtype in ("F16", "BF16") else "F32"

    def __call__(self, dtype: Any = None) -> np.ndarray:
        own = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(self.dtype, np.float32)
        return self._low.apply(self._reader(np.float32)).astype(own if dtype is None else dtype)


def fused(
    tensors: Iterable[tuple[weights.Tensor, Any]], adapter: AdapterFile, *, check_base: bool = True
) -> Iterator[tuple[weights.Tensor, Any]]:
    """The tensors of a base with an adapter folded in: what `gemma.saving.save` and the loaders take.

    Args:
      tensors: (tensor, reader) pairs of the base, from `gemma.checkpoint.load_tensors`.
      adapter: bound to the same model.
      check_base: refuse another base than the one it was trained on.

    Raises:
      UnsupportedError: a change of the input embedding alone, which no weight of a tied model can hold.
      CheckpointError: another base.
    """
    pairs = list(tensors)
    readers = {tensor.name: reader for tensor, reader in pairs}
    missing = [name for name in adapter.tensors if name not in readers]
    if missing:
        raise WeightsMismatch(adapter.path or "adapter", missing=missing, hint="the base lacks tensors of the adapter")
    refuse_untied(adapter)
    if check_base:
        adapter.check_base(lambda name: readers[name](np.float32))
    for tensor, reader in pairs:
        low = adapter.tensors.get(tensor.name)
        yield tensor, reader if low is None else _FusedReader(reader, low)


def refuse_untied(adapter: AdapterFile) -> None:
    """An adapter of the input embedding alone has no fused form: the table is the output head, too."""
    if "embed" in adapter.tensors and not adapter.tied:
        raise UnsupportedError(
            f"{adapter.path or 'adapter'}: changes the input embedding but not the output head, which is the same table; "
            f"train it with ensure_weight_tying=True, or keep it beside the model"
        )
