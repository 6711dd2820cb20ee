# SPDX-License-Identifier: Apache-2.0
"""Model weights as three other projects lay them out, made from a Hugging Face state dict and turned back into one.

gemma_pytorch (`.ckpt`), big_vision (`.npz`) and gemma.cpp (`.sbs`). Written from the descriptions of those layouts with
numpy only, not from `gemma.weights`: a reader and a writer that share a table would agree with each other. Names are
those of Hugging Face without their root: `embed_tokens.weight`, `layers.0.mlp.up_proj.weight`, `vision...`.
"""

from __future__ import annotations

import re

import numpy as np

NORMS1 = ("input_layernorm", "post_attention_layernorm")
NORMS = (*NORMS1, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def text_part(state: dict) -> dict:
    """The decoder's tensors without the root of their names; the head is tied in all three layouts."""
    roots = ("model.language_model.", "language_model.model.", "model.")
    found = {}
    for name, value in state.items():
        root = next((root for root in roots if name.startswith(root)), None)
        if root and re.match(r"(embed_tokens|layers|norm)\.", name[len(root) :]):
            found[name[len(root) :]] = value
    return found


def tower_part(state: dict) -> dict:
    """The tower's tensors: `embeddings...`, `encoder.layers...`, `post_layernorm...`."""
    found = {}
    for name, value in state.items():
        match = re.match(r".*?vision_tower\.(vision_model\.)?(.*)", name)
        if match and "position_ids" not in name:
            found[match[2]] = value
    return found


def layers_of(part: dict, prefix: str = "layers.") -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in part if name.startswith(prefix))


def _norms(part: dict) -> tuple[str, ...]:
    return NORMS if "layers.0.pre_feedforward_layernorm.weight" in part else NORMS1


# ---- gemma_pytorch ----------------------------------------------------------------------------------------------------


def gemma_pytorch(state: dict) -> dict[str, np.ndarray]:
    """q, k and v in one matrix of rows; everything else as in Hugging Face, under other names."""
    text, tower = text_part(state), tower_part(state)
    out = {"text_token_embedder.weight" if tower else "embedder.weight": text["embed_tokens.weight"]}
    for i in range(layers_of(text)):
        source, target = f"layers.{i}.", f"model.layers.{i}."
        fused = [text[f"{source}self_attn.{p}_proj.weight"] for p in "qkv"]
        out[f"{target}self_attn.qkv_proj.weight"] = np.concatenate(fused)
        out[f"{target}self_attn.o_proj.weight"] = text[f"{source}self_attn.o_proj.weight"]
        for hf, name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            if f"{source}self_attn.{hf}.weight" in text:
                out[f"{target}self_attn.{name}.weight"] = text[f"{source}self_attn.{hf}.weight"]
        for name in (*(f"mlp.{p}_proj" for p in ("gate", "up", "down")), *_norms(text)):
            out[f"{target}{name}.weight"] = text[f"{source}{name}.weight"]
    out["model.norm.weight"] = text["norm.weight"]
    for name, value in tower.items():
        name = name.replace("encoder.layers.", "encoder_blocks.").replace("out_proj", "o_proj")
        name = name.replace("embeddings.", "").replace("post_layernorm", "final_norm")
        out[f"siglip_vision_model.{name}"] = value
    for name, value in state.items():
        if name.endswith("mm_soft_emb_norm.weight"):
            out["mm_soft_embedding_norm.weight"] = value
        if name.endswith("mm_input_projection_weight"):
            out["mm_input_projection.weight"] = value.T  # a torch Linear: [out, in]
    return out


