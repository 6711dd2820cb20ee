# SPDX-License-Identifier: Apache-2.0
"""Memory that a run needs, counted from its settings and the header of its checkpoint; no weights are read.

Inference is `gemma/fit.py`. What surrounds the arrays (Python, XLA, compilation) is about 1 GB on a CPU and is an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from gemma import config as configs
from gemma import fit, hub, weights
from gemma.finetuning import RunConfig
from gemma.gm import ckpts
from gemma.peft import LoRASpec

_RUNTIME = 10**9
_CHUNK = 256  # positions whose logits exist at once, see gm.losses


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for.

    Attributes:
      items: name to bytes.
      available: of the device, or of the machine where the CPU is the device; None: not known.
      advice: what would need less; empty if it fits.
    """

    items: Mapping[str, int]
    available: int | None
    advice: str = ""

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def __str__(self) -> str:
        lines = [f"{name:<32}{fit.format_bytes(size)}" for name, size in self.items.items()]
        lines.append(f"{'memory needed, about':<32}{fit.format_bytes(self.total)}")
        if self.available is not None:
            lines.append(f"{'available':<32}{fit.format_bytes(self.available)}")
        return "\n".join([*lines, *([self.advice] if self.advice else [])])


def estimate_memory(run: RunConfig) -> MemoryEstimate:
    """What a run will need.

    Args:
      run: its settings; a checkpoint that is not here is not fetched.

    Raises:
      GemmaError: the checkpoint cannot be found or read.
    """
    run = run.resolved()
    with ckpts.open_checkpoint(hub.resolve(run.model)) as checkpoint:
        config = configs.text_only(checkpoint.config())
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
    dtype = run.dtype if run.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    width = 4 if dtype == "float32" else 2
    full = run.tuned == "full"
    trained = config.num_parameters if full else _adapter_values(run, config)
    base = fit.stored_bytes(config, dtype)
    if run.tuned == "qlora":
        bits = {"int4": 4.5, "int8": 8.0, "sfp8": 8.0}.get(run.quantize)
        base = stored if run.quantize == "keep" else int(config.num_parameters * (bits or 4.8) / 8)
    rows = run.batch_size * (2 if run.objective == "preference" else 1)
    items = {
        "weights": base,
        "trained, in float32": 4 * trained,
        "moments of the optimizer": 8 * trained,
        "gradients": 4 * trained,
        **({"moving average": 4 * trained} if run.ema else {}),
        **({"reference model": base} if full and run.method in ("dpo", "kto") else {}),
        "activations": _activations(run, config, rows, width),
        "logits": 3 * 4 * min(_CHUNK, rows * run.max_length) * config.vocab_size,
        "Python, XLA": _RUNTIME,
    }
    available = _available()
    total = sum(items.values())
    return MemoryEstimate(items, available, _advice(run, items) if available is not None and total > available else "")


def _adapter_values(run: RunConfig, config: Any) -> int:
    spec = LoRASpec(rank=run.rank, targets=run.targets or None)
    names = {t.slots["flax"].name: [] for t in weights.tensors(config) if "flax" in t.slots and len(t.shape) == 2}
    for tensor in weights.tensors(config):
        if "flax" in tensor.slots and tensor.slots["flax"].name in names:
            names[tensor.slots["flax"].name].append(tensor)
    count = 0
    for name, members in names.items():
        if spec.wants(name.removesuffix("/w")):
            count += run.rank * (members[0].shape[1] + sum(tensor.shape[0] for tensor in members))
    return count


def _activations(run: RunConfig, config: Any, rows: int, width: int) -> int:
    """Kept for the backward pass: a token's vectors in each layer, and the attention weights."""
    tokens = rows * run.max_length
    heads = config.num_attention_heads
    per_token = (8 * config.hidden_size + 4 * config.intermediate_size + 4 * heads * config.head_dim) * width
    layer = tokens * per_token + 2 * 4 * rows * heads * run.max_length**2
    if run.remat == "none":
        return layer * config.num_hidden_layers
    return layer + tokens * config.hidden_size * width * config.num_hidden_layers


def _available() -> int | None:
    device = jax.devices()[0]
    if device.platform == "cpu":
        found = fit.machine_memory()
        return None if found is None else found.available
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _advice(run: RunConfig, items: Mapping[str, int]) -> str:
    worst = max(items, key=items.__getitem__)
    ways = {
        "weights": "train with method qlora, or in dtype bfloat16",
        "activations": "a smaller batch_size (with accumulate), max_length, or remat block",
        "logits": "a smaller batch_size",
    }
    way = ways.get(worst, "method lora instead of full" if run.tuned == "full" else "a smaller rank")
    return f"does not fit: {worst} are the largest part; try {way}"
