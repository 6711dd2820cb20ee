# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for other programs: an adapter, merged safetensors, GGUF. Each is opened again before it appears.

Writing is `gemma/saving.py` and `gemma/adapters.py`, the proof `gemma/gm/_proof.py`; which files a run wants says its
`RunConfig`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import adapters, hub, peft, saving, weights
from gemma import config as configs
from gemma._atomic import publish
from gemma._chat_jinja import jinja
from gemma._tokenizer_write import chat_template
from gemma.chat import end_token_ids, format_for
from gemma.checkpoint import TokenizerSource, load_tensors
from gemma.errors import SaveError
from gemma.finetuning import RunConfig
from gemma.gm import _proof, ckpts
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.train._run_model import Base, Network
from gemma.gm.typing import Params

Pairs = list[tuple[weights.Tensor, Any]]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Export:
    """Something that was written and proven.

    Attributes:
      kind: one of `gemma.finetuning.EXPORTS`.
      path: of the file or folder.
      bytes: of all its files.
      exact: tensors that hold the trained numbers, rounded to the stated type at most; `tensors`: all of them. The
        others were quantized, off by the error that was announced.
      logits: against the trained model on a prompt; None where they were not compared, `no_logits` says why.
      notes: for the user.
    """

    kind: str
    path: Path
    bytes: int
    exact: int
    tensors: int
    logits: _proof.Logits | None = None
    no_logits: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        proof = f"{self.exact} of {self.tensors} tensors exact"
        if self.exact < self.tensors:
            proof += ", the others off by the announced error"
        found = self.logits
        if found is not None:
            proof += f"; logits at most {found.max_abs:.2g} apart, KL {found.kl:.1e}, same arg-max {found.same_top} of "
            proof += str(found.tokens)
        return proof


def export(
    run: RunConfig, base: Base, network: Network, params: Params, folder: Path, progress: Progress
) -> Iterator[Export]:
    """Writes what the run wants, one after the other; each appears in the folder only when its proof holds.

    Args:
      run: resolved.
      base: the model it began with.
      network: that was trained; its parameters are not used.
      params: the trained tree.
      folder: of the run.
      progress: called with (what, done, total).

    Raises:
      SaveError: it could not be written, or does not hold what it should.
    """
    answers = None
    if run.proof_logits and any(not kind.startswith("adapter") for kind in run.export):
        answers = functools.lru_cache(maxsize=1)(functools.partial(_answers, network.model, params))
    file = None
    if run.tuned != "full":
        file = peft.adapter_file(
            params, network.model, base_model=hub.DEMO_REPOSITORY if run.model == hub.DEMO else run.model
        )
        file = dataclasses.replace(file, chat=network.chat, classification=network.classification)
    for kind in run.export:
        if kind.startswith("adapter"):
            yield _adapter(kind, file, base, folder)
    with ckpts.open_checkpoint(base.path) as checkpoint:
        pairs = _merged(run, base, params, file, checkpoint)
        source = checkpoint.tokenizer_source()
        if network.chat and chat_template(source) is None:  # a pretrained base has none; what it became speaks in turns
            source = dataclasses.replace(source, template=jinja(format_for(base.tokenizer)))
        if network.chat:  # other programs stop where the configuration says so, and nowhere else
            ends = tuple(sorted(end_token_ids(base.tokenizer, base.config)))
            base = dataclasses.replace(base, config=dataclasses.replace(base.config, eos_token_id=ends))
        for kind in run.export:
            for name, format, options in _files(run, kind):
                options["tokenizer"] = source
                yield _weights(kind, folder / name, format, options, pairs, base, answers, progress)


