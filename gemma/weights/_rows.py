# SPDX-License-Identifier: Apache-2.0
"""The rows: every tensor of the family, its name and its layout in every format. Data only, nothing is computed here.

`_table.py` turns the rows into tensors of one configuration. A new tensor, name or format is added here and nowhere
else; docs/weights.md is generated from it. Letters of axes: docs/axes.md.

A column reads `[flag? ]name[ [index]][ <rows>][ axes][ +1]`; alternatives are separated by " ; " and the first whose
flag holds is taken ("!flag" is its negation). Without axes it has the canonical ones. `[i,0]` picks from leading
stacked axes, `i` is the layer. `<NH:NH+KH>` is a range of rows of a fused array. `+1` says that the file stores 1 + w.
`{i}` is the layer. The name is relative to the root of its part (`ROOTS`).

Pitfalls that the rows state:
  * Gemma 1 calls the norm before its MLP `post_attention_layernorm`; from Gemma 2 on that is the norm after attention.
  * `mlp/linear` and `mlp/gating_einsum` are leaves themselves in Flax: no `/w` below them.
  * Flax merges q, k and v into `qkv_einsum` when there are as many key heads as heads, in self-attention only.
  * The gate and up kernel is [2, F, D] or [2, D, F] in Flax; `transpose_gating_einsum` decides, not the shape.
  * A GGUF stores 1 + w for every norm.
  * From Gemma 3n on a norm multiplies by w itself, and Flax drops the underscore from `_query_norm` and `_key_norm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

FORMATS = ("hf", "flax", "gguf", "ckpt", "npz", "sbs")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one per layer when `{i}` is in its name."""

    name: str  # canonical
    axes: str  # canonical axes, Hugging Face's orientation
    part: str  # whose root is put before the names: embed, text, head, vision, mm
    when: str  # the flag under which the tensor exists; "" is always
    columns: Mapping[str, str]


def _row(part: str, name: str, axes: str, when: str = "", **columns: str) -> Row:
    return Row(name, axes, part, when, columns)


TEXT_TOP = (
    _row(
        "embed",
        "embed",
        "V D",
        hf="embed_tokens.weight",
        flax="embedder/input_embedding",
        gguf="token_embd.weight",
        ckpt="embedder.weight",
        npz="embedder/input_embedding",
        sbs="c_embedding",
    ),
    _row("embed", "embed.eoi", "D", "eoi", hf="embed_tokens.eoi_embedding", flax="embedder/eoi_embedding"),
)

