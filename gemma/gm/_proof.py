# SPDX-License-Identifier: Apache-2.0
"""The proof of a file of weights: what was written is opened again and compared with its source.

Structure: every tensor of the model is there, and nothing else; safetensors are also looked at with the format's own
library. Values: each number is what rounding to the stated type makes of the source's, bit for bit, or, where a tensor
was quantized, off by exactly the error that the writer announced. Answers: the logits of a fixed prompt. Conversions
(`gemma/cli/_convert.py`) and trained models (`gm/train/_run_exports.py`) are proven here; comparing is `gemma.compare`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma import saving, weights
from gemma.checkpoint import Checkpoint, TokenizerSource
from gemma.compare import Comparison, TensorDifference, compare, config_changes, network_changes
from gemma.config import GemmaConfig
from gemma.errors import GemmaError
from gemma.saving import SavedTensor, SaveReport

PROMPT = "The history of computing began"
_PROMPT_IDS = 12  # tokens of a made-up prompt, for a model without a tokenizer
_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The errors that are measured again and those that were announced differ by the order of additions only. One code that
# is off by one changes the mean square of a million weights by more than this.
_SAME_ERROR = 1e-6
_TEXTS = (PROMPT, "  Two  spaces,\nA LINE, 1947 and \u65e5\u672c\u8a9e \N{GRINNING FACE}")


@dataclasses.dataclass(frozen=True)
class Logits:
    """Both models on the same prompt: float32 logits compared over all positions.

    Attributes:
      tokens: of the prompt.
      max_abs: largest difference.
      kl: mean over positions of the divergence from the source's distribution, in nats.
      same_top: positions with the same arg-max.
    """

    tokens: int
    max_abs: float
    kl: float
    same_top: int


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found when the written files were opened again; `problems` is empty for a good conversion."""

    comparison: Comparison
    logits: Logits | None
    no_logits: str
    tokenizer: str
    problems: tuple[str, ...]


def open_any(path: Path, *, mmap: bool = True) -> Checkpoint:
    """A checkpoint of any kind, Orbax folders included; JAX is loaded for those only."""
    from gemma._orbax_folder import is_orbax

    if is_orbax(path):
        from gemma.gm.ckpts._orbax import open_checkpoint as open_orbax

        return open_orbax(path)
    from gemma.checkpoint import open_checkpoint

    return open_checkpoint(path, mmap=mmap)


def prove(
    source: Checkpoint | Sequence[tuple[Any, Any]],
    config: Any,
    report: SaveReport,
    staged: Path,
    progress: Callable[[str, int, int], None],
    tokenizer: TokenizerSource | None,
    *,
    answers: Callable[[Sequence[int]], np.ndarray] | None,
    same_bits: bool = True,
    text_only: bool = False,
    mmap: bool = True,
) -> Proof:
    """Opens what was written and compares it with the source.

    Args:
      source: what was to be written: an open checkpoint, or the (tensor, reader) pairs that were saved.
      config: of the model.
      report: of the writer.
      staged: where the file or folder is.
      progress: called with (what, done, total).
      tokenizer: that went with it.
      answers: ids to the source's float32 logits [T, V]. None: logits are left out.
      same_bits: equal weights must give equal logits. False: where `answers` computes in another order.
      text_only: leave vision towers out.
      mmap: map files instead of copying from them.
    """
    problems = list(_structure(report.format, report, staged))
    column = saving.FORMATS[report.format].column if report.format in saving.FORMATS else "flax"
    saved = _by_tensor(report, config, column)
    expected = dict(_expectations(saved, config, column))
    held = _held_config(config, saved)
    with open_any(staged, mmap=mmap) as written:
        comparison = compare(
            source,
            written,
            config=config,
            config_b=held,
            expected=expected,
            text_only=text_only,
            progress=lambda done, total: progress("comparing values", done, total),
        )
        problems += _value_problems(comparison, saved)
        problems += _announcement_problems(written, report)
        problems += _config_problems(written, held)
        tokens, odd = _compare_tokenizers(tokenizer, written.tokenizer_source(), report.format)
        problems += odd
    logits, reason = None, "left out (--no-logits)"
    if answers is not None and not problems:
        progress("comparing logits", 0, 2)
        logits, reason = _compare_logits(answers, config, held, staged, progress, tokenizer)
        if logits is not None and not (
            np.isfinite(logits.max_abs) and (logits.max_abs == 0 or not (same_bits and comparison.same_values))
        ):
            problems.append(f"the same weights give other logits: {logits.max_abs} apart")
    return Proof(comparison, logits, reason, tokens, tuple(problems))


def _held_config(config: Any, saved: Mapping[str, SavedTensor]) -> Any:
    """The configuration of what was written: a GGUF has one row for each piece, and leaves the others out."""
    table = saved.get("embed")
    if table is None or not isinstance(config, GemmaConfig) or table.shape[0] >= config.vocab_size:
        return config
    return dataclasses.replace(config, vocab_size=table.shape[0])


