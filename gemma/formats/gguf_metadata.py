# SPDX-License-Identifier: Apache-2.0
"""A GemmaConfig as the metadata of a GGUF, under the keys that llama.cpp reads: the inverse of `gguf_config.py`.

What the published files leave out because it belongs to the architecture is left out here too; what differs from the
architecture gets a key, and where llama.cpp has no use for that key, `warnings` says so. The vocabulary's keys are in
`gemma._tokenizer_write`; the bytes in `gguf_write.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemma.config import GemmaConfig
from gemma.errors import ConfigError
from gemma.formats.gguf_config import family_base

_PERIODS = {"gemma2": 2, "gemma3": 6}  # every n-th layer is global, where a file does not say otherwise


def architecture_of(config: Any) -> str:
    """`general.architecture`: gemma, gemma2 or gemma3, by what the layers do.

    Raises:
      ConfigError: a model that GGUF has no text architecture of this family for.
    """
    if not isinstance(config, GemmaConfig):
        raise ConfigError(f"GGUF holds decoders of Gemma 1 to 3, not a {type(config).__name__}; save it as safetensors")
    if config.vision is not None:
        raise ConfigError(
            "GGUF holds the text model alone (images are a second file of another kind): save the decoder with "
            "gemma.config.text_only(config), or the whole model as safetensors"
        )
    if not config.is_classic:
        raise ConfigError("GGUF holds decoders of Gemma 1 to 3, not of Gemma 3n and 4; save it as safetensors")
    if config.use_bidirectional_attention:
        raise ConfigError("GGUF: bidirectional attention has no key in the architecture gemma3; save it as safetensors")
    kinds = {(False, False): "gemma", (True, False): "gemma2", (True, True): "gemma3"}
    arch = kinds.get((config.use_post_norms, config.use_qk_norm))
    if arch is None:
        raise ConfigError("GGUF: use_qk_norm without use_post_norms is no architecture of the family")
    local = any(spec.attention == "local" for spec in config.layers)
    if arch == "gemma" and (local or config.attn_logit_softcapping or config.final_logit_softcapping):
        raise ConfigError("GGUF: the architecture gemma has no local layers and no soft-caps; save it as safetensors")
    if arch == "gemma3" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        raise ConfigError("GGUF: the architecture gemma3 has no soft-caps; save it as safetensors")
    return arch


def config_metadata(config: GemmaConfig, *, rows: int, name: str, file_type: int | None = None) -> dict[str, Any]:
    """The `general.*` and `<architecture>.*` keys.

    Args:
      config: of a text model.
      rows: of the embedding table as it is written.
      name: of the model, for people.
      file_type: number of the mix (`Mix.file_type`); None: not stated, readers look at the tensors.
    """
    arch = architecture_of(config)
    base = family_base(arch, config)
    keys: dict[str, Any] = {
        "vocab_size": rows,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if arch != "gemma":
        # A model without local layers has no window; the longest context is one that never acts.
        keys["attention.sliding_window"] = config.sliding_window or config.max_position_embeddings
        keys |= _pattern(config, arch)
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping or 0.0)
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping or 0.0)
    if config.rope_scaling_factor != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling_factor)}
    elif base.rope_scaling_factor != 1.0:
        keys["rope.scaling.type"] = "none"
    if arch == "gemma3" and _local_base(config) != _local_base(base):
        keys["rope.freq_base_swa"] = float(_local_base(config))
    if not _close(config.layers[0].query_scale, base.layers[0].query_scale):
        keys["attention.scale"] = float(config.layers[0].query_scale)
    general = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
    }
    general |= {} if file_type is None else {"general.file_type": file_type}
    return general | {f"{arch}.{key}": value for key, value in keys.items()}


def warnings(config: GemmaConfig) -> list[str]:
    """What llama.cpp would compute differently, because it takes it from the architecture and not from the file."""
    arch, found = architecture_of(config), []
    base, scale = family_base(arch, config), config.layers[0].query_scale
    if not _close(scale, base.layers[0].query_scale):
        found.append(
            f"llama.cpp scales queries by {base.layers[0].query_scale:.6g} whatever the file says; this model needs "
            f"{scale:.6g}"
        )
    if not config.tie_word_embeddings and arch != "gemma3":
        found.append(f"llama.cpp uses the embedding as the head of every {arch}; this model has its own head")
    if arch == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        found.append("llama.cpp applies both soft-caps to every gemma2; this model lacks one of them")
    if arch != "gemma" and isinstance(next(iter(_pattern(config, arch).values()), 0), np.ndarray):
        found.append("llama.cpp knows only patterns in which every n-th layer is global; this model has another one")
    return found


def _local_base(config: GemmaConfig) -> float:
    return config.rope_theta if config.rope_local_base_freq is None else config.rope_local_base_freq


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


def _pattern(config: GemmaConfig, arch: str) -> dict[str, Any]:
    """Which layers are local: nothing where it is the family's way, a period, or one truth value for each layer."""
    local = [spec.attention == "local" for spec in config.layers]
    for period in (_PERIODS[arch], *range(1, len(local) + 2)):
        if local == [(i + 1) % period != 0 for i in range(len(local))]:
            return {"attention.sliding_window_pattern": period} if period != _PERIODS[arch] else {}
    return {"attention.sliding_window_pattern": np.array(local)}