TEXT_LAYER = (
    _row(
        "text",
        "layers.{i}.norm.pre_attn",
        "D",
        hf="t5? layers.{i}.pre_self_attn_layernorm.weight ; layers.{i}.input_layernorm.weight",
        flax="layer_{i}/pre_attention_norm/scale",
        gguf="blk.{i}.attn_norm.weight +1",
        ckpt="model.layers.{i}.input_layernorm.weight",
        npz="layers/pre_attention_norm/scale [i]",
        sbs="pre_att_ns_{i}",
    ),
    _row(
        "text",
        "layers.{i}.attn.q",
        "(N H) D",
        hf="layers.{i}.self_attn.q_proj.weight",
        flax="mha? layer_{i}/attn/qkv_einsum/w [0] N D H ; layer_{i}/attn/q_einsum/w N D H",
        gguf="blk.{i}.attn_q.weight",
        ckpt="model.layers.{i}.self_attn.qkv_proj.weight <0:NH>",
        npz="mha? layers/attn/qkv_einsum/w [i,0] N D H ; layers/attn/q_einsum/w [i] N D H",
        sbs="mha? qkv_ein_{i} <0:3N:3> N H D ; qkv_ein_{i} <0:N> N H D",
    ),
    _row(
        "text",
        "layers.{i}.attn.k",
        "(K H) D",
        "own_k",
        hf="layers.{i}.self_attn.k_proj.weight",
        flax="mha? layer_{i}/attn/qkv_einsum/w [1] K D H ; k_is_v? layer_{i}/attn/k_einsum/w K D H ; "
        "layer_{i}/attn/kv_einsum/w [0] K D H",
        gguf="blk.{i}.attn_k.weight",
        ckpt="model.layers.{i}.self_attn.qkv_proj.weight <NH:NH+KH>",
        npz="mha? layers/attn/qkv_einsum/w [i,1] K D H ; layers/attn/kv_einsum/w [i,0] K D H",
        sbs="mha? qkv_ein_{i} <1:3N:3> K H D ; qkv_ein_{i} <N:N+2K:2> K H D",
    ),
    _row(
        "text",
        "layers.{i}.attn.v",
        "(K H) D",
        "own_v",
        hf="layers.{i}.self_attn.v_proj.weight",
        flax="mha? layer_{i}/attn/qkv_einsum/w [2] K D H ; layer_{i}/attn/kv_einsum/w [1] K D H",
        gguf="blk.{i}.attn_v.weight",
        ckpt="model.layers.{i}.self_attn.qkv_proj.weight <NH+KH:NH+2KH>",
        npz="mha? layers/attn/qkv_einsum/w [i,2] K D H ; layers/attn/kv_einsum/w [i,1] K D H",
        sbs="mha? qkv_ein_{i} <2:3N:3> K H D ; qkv_ein_{i} <N+1:N+2K:2> K H D",
    ),
    _row(
        "text",
        "layers.{i}.attn.o",
        "D (N H)",
        hf="layers.{i}.self_attn.o_proj.weight",
        flax="layer_{i}/attn/attn_vec_einsum/w N H D",
        gguf="blk.{i}.attn_output.weight",
        ckpt="model.layers.{i}.self_attn.o_proj.weight",
        npz="layers/attn/attn_vec_einsum/w [i] N H D",
        sbs="att_ein_{i} N D H",
    ),
    _row(
        "text",
        "layers.{i}.attn.q_norm",
        "H",
        "qk_norm",
        hf="layers.{i}.self_attn.q_norm.weight",
        flax="plain_norms? layer_{i}/attn/query_norm/scale ; layer_{i}/attn/_query_norm/scale",
        gguf="blk.{i}.attn_q_norm.weight +1",
        ckpt="model.layers.{i}.self_attn.query_norm.weight",
        sbs="query_norm_{i}",
    ),
    _row(
        "text",
        "layers.{i}.attn.k_norm",
        "H",
        "own_k_norm",
        hf="layers.{i}.self_attn.k_norm.weight",
        flax="plain_norms? layer_{i}/attn/key_norm/scale ; layer_{i}/attn/_key_norm/scale",
        gguf="blk.{i}.attn_k_norm.weight +1",
        ckpt="model.layers.{i}.self_attn.key_norm.weight",
        sbs="key_norm_{i}",
    ),
    _row(
        "text",
        "layers.{i}.norm.post_attn",
        "D",
        "post_norms",
        hf="t5? layers.{i}.post_self_attn_layernorm.weight ; layers.{i}.post_attention_layernorm.weight",
        flax="layer_{i}/post_attention_norm/scale",
        gguf="blk.{i}.post_attention_norm.weight +1",
        ckpt="model.layers.{i}.post_attention_layernorm.weight",
        npz="layers/post_attention_norm/scale [i]",
        sbs="post_att_ns_{i}",
    ),
)

# Cross-attention of a T5Gemma decoder: keys and values read the encoder's width Z.
CROSS_LAYER = (
    _row(
        "text",
        "layers.{i}.norm.pre_cross",
        "D",
        hf="layers.{i}.pre_cross_attn_layernorm.weight",
        flax="layer_{i}/pre_cross_attention_norm/scale",
    ),
    _row(
        "text",
        "layers.{i}.cross.q",
        "(N H) D",
        hf="layers.{i}.cross_attn.q_proj.weight",
        flax="layer_{i}/cross_attn/q_einsum/w N D H",
    ),
    _row(
        "text",
        "layers.{i}.cross.k",
        "(K H) Z",
        hf="layers.{i}.cross_attn.k_proj.weight",
        flax="layer_{i}/cross_attn/kv_einsum/w [0] K Z H",
    ),
    _row(
        "text",
        "layers.{i}.cross.v",
        "(K H) Z",
        hf="layers.{i}.cross_attn.v_proj.weight",
        flax="layer_{i}/cross_attn/kv_einsum/w [1] K Z H",
    ),
    _row(
        "text",
        "layers.{i}.cross.o",
        "D (N H)",
        hf="layers.{i}.cross_attn.o_proj.weight",
        flax="layer_{i}/cross_attn/attn_vec_einsum/w N H D",
    ),
    _row(
        "text",
        "layers.{i}.norm.post_cross",
        "D",
        hf="layers.{i}.post_cross_attn_layernorm.weight",
        flax="layer_{i}/post_cross_attention_norm/scale",
    ),
)