def _structure(format: str, report: SaveReport, staged: Path) -> Iterator[str]:
    """safetensors are also opened by the format's own library: names, types and shapes must be those announced."""
    if format != "safetensors":
        return
    from safetensors import safe_open

    from gemma._hf_packed import arrays_of

    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(staged.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            names = opened.keys()  # not a dict: it cannot be iterated itself
            for name in names:
                part = opened.get_slice(name)
                seen[name] = (part.get_dtype(), tuple(part.get_shape()))
    announced: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in report.tensors:
        announced |= arrays_of(tensor)
    for name in sorted(set(seen) | set(announced)):
        if seen.get(name) != announced.get(name):
            yield f"{name}: announced {announced.get(name)}, the safetensors library sees {seen.get(name)}"


def _announcement_problems(written: Checkpoint, report: SaveReport) -> Iterator[str]:
    """Every array that was announced is there in its type, and no other."""
    announced = {tensor.name: tensor.type for tensor in report.tensors}
    seen = {name: info.dtype for name, info in written.tensors.items()}
    for name in sorted(set(seen) | set(announced)):
        if seen.get(name) != announced.get(name):
            yield f"{name}: announced as {announced.get(name)}, found as {seen.get(name)}"


def _by_tensor(report: SaveReport, config: Any, column: str) -> dict[str, SavedTensor]:
    """Canonical name to the array of the file that the tensor is in."""
    arrays = {array.name: array for array in report.tensors}
    table = [tensor for tensor in weights.tensors(config) if column in tensor.slots]
    return {t.name: arrays[t.slots[column].name] for t in table if t.slots[column].name in arrays}


def _expectations(saved: Mapping[str, SavedTensor], config: Any, column: str):
    """For each tensor that is stored as floats, what its values should have become."""
    for tensor in weights.tensors(config):
        array = saved.get(tensor.name)
        if array is None or array.type not in _FLOATS:
            continue
        dtype, offset = _FLOATS[array.type], np.float32(tensor.slots[column].offset)

        def rounded(x: np.ndarray, dtype=dtype, offset=offset) -> np.ndarray:
            return (
                (x + offset).astype(dtype).astype(np.float32) - offset if offset else x.astype(dtype).astype(np.float32)
            )

        yield tensor.name, rounded


def _value_problems(found: Comparison, saved: Mapping[str, SavedTensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in found.only_a)
    yield from (f"{name} should not be there" for name in found.only_b)
    yield from found.shapes
    worst: dict[str, float] = {}
    squares: dict[str, float] = {}
    for t in found.tensors:
        if t.unexpected:
            yield f"{t.name}: {t.unexpected} values are not the source's rounded to {saved[t.name].type}"
        if t.unexpected is None:
            array = saved[t.name]
            values = min(math.prod(t.shape), math.prod(array.shape))
            worst[array.name] = max(worst.get(array.name, 0.0), t.max_abs)
            squares[array.name] = squares.get(array.name, 0.0) + t.rmse**2 * values
    for array in {array.name: array for array in saved.values() if array.name in worst}.values():
        rmse = math.sqrt(squares[array.name] / max(1, math.prod(array.shape)))
        for what, announced, found in (
            ("a largest error", array.max_error or 0.0, worst[array.name]),
            ("a mean error", array.rmse or 0.0, rmse),
        ):
            if not abs(found - announced) <= _SAME_ERROR * announced:
                yield f"{array.name}: {what} of {announced:.9g} was announced ({array.type}), but {found:.9g} is found"


def _config_problems(written: Checkpoint, config: Any) -> Iterator[str]:
    """What the written files say differently about the network; each format is written with a configuration."""
    try:
        stated = written.config()
    except GemmaError as error:
        yield f"the written files state no configuration that can be used: {error}"
        return
    for line in network_changes(config_changes(config, stated)):
        yield f"the written files state another configuration (wanted, stated): {line}"


def _compare_tokenizers(
    source: TokenizerSource | None, written: TokenizerSource | None, format: str
) -> tuple[str, list[str]]:
    """(what the report says, problems): both must encode two texts alike."""
    from gemma.tokenizer import Tokenizer

    if source is None:
        return "none came with the source", []
    try:
        expected = [Tokenizer.from_source(source).encode(text) for text in _TEXTS]
    except GemmaError as error:
        return f"not compared, the source's is not readable: {error}", []
    if written is None:
        text = f"{format} was written without the tokenizer"
        return text, [] if format == "sbs" else [text]
    found = [Tokenizer.from_source(written).encode(text) for text in _TEXTS]
    if found == expected:
        return f"encodes {len(_TEXTS)} texts as the source's does", []
    return "differs", ["the written tokenizer encodes a text otherwise than the source's"]


def _compare_logits(answers, config: Any, held: Any, staged: Path, progress, tokenizer) -> tuple[Logits | None, str]:
    if not isinstance(config, GemmaConfig) or config.use_bidirectional_attention:
        kind = type(config).__name__.removesuffix("Config")
        return None, f"not compared: there is no JAX network for a {kind} model; all values were"
    from gemma.gm._prompt_logits import prompt_logits

    ids = _prompt_ids(tokenizer, held)
    before = answers(ids)[:, : held.vocab_size]
    progress("comparing logits", 1, 2)
    after = prompt_logits(staged, held, ids)
    progress("comparing logits", 2, 2)
    p, q = _log_softmax(before), _log_softmax(after)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    return Logits(len(ids), float(np.abs(before - after).max()), max(kl, 0.0), same), ""


def _prompt_ids(source: TokenizerSource | None, config: GemmaConfig) -> list[int]:
    from gemma.tokenizer import Tokenizer

    if source is not None:
        ids = Tokenizer.from_source(source).encode(PROMPT, add_bos=True)
        if max(ids) < config.vocab_size:
            return ids
    step = max(1, config.vocab_size // (_PROMPT_IDS + 4))
    return [config.bos_token_id, *(3 + n * step for n in range(1, _PROMPT_IDS))]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def worst_tensors(comparison: Comparison, count: int = 5) -> list[TensorDifference]:
    """The tensors with the largest error in proportion to their size."""
    changed = [t for t in comparison.tensors if not t.equal and t.scale]
    return sorted(changed, key=lambda t: t.rmse / t.scale, reverse=True)[:count]
