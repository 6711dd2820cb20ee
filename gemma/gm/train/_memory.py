# SPDX-License-Identifier: Apache-2.0
"""Memory that a run needs, counted from its settings and the header of its checkpoint; no weights are read.

Arrays that last are counted exactly. What exists during a step (`_step_items`) is a formula whose factors come from the
buffers that XLA's compiler for CPUs assigns; it is within 10 % of them on the shapes that were tried, and an upper
estimate on accelerators, whose compilers fuse more. Inference is `gemma/fit.py`. Axis letters: N heads, H width of a
head, K key/value heads, D width of the model, F of the MLP, V ids, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gemma import config as configs
from gemma import fit, hub, weights
from gemma.finetuning import RunConfig
from gemma.gm import ckpts
from gemma.gm.losses._chunked import default_chunk
from gemma.peft import LoRASpec

_RUNTIME = 800_000_000  # Python, JAX, a tokenizer, compiled programs; most of it is the compiler's
_BLOCK = 4096  # rows of a table that is not trained whose logits exist at once on a CPU, see gm.losses
_BITS = {"int4": 4.5, "int8": 8.5, "sfp8": 8.0}


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for; where a run is spread over accelerators, of one of them.

    Attributes:
      items: name to bytes.
      available: of the device, or of the machine where the CPU is the device; None: not known.
      advice: what does not fit and which change of the settings would make it fit; empty if it fits.
    """

    items: Mapping[str, int]
    available: int | None
    advice: str = ""

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """Whether that much is available, or nothing is known about it."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        lines = [f"{name:<32}{fit.format_bytes(size)}" for name, size in self.items.items()]
        lines.append(f"{'memory needed, about':<32}{fit.format_bytes(self.total)}")
        if self.available is not None:
            lines.append(f"{'available':<32}{fit.format_bytes(self.available)}")
        return "\n".join([*lines, *([self.advice] if self.advice else [])])


def estimate_memory(run: RunConfig, *, images: bool = False) -> MemoryEstimate:
    """What a run will need.

    Args:
      run: its settings; a checkpoint that is not here is not fetched.
      images: the data hold pictures, so that the vision tower is loaded.

    Raises:
      GemmaError: the checkpoint cannot be found or read.
    """
    run = run.resolved()
    with ckpts.open_checkpoint(hub.resolve(run.model)) as checkpoint:
        whole = checkpoint.config()
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
    config = configs.text_only(whole)
    vision = 4 * (whole.num_parameters - config.num_parameters) if images else 0
    items = count_items(run, config, stored, vision)
    available = _available()
    advice = ""
    if available is not None and sum(items.values()) > available:
        advice = _advice(run, items, available, lambda other: count_items(other, config, stored, vision))
    return MemoryEstimate(items, available, advice)


def count_items(run: RunConfig, config: configs.GemmaConfig, stored: int, vision: int = 0) -> dict[str, int]:
    """Bytes of each part of a run.

    Args:
      run: resolved.
      config: of the text model.
      stored: bytes of the checkpoint's tensors, for a base that is trained upon as it is stored.
      vision: bytes of a vision tower.
    """
    width = 4 if _dtype(run) == "float32" else 2
    full = run.tuned == "full"
    trained = config.num_parameters if full else _adapter_values(run, config)
    shares, copies = _spread(run)
    base = _base(run, config, stored)
    items = {
        "weights, not trained": (0 if full else base) + vision,
        "weights, trained, in float32" if full else "adapter, in float32": 4 * trained,
        "moments of the optimizer": 8 * trained,
        "moving average": 4 * trained if run.ema else 0,
        "weights of the reference": base if full and run.objective in _WITH_REFERENCE.get(run.method, ()) else 0,
        "gradients": 4 * trained * (2 if run.accumulate > 1 else 1),
        "weights, rounded for a step": width * trained if full and (width < 4 or run.method == "qat") else 0,
    }
    items = {name: size // shares for name, size in items.items()}
    items |= _step_items(run, config, width, copies)
    items["Python, XLA"] = _RUNTIME
    return {name: size for name, size in items.items() if size}


_WITH_REFERENCE = {"dpo": ("preference",), "kto": ("kto",)}


def _dtype(run: RunConfig) -> str:
    if run.dtype != "auto":
        return run.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _base(run: RunConfig, config: configs.GemmaConfig, stored: int) -> int:
    """Bytes of the model that an adapter is put on, or that preferences are compared with."""
    if run.tuned != "qlora":
        return fit.stored_bytes(config, _dtype(run))
    if run.quantize == "keep":
        return stored
    bits = _BITS.get(str(run.quantize))
    return int(config.num_parameters * (bits or 4.8) / 8)


def _spread(run: RunConfig) -> tuple[int, int]:
    """Into how many parts arrays that last are cut, and over how many copies of the model the rows are spread.

    Devices that are simulated share the memory of the machine.
    """
    devices = jax.device_count()
    if run.sharding == "none" or jax.default_backend() == "cpu":
        return 1, 1
    if run.sharding == "tensor":
        return run.tensor, max(1, devices // run.tensor)
    return (devices if run.sharding == "fsdp" else 1), devices


def _adapter_values(run: RunConfig, config: configs.GemmaConfig) -> int:
    """Numbers in an adapter: r * (inputs + outputs) of each layer that it is put on."""
    spec = LoRASpec(rank=run.rank, targets=run.targets or None)
    layers: dict[str, list[Any]] = {}
    for tensor in weights.tensors(config):
        if "flax" in tensor.slots and len(tensor.shape) == 2:
            layers.setdefault(tensor.slots["flax"].name, []).append(tensor)
    chosen = [members for name, members in layers.items() if spec.wants(name.removesuffix("/w"))]
    return sum(run.rank * (members[0].shape[1] + sum(t.shape[0] for t in members)) for members in chosen)


def _step_items(run: RunConfig, config: configs.GemmaConfig, width: int, copies: int) -> dict[str, int]:
    """What exists while a step is computed."""
    tokens = -(-run.batch_size * (2 if run.objective == "preference" else 1) // copies) * run.max_length
    layers, full, cpu = config.num_hidden_layers, run.tuned == "full", jax.default_backend() == "cpu"
    one = int(tokens * _layer_values(config, run.max_length) * width * (_FULL if full else 1))
    kept = tokens * config.hidden_size * width
    if run.remat == "dots":
        kept += int(0.9 * tokens * _product_values(config) * width)
    items = {"activations": layers * one}
    if run.remat != "none":
        items = {"activations, kept": layers * kept, "activations of one layer": int(_AGAIN[run.remat] * one)}
    chunk, table = min(default_chunk(), tokens), 4 * config.table_rows * config.hidden_size
    if full:
        # With all activations: a chunk's logits and the head's gradient of the table. Without them: that, the embedding's
        # gradient of it, and their sum, which counts as a gradient.
        name, head = "logits, gradients of the table", 4 * chunk * config.vocab_size + table
        head = max(head, 2 * table - sum(items.values()))
    else:
        name = "logits of a chunk"
        head = 3 * 4 * chunk * (min(_BLOCK, config.vocab_size) if cpu else config.vocab_size)
    return {**items, name: head, "weights in other orders": layers * _reordered(config) * width if cpu else 0}


# Factors of the following: values of the buffers that XLA assigns on a CPU to Gemma 2 2B, Gemma 3 270M and 1B, fitted.
_FULL = 0.8  # without the products of adapters
_AGAIN = {"block": 1.1, "dots": 0.75}  # of a layer that is computed a second time, what exists at once


def _layer_values(config: configs.GemmaConfig, length: int) -> int:
    """Values per token that a layer with adapters leaves for its backward pass."""
    heads = config.num_attention_heads
    attention = int(7.5 * heads * config.head_dim) + 4 * heads * length
    return 5 * config.hidden_size + 7 * config.intermediate_size + attention


def _product_values(config: configs.GemmaConfig) -> int:
    """Values per token of a layer's products with weights, which `remat="dots"` keeps."""
    inner = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return inner + 2 * config.intermediate_size + 2 * config.hidden_size