MLP_LAYER = (
    _row(
        "text",
        "layers.{i}.norm.pre_mlp",
        "D",
        hf="post_norms? layers.{i}.pre_feedforward_layernorm.weight ; layers.{i}.post_attention_layernorm.weight",
        flax="layer_{i}/pre_ffw_norm/scale",
        gguf="blk.{i}.ffn_norm.weight +1",
        ckpt="post_norms? model.layers.{i}.pre_feedforward_layernorm.weight ; "
        "model.layers.{i}.post_attention_layernorm.weight",
        npz="layers/pre_ffw_norm/scale [i]",
        sbs="pre_ff_ns_{i}",
    ),
    _row(
        "text",
        "layers.{i}.mlp.gate",
        "F D",
        hf="layers.{i}.mlp.gate_proj.weight",
        flax="transposed? layer_{i}/mlp/gating_einsum [0] F D ; layer_{i}/mlp/gating_einsum [0] D F",
        gguf="blk.{i}.ffn_gate.weight",
        ckpt="model.layers.{i}.mlp.gate_proj.weight",
        npz="layers/mlp/gating_einsum [i,0] D F",
        sbs="gating_ein_{i} [0] F D",
    ),
    _row(
        "text",
        "layers.{i}.mlp.up",
        "F D",
        hf="layers.{i}.mlp.up_proj.weight",
        flax="transposed? layer_{i}/mlp/gating_einsum [1] F D ; layer_{i}/mlp/gating_einsum [1] D F",
        gguf="blk.{i}.ffn_up.weight",
        ckpt="model.layers.{i}.mlp.up_proj.weight",
        npz="layers/mlp/gating_einsum [i,1] D F",
        sbs="gating_ein_{i} [1] F D",
    ),
    _row(
        "text",
        "layers.{i}.mlp.down",
        "D F",
        hf="layers.{i}.mlp.down_proj.weight",
        flax="layer_{i}/mlp/linear F D",
        gguf="blk.{i}.ffn_down.weight",
        ckpt="model.layers.{i}.mlp.down_proj.weight",
        npz="layers/mlp/linear [i] F D",
        sbs="linear_w_{i}",
    ),
    _row(
        "text",
        "layers.{i}.norm.post_mlp",
        "D",
        "post_norms",
        hf="layers.{i}.post_feedforward_layernorm.weight",
        flax="layer_{i}/post_ffw_norm/scale",
        gguf="blk.{i}.post_ffw_norm.weight +1",
        ckpt="model.layers.{i}.post_feedforward_layernorm.weight",
        npz="layers/post_ffw_norm/scale [i]",
        sbs="post_ff_ns_{i}",
    ),
)

TEXT_END = (
    _row(
        "text",
        "final_norm",
        "D",
        hf="norm.weight",
        flax="final_norm/scale",
        gguf="output_norm.weight +1",
        ckpt="model.norm.weight",
        npz="final_norm/scale",
        sbs="c_final_norm",
    ),
    _row(
        "head",
        "head",
        "V D",
        "untied",
        hf="t5? lm_head.out_proj.weight ; lm_head.weight",
        gguf="output.weight",
        sbs="lm_head",
    ),
)

# Gemma 3: a norm of the pooled patches and a projection without bias, stored as [E, D] almost everywhere.
GEMMA3_MM = (
    _row(
        "mm",
        "mm.norm",
        "E",
        hf="mm_soft_emb_norm.weight",
        flax="embedder/mm_soft_embedding_norm/scale",
        ckpt="mm_soft_embedding_norm.weight",
    ),
    _row(
        "mm",
        "mm.proj",
        "E D",
        hf="mm_input_projection_weight",
        flax="embedder/mm_input_projection/w",
        ckpt="mm_input_projection.weight D E",
    ),
)

# PaliGemma: one linear map with bias.
PALIGEMMA_MM = (
    _row("mm", "projector.kernel", "D E", hf="linear.weight", npz="head/kernel E D"),
    _row("mm", "projector.bias", "D", hf="linear.bias", npz="head/bias"),
)