def from_gemma_pytorch(state: dict, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """The decoder of a gemma_pytorch state dict under Hugging Face's names (root `model.`)."""
    out = {}
    for name, value in state.items():
        if name.endswith("qkv_proj.weight"):
            size = value.shape[0] // (heads + 2 * kv_heads)
            ends = np.cumsum([heads * size, kv_heads * size, kv_heads * size])
            for part, stop, start in zip("qkv", ends, (0, *ends)):
                out[name.replace("qkv_proj", f"{part}_proj")] = value[start:stop]
        elif name == "embedder.weight":
            out["model.embed_tokens.weight"] = value
        else:
            out[name.replace("query_norm", "q_norm").replace("key_norm", "k_norm")] = value
    return out


def int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and one float per row, weight = code * scaler."""
    scaler = (np.abs(matrix).max(1) / 127).astype(np.float32)
    return np.round(matrix / scaler[:, None]).astype(np.int8), scaler


# ---- big_vision -------------------------------------------------------------------------------------------------------

_BLOCK = {
    "layer_norm1": "LayerNorm_0",
    "layer_norm2": "LayerNorm_1",
    "mlp.fc1": "MlpBlock_0/Dense_0",
    "mlp.fc2": "MlpBlock_0/Dense_1",
    "self_attn.q_proj": "MultiHeadDotProductAttention_0/query",
    "self_attn.k_proj": "MultiHeadDotProductAttention_0/key",
    "self_attn.v_proj": "MultiHeadDotProductAttention_0/value",
    "self_attn.out_proj": "MultiHeadDotProductAttention_0/out",
}
_BV_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def big_vision(state: dict, heads: int, kv_heads: int, tower_heads: int) -> dict[str, np.ndarray]:
    """A PaliGemma: `params/llm/` and `params/img/`, layers stacked on axis 0."""
    text, tower = text_part(state), tower_part(state)
    norms = _norms(text)
    named = dict(_BV_NORMS) if len(norms) == 4 else dict(zip(NORMS1, ("pre_attention_norm", "pre_ffw_norm")))
    layers: dict[str, list] = {}
    for i in range(layers_of(text)):
        at = f"layers.{i}."
        q, k, v = (text[f"{at}self_attn.{p}_proj.weight"] for p in "qkv")  # [(N H), D]
        D, H = q.shape[1], q.shape[0] // heads
        one = {"attn/q_einsum/w": q.reshape(heads, H, D).transpose(0, 2, 1)}
        one["attn/kv_einsum/w"] = np.stack([m.reshape(kv_heads, H, D).transpose(0, 2, 1) for m in (k, v)])
        o = text[f"{at}self_attn.o_proj.weight"]  # [D, (N H)]
        one["attn/attn_vec_einsum/w"] = o.reshape(D, heads, H).transpose(1, 2, 0)
        one["mlp/gating_einsum"] = np.stack([text[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up")])
        one["mlp/linear"] = text[f"{at}mlp.down_proj.weight"].T
        for hf, name in named.items():
            one[f"{name}/scale"] = text[f"{at}{hf}.weight"]
        for name, value in one.items():
            layers.setdefault(f"params/llm/layers/{name}", []).append(value)
    blocks: dict[str, list] = {}
    for i in range(layers_of(tower, "encoder.layers.")):
        for hf, name in _BLOCK.items():
            weight, bias = (tower[f"encoder.layers.{i}.{hf}.{p}"] for p in ("weight", "bias"))
            if "LayerNorm" in name:
                one = {"scale": weight, "bias": bias}
            elif name.endswith("/out"):  # [E, (A U)] -> [A, U, E]
                one = {"kernel": weight.T.reshape(tower_heads, -1, len(weight)), "bias": bias}
            elif "Attention" in name:  # [(A U), E] -> [E, A, U]
                one = {"kernel": weight.T.reshape(weight.shape[1], tower_heads, -1)}
                one["bias"] = bias.reshape(tower_heads, -1)
            else:
                one = {"kernel": weight.T, "bias": bias}
            for part, value in one.items():
                blocks.setdefault(f"params/img/Transformer/encoderblock/{name}/{part}", []).append(value)
    head = {name.rsplit(".", 1)[1]: v for name, v in state.items() if "multi_modal_projector.linear" in name}
    found = {
        "params/llm/embedder/input_embedding": text["embed_tokens.weight"],
        **{name: np.stack(values) for name, values in layers.items()},
        "params/llm/final_norm/scale": text["norm.weight"],
        "params/img/embedding/kernel": tower["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "params/img/embedding/bias": tower["embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": tower["embeddings.position_embedding.weight"][None],
        **{name: np.stack(values) for name, values in blocks.items()},
        "params/img/Transformer/encoder_norm/scale": tower["post_layernorm.weight"],
        "params/img/Transformer/encoder_norm/bias": tower["post_layernorm.bias"],
        "params/img/head/kernel": head["weight"].T,
        "params/img/head/bias": head["bias"],
    }
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


# ---- gemma.cpp --------------------------------------------------------------------------------------------------------


def gemma_cpp(state: dict, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """The decoder's arrays: k and v alternate by head, the output projection is [N, D, H], gate and up are one."""
    text = text_part(state)
    out = {"c_embedding": text["embed_tokens.weight"], "c_final_norm": text["norm.weight"]}
    norms = dict(zip(_norms(text), ("pre_att_ns", "post_att_ns", "pre_ff_ns", "post_ff_ns")))
    if len(norms) == 2:
        norms = dict(zip(NORMS1, ("pre_att_ns", "pre_ff_ns")))
    for i in range(layers_of(text)):
        at = f"layers.{i}."
        q, k, v = (text[f"{at}self_attn.{p}_proj.weight"] for p in "qkv")
        D, H = q.shape[1], q.shape[0] // heads
        turns = [(k, v)[j % 2].reshape(kv_heads, H, D)[j // 2] for j in range(2 * kv_heads)]
        if heads == kv_heads:  # multi-head attention: q, k and v alternate
            turns = [m.reshape(heads, H, D)[j] for j in range(heads) for m in (q, k, v)]
            out[f"qkv_ein_{i}"] = np.stack(turns)
        else:
            out[f"qkv_ein_{i}"] = np.concatenate([q.reshape(heads, H, D), np.stack(turns)])
        out[f"att_ein_{i}"] = text[f"{at}self_attn.o_proj.weight"].reshape(D, heads, H).transpose(1, 0, 2)
        out[f"gating_ein_{i}"] = np.stack([text[f"{at}mlp.{p}_proj.weight"] for p in ("gate", "up")])
        out[f"linear_w_{i}"] = text[f"{at}mlp.down_proj.weight"]
        for hf, name in norms.items():
            out[f"{name}_{i}"] = text[f"{at}{hf}.weight"]
        for hf, name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            if f"{at}self_attn.{hf}.weight" in text:
                out[f"{name}_{i}"] = text[f"{at}self_attn.{hf}.weight"]
    return out


# ---- the JAX package --------------------------------------------------------------------------------------------------


def flax(state: dict, heads: int, kv_heads: int, *, transposed: bool) -> dict:
    """The decoder as a nested tree: kernels are [heads, in, size], gate and up [2, out, in] if `transposed`."""
    text = text_part(state)
    norms = dict(zip(NORMS, ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")))
    if len(_norms(text)) == 2:
        norms = dict(zip(NORMS1, ("pre_attention_norm", "pre_ffw_norm")))
    tree: dict = {"embedder": {"input_embedding": text["embed_tokens.weight"]}}
    tree["final_norm"] = {"scale": text["norm.weight"]}
    for i in range(layers_of(text)):
        at = f"layers.{i}."
        q, k, v = (text[f"{at}self_attn.{p}_proj.weight"] for p in "qkv")
        D, H = q.shape[1], q.shape[0] // heads
        split = [m.reshape(-1, H, D).transpose(0, 2, 1) for m in (q, k, v)]
        o = text[f"{at}self_attn.o_proj.weight"].reshape(D, heads, H).transpose(1, 2, 0)
        attn = {"attn_vec_einsum": {"w": o}}
        if heads == kv_heads:
            attn["qkv_einsum"] = {"w": np.stack(split)}
        else:
            attn |= {"q_einsum": {"w": split[0]}, "kv_einsum": {"w": np.stack(split[1:])}}
        for hf, name in (("q_norm", "_query_norm"), ("k_norm", "_key_norm")):
            if f"{at}self_attn.{hf}.weight" in text:
                attn[name] = {"scale": text[f"{at}self_attn.{hf}.weight"]}
        gating = np.stack([text[f"{at}mlp.{p}_proj.weight"] for p in ("gate", "up")])
        mlp = {"gating_einsum": gating if transposed else gating.transpose(0, 2, 1)}
        mlp["linear"] = text[f"{at}mlp.down_proj.weight"].T
        tree[f"layer_{i}"] = {"attn": attn, "mlp": mlp}
        tree[f"layer_{i}"] |= {name: {"scale": text[f"{at}{hf}.weight"]} for hf, name in norms.items()}
    return {key: _contiguous(value) for key, value in tree.items()}


def _contiguous(value):
    if isinstance(value, dict):
        return {key: _contiguous(part) for key, part in value.items()}
    return np.ascontiguousarray(value)


def from_flax(tree: dict, *, transposed: bool) -> dict[str, np.ndarray]:
    """The decoder of such a tree under Hugging Face's names (root `model.`)."""
    array = np.asarray
    out = {"model.embed_tokens.weight": array(tree["embedder"]["input_embedding"])}
    out["model.norm.weight"] = array(tree["final_norm"]["scale"])
    four = "post_attention_norm" in tree["layer_0"]
    names = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
    norms = dict(zip(NORMS, names)) if four else dict(zip(NORMS1, names[::2]))
    for i in range(sum(key.startswith("layer_") for key in tree)):
        layer, at = tree[f"layer_{i}"], f"model.layers.{i}."
        attn = layer["attn"]
        if "qkv_einsum" in attn:
            q, k, v = array(attn["qkv_einsum"]["w"])
        else:
            q, (k, v) = array(attn["q_einsum"]["w"]), array(attn["kv_einsum"]["w"])
        for part, kernel in zip("qkv", (q, k, v)):  # [N, D, H] -> [(N H), D]
            out[f"{at}self_attn.{part}_proj.weight"] = kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1])
        o = array(attn["attn_vec_einsum"]["w"])  # [N, H, D] -> [D, (N H)]
        out[f"{at}self_attn.o_proj.weight"] = o.transpose(2, 0, 1).reshape(o.shape[2], -1)
        for hf, name in (("q_norm", "_query_norm"), ("k_norm", "_key_norm")):
            if name in attn:
                out[f"{at}self_attn.{hf}.weight"] = array(attn[name]["scale"])
        gating = array(layer["mlp"]["gating_einsum"])
        for part, kernel in zip(("gate", "up"), gating if transposed else gating.transpose(0, 2, 1)):
            out[f"{at}mlp.{part}_proj.weight"] = kernel
        out[f"{at}mlp.down_proj.weight"] = array(layer["mlp"]["linear"]).T
        for hf, name in norms.items():
            out[f"{at}{hf}.weight"] = array(layer[name]["scale"])
    return out