def _files(run: RunConfig, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name in the folder, format, arguments of `saving.save`) of each file of a kind."""
    if kind == "merged":
        yield "merged", "safetensors", dict(dtype=run.merged_dtype)
    if kind == "gguf":
        for name in run.gguf:
            yield f"model-{name}.gguf", "gguf", dict(quantize=name)
    if kind == "quantized":
        if run.quantize == "q4_0":
            yield "model-q4_0.gguf", "gguf", dict(quantize="q4_0_pure")
        else:
            format = "sbs" if run.quantize == "sfp8" else "safetensors"
            yield f"quantized-{run.quantize}", format, dict(quantize=run.quantize)


def _answers(model: Any, params: Params, ids: tuple[int, ...]) -> np.ndarray:
    """float32 logits [T, V] of the trained model."""
    tokens = jnp.asarray([ids], jnp.int32)
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens).logits)(params)
    return np.asarray(logits[0], np.float32)


def _adapter(kind: str, file: adapters.AdapterFile, base: Base, folder: Path) -> Export:
    target = folder / ("adapter.gguf" if kind == "adapter-gguf" else "adapter")
    with staging(target) as staged:
        adapters.save_adapter_file(staged, file, base.config)
        found = adapters.open_adapter(staged, base.config)
        wrong = sorted(set(file.tensors) ^ set(found.tensors))
        wrong += [name for name, low in file.tensors.items() if name in found.tensors and not _same(low, found, name)]
        if found.chat != file.chat:
            wrong.append("the mark of a chat")
        if found.classification != file.classification:
            wrong.append("the labels")
        if wrong:
            raise _not_proven(target, [f"{name}: is not what was trained" for name in wrong])
        size = _size(staged)
        publish(staged, target, replace=True)
    return Export(kind, target, size, len(file.tensors), len(file.tensors))


def _same(low: adapters.LowRank, found: adapters.AdapterFile, name: str) -> bool:
    other = found.tensors[name]
    parts = [(low.a, other.a), (low.b, other.b)]
    if low.magnitude is not None:
        parts.append((low.magnitude, other.magnitude))
    alike = all(b is not None and np.array_equal(np.float32(a), np.float32(b)) for a, b in parts)
    return alike and np.isclose(low.scale, other.scale, rtol=1e-6)  # stored as alpha over rank


def _merged(run: RunConfig, base: Base, params: Params, file: adapters.AdapterFile | None, checkpoint: Any) -> Pairs:
    """The whole model with what was learnt in it, as (tensor, reader) pairs.

    What an adapter leaves alone is read from the checkpoint, so that it keeps its type and its bytes. A base that was
    quantized for the run is the one that the adapter belongs to, and is taken from memory.
    """
    stored = {tensor.name: (tensor, reader) for tensor, reader in load_tensors(checkpoint, base.config)}
    from_file = file is not None and (run.tuned == "lora" or run.quantize == "keep")
    if not from_file:
        own = flatten(peft.split_params(params).original)
        stored |= {tensor.name: (tensor, reader) for tensor, reader in _readers(own, base.config)}
    pairs = list(stored.values())
    return pairs if file is None else list(adapters.fused(pairs, file))


def _readers(leaves: dict[str, Any], config: configs.GemmaConfig) -> Iterator[tuple[weights.Tensor, Any]]:
    """The tensors that a flat tree holds."""
    for tensor in weights.tensors(config):
        slot = tensor.slots.get("flax")
        leaf = None if slot is None else leaves.get(slot.name)
        if leaf is not None:
            packed = hasattr(leaf, "dequantize")
            kind = np.float32 if packed else np.dtype(leaf.dtype)
            yield tensor, saving.ArrayReader(functools.partial(_canonical, leaf, tensor), kind)


def _canonical(leaf: Any, tensor: weights.Tensor) -> np.ndarray:
    array = np.asarray(leaf.dequantize(jnp.float32) if hasattr(leaf, "dequantize") else leaf)
    value = weights.extract(array, tensor, dataclasses.replace(tensor.slots["flax"], shape=array.shape))
    return weights.fit_rows(value, tensor.shape[0]) if tensor.axes[0] == "V" else value


def _weights(
    kind: str,
    target: Path,
    format: str,
    options: dict[str, Any],
    pairs: Pairs,
    base: Base,
    answers: Callable[[tuple[int, ...]], np.ndarray] | None,
    progress: Progress,
) -> Export:
    config, chosen = base.config, pairs
    column = saving.FORMATS[format].column
    if any(column not in tensor.slots for tensor, _ in pairs):  # a GGUF of the decoder has no place for the tower
        config = configs.text_only(config)
        names = {tensor.name for tensor in weights.tensors(config)}
        chosen = [(tensor, reader) for tensor, reader in pairs if tensor.name in names]
    tokenizer: TokenizerSource | None = options["tokenizer"]
    with staging(target) as staged:
        report = saving.save(
            staged,
            chosen,
            config,
            format=format,
            progress=lambda done, total: progress(f"writing {target.name}", done, total),
            **options,
        )
        proof = _proof.prove(
            chosen,
            config,
            report,
            staged,
            progress,
            tokenizer,
            answers=None if answers is None else lambda ids: answers(tuple(ids)),
            same_bits=False,
        )
        if proof.problems:
            raise _not_proven(target, proof.problems)
        publish(staged, target, replace=True)
    tensors = proof.comparison.tensors
    exact = sum(t.unexpected == 0 or t.equal for t in tensors)
    return Export(kind, target, report.bytes, exact, len(tensors), proof.logits, proof.no_logits, report.notes)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A path beside the target, in a folder that is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=".gemma-export-", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_proven(target: Path, problems: Sequence[str]) -> SaveError:
    shown = "".join(f"\n  {problem}" for problem in problems[:20])
    return SaveError(
        f"{target}: NOT exported: what was written does not hold what was trained, and was deleted again; the run's "
        f"checkpoints are intact, and the same command tries again. This is a defect of gemmakit or of the disk:{shown}"
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