# Where names start. The first root is the one that is written; a reader takes the one that most names agree with.
# (format, part) -> roots. Absent: those of the text for the embedding, else "".
ROOTS: Mapping[str, Mapping[tuple[str, str], tuple[str, ...]]] = {
    "text": {
        ("hf", "text"): ("model.", "", "language_model.model.", "model.language_model.", "language_model."),
        ("hf", "head"): ("", "language_model."),
        ("ckpt", "embed"): ("", "text_token_"),
    },
    "newer": {  # Gemma 3n and 4, whose published files are multimodal
        ("hf", "text"): ("model.", "model.language_model.", "language_model.model.", "language_model.", ""),
        ("hf", "head"): ("", "language_model."),
    },
    "base": {
        ("hf", "text"): ("", "model.", "language_model.model.", "model.language_model.", "language_model."),
        ("hf", "head"): ("", "language_model."),
        ("ckpt", "embed"): ("", "text_token_"),
    },
    "multimodal": {
        ("hf", "text"): ("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
        ("hf", "head"): ("", "language_model."),
        ("hf", "vision"): (
            "model.vision_tower.",
            "vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
            "vision_tower.",
        ),
        ("hf", "mm"): ("model.multi_modal_projector.", "multi_modal_projector."),
        ("flax", "vision"): ("vision_encoder/siglip_encoder/",),
        ("ckpt", "embed"): ("text_token_", ""),
        ("ckpt", "vision"): ("siglip_vision_model.",),
        ("npz", "text"): ("params/llm/", "llm/"),
        ("npz", "vision"): ("params/img/", "img/"),
        ("npz", "mm"): ("params/img/", "img/"),
    },
    "encoder": {("hf", "text"): ("model.encoder.", "encoder."), ("flax", "text"): ("encoder/",)},
    "decoder": {("hf", "text"): ("model.decoder.", "decoder."), ("flax", "text"): ("decoder/",)},
    "encoder2": {
        ("hf", "text"): ("model.encoder.text_model.", "model.encoder.", "encoder.text_model.", "encoder."),
        ("hf", "vision"): (
            "model.encoder.vision_tower.",
            "encoder.vision_tower.",
            "model.encoder.vision_tower.vision_model.",
        ),
        ("hf", "mm"): ("model.encoder.multi_modal_projector.", "encoder.multi_modal_projector."),
        ("flax", "text"): ("encoder/",),
        ("flax", "embed"): ("",),
        ("flax", "vision"): ("vision_encoder/siglip_encoder/",),
    },
    "decoder2": {("hf", "text"): ("model.decoder.", "decoder."), ("flax", "text"): ("decoder/",)},
    "siglip": {
        ("hf", "vision"): ("", "vision_model.", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower."),
        ("npz", "vision"): ("params/img/", "img/", "params/", ""),
    },
}

# A tied head is not a tensor of its own; these names may hold a copy of the embedding, to be verified by the reader.
TIED_COPIES = {
    "hf": ("lm_head.weight", "language_model.lm_head.weight", "lm_head.out_proj.weight"),
    "gguf": ("output.weight",),
}

# Likewise in a T5Gemma 2, by the canonical tensor that they hold a copy of.
SHARED = {
    "hf": {
        "lm_head.out_proj.weight": "encoder.embed",
        "model.decoder.embed_tokens.weight": "encoder.embed",
        "model.decoder.embed_tokens.eoi_embedding": "encoder.embed.eoi",
    },
}

# Names that carry no weight: rotary tables and position counters that older writers stored.
IGNORED = {
    "hf": (r".*\.rotary_emb(_local)?\.inv_freq", r"(.*\.)?embeddings\.position_ids"),
    "gguf": (r"rope_freqs\.weight",),
    "ckpt": (r"(local_|global_)?freqs_cis", r"siglip_vision_model\.position_ids"),
}

# Names that belong to images, whatever the configuration: `text_only` skips them.
VISION_NAMES = {
    "hf": r"(model\.)?(encoder\.)?(vision_tower|multi_modal_projector)\..*",
    "flax": r"vision_encoder/.*|embedder/mm_.*",
    "ckpt": r"siglip_vision_model\..*|mm_.*",
    "npz": r"(params/)?img/.*",
    "gguf": r"(v|mm)\..*",
    "sbs": r"(enc_norm|img|mm|attn_out|[qkv]+_ein_[wb]|linear_[01]|ln_[01])_.*",
}