def _reordered(config: configs.GemmaConfig) -> int:
    """Values of a layer's weights that XLA copies into the order of axes in which it multiplies."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * config.hidden_size
    gating = 0 if config.transpose_gating_einsum else 2 * config.intermediate_size * config.hidden_size
    return 2 * attention + gating


def _available() -> int | None:
    device = jax.devices()[0]
    if device.platform == "cpu":
        found = fit.machine_memory()
        return None if found is None else found.available
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


# ---- what to change --------------------------------------------------------------------------------------------------


def _ways(run: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that need less memory, those that change the result least first."""
    if run.remat != "block":
        yield "remat block", dict(remat="block")
    if run.batch_size > 1:
        parts = run.batch_size * run.accumulate
        yield f"batch_size 1 with accumulate {parts}", dict(batch_size=1, accumulate=parts)
    if run.tuned == "lora":
        yield ("method qlora" if run.method == "lora" else "tune qlora"), _tuned(run, "qlora")
    if run.tuned == "full" and run.method != "qat":
        yield ("method lora" if run.method == "full" else "tune lora"), _tuned(run, "lora")
    if _dtype(run) == "float32" and run.tuned != "qlora":
        yield "dtype bfloat16", dict(dtype="bfloat16")
    if run.max_length > 128:
        yield f"max_length {run.max_length // 2}", dict(max_length=run.max_length // 2)


def _tuned(run: RunConfig, how: str) -> dict[str, Any]:
    method = how if run.method in ("lora", "full") else run.method
    return dict(method=method, tune=how, quantize="keep" if how == "qlora" else None)


def _advice(run: RunConfig, items: Mapping[str, int], available: int, count: Any) -> str:
    worst = max((name for name in items if name != "Python, XLA"), key=items.__getitem__)
    begin = f"does not fit: {worst} ({fit.format_bytes(items[worst])}) take the most"
    together: dict[str, Any] = {}
    words = []
    for way, changes in _ways(run):
        alone = sum(count(dataclasses.replace(run, **changes)).values())
        if alone <= available:
            return f"{begin}; with {way} the run takes about {fit.format_bytes(alone)}"
        together |= {name: value for name, value in changes.items() if name not in together}
        words.append(way)
        total = sum(count(dataclasses.replace(run, **together)).values())
        if len(words) > 1 and total <= available:
            return f"{begin}; with {', '.join(words)} the run takes about {fit.format_bytes(total)}"
    return f"{begin}; no change of the settings makes it fit: use a smaller model or another machine"
