# SPDX-License-Identifier: Apache-2.0
"""The rows of what Gemma 3n, Gemma 4 and EmbeddingGemma have besides the rows of `_rows.py`. Data only.

How a row is read is said in `_rows.py`. Letters: a, b and c are streams of AltUp (one length), r the rank of Laurel, p
the width of a per-layer input and v the rows of its table, e experts, f the width of one, g its gate and up, j and o
what a dense layer takes and gives.

Sources: the modules of Hugging Face transformers for `hf`, the official trees of Gemma 3n for `flax`. `{i}` counts the
streams after the first in `STREAMS`, and in `DENSE` the dense layers, whose folders lie beside the encoder's file.
"""

from __future__ import annotations

from gemma.weights._rows import _row

TOP = (
    _row(
        "text",
        "per_layer.embed",
        "v (L p)",
        "per_layer",
        hf="embed_tokens_per_layer.weight",
        flax="embedder/per_layer_input_embedding v L p",
    ),
    _row(
        "text",
        "per_layer.proj",
        "(L p) D",
        "per_layer",
        hf="per_layer_model_projection.weight",
        flax="embedder/per_layer_input_projection/w D L p",
    ),
    _row(
        "text",
        "per_layer.norm",
        "p",
        "per_layer",
        hf="per_layer_projection_norm.weight",
        flax="embedder/per_layer_projection_norm/scale",
    ),
)

# A square kernel into each further stream, and one out of it: D and d are one length.
STREAMS = (
    _row(
        "text",
        "altup.in.{i}",
        "d D",
        "altup",
        hf="altup_projections.{i}.weight",
        flax="altup_projection_{i}/altup_projection_{i} D d",
    ),
    _row(
        "text",
        "altup.out.{i}",
        "d D",
        "altup",
        hf="altup_unembed_projections.{i}.weight",
        flax="altup_unembed_projection_{i}/altup_unembed_projection_{i} D d",
    ),
)

LAYER = (
    _row(
        "text",
        "layers.{i}.altup.scale",
        "D",
        "altup_scale",
        hf="layers.{i}.altup.correct_output_scale",
        flax="layer_{i}/altup/correct_output_scale",
    ),
    _row(
        "text",
        "layers.{i}.altup.correct",
        "a c",
        "altup",
        hf="layers.{i}.altup.correction_coefs.weight",
        flax="layer_{i}/altup/correction_coefs c a",
    ),
    _row(
        "text",
        "layers.{i}.altup.predict",
        "(a b) c",
        "altup",
        hf="layers.{i}.altup.prediction_coefs.weight",
        flax="layer_{i}/altup/prediction_coefs c a b",
    ),
    _row(
        "text",
        "layers.{i}.altup.router",
        "a D",
        "altup",
        hf="layers.{i}.altup.modality_router.weight",
        flax="layer_{i}/altup/modality_router/w D a",
    ),
    _row(
        "text",
        "layers.{i}.altup.norm",
        "D",
        "altup",
        hf="layers.{i}.altup.router_norm.weight",
        flax="layer_{i}/altup/router_norm_layer/scale",
    ),
    _row(
        "text",
        "layers.{i}.laurel.left",
        "r D",
        "laurel",
        hf="layers.{i}.laurel.linear_left.weight",
        flax="layer_{i}/laurel/linear_left/w D r",
    ),
    _row(
        "text",
        "layers.{i}.laurel.right",
        "D r",
        "laurel",
        hf="layers.{i}.laurel.linear_right.weight",
        flax="layer_{i}/laurel/linear_right/w r D",
    ),
    _row(
        "text",
        "layers.{i}.laurel.norm",
        "D",
        "laurel",
        hf="layers.{i}.laurel.post_laurel_norm.weight",
        flax="layer_{i}/post_laurel_norm/scale",
    ),
    _row(
        "text",
        "layers.{i}.per_layer.gate",
        "p D",
        "per_layer",
        hf="layers.{i}.per_layer_input_gate.weight",
        flax="layer_{i}/per_layer_mapping/per_layer_input_gate/w D p",
    ),
    _row(
        "text",
        "layers.{i}.per_layer.proj",
        "D p",
        "per_layer",
        hf="layers.{i}.per_layer_projection.weight",
        flax="layer_{i}/per_layer_mapping/per_layer_projection/w p D",
    ),
    _row(
        "text",
        "layers.{i}.per_layer.norm",
        "D",
        "per_layer",
        hf="layers.{i}.post_per_layer_input_norm.weight",
        flax="layer_{i}/per_layer_mapping/post_per_layer_input_norm/scale",
    ),
    _row(
        "text",
        "layers.{i}.scale",
        "1",
        "layer_scale",
        hf="layers.{i}.layer_scalar",
        flax="layer_{i}/skip_scale",
    ),
    _row(
        "text",
        "layers.{i}.experts.router",
        "e D",
        "experts",
        hf="layers.{i}.router.proj.weight",
        flax="layer_{i}/experts/router_logits/w D e",
    ),
    _row(
        "text",
        "layers.{i}.experts.router_scale",
        "D",
        "experts",
        hf="layers.{i}.router.scale",
        flax="layer_{i}/experts/router_scale",
    ),
    _row(
        "text",
        "layers.{i}.experts.scale",
        "e",
        "experts",
        hf="layers.{i}.router.per_expert_scale",
        flax="layer_{i}/experts/per_expert_scale",
    ),
    _row(
        "text",
        "layers.{i}.experts.gate_up",
        "e (g f) D",
        "experts",
        hf="layers.{i}.experts.gate_up_proj",
        flax="layer_{i}/experts/gating_einsum/w e g f D",
    ),
    _row(
        "text",
        "layers.{i}.experts.down",
        "e D f",
        "experts",
        hf="layers.{i}.experts.down_proj",
        flax="layer_{i}/experts/linear/w e f D",
    ),
    *(
        _row(
            "text",
            f"layers.{{i}}.norm.{name}",
            "D",
            "experts",
            hf=f"layers.{{i}}.{before}_feedforward_layernorm_{number}.weight",
            flax=f"layer_{{i}}/experts/{before}_ffw{number}_norm/scale",
        )
        for name, before, number in (
            ("post_dense", "post", 1),
            ("pre_experts", "pre", 2),
            ("post_experts", "post", 2),
        )
    ),
)

# After the pooling of EmbeddingGemma.
DENSE_FOLDER = "{}_Dense/"  # of a folder of sentence-transformers; the first dense layer is its third module, 2
DENSE = (_row("dense", "dense.{i}", "o j", hf="{i+2}_Dense/linear.weight", flax="dense_{i}/w j o"),)

# Names in the files of Gemma 3n and 4 that the text model has no use for: towers, what joins them to the text model,
# quantization ranges of clipped layers, and keys and values of layers that share those of another one.
NOT_READ = {
    "hf": (
        r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..*",
        r"(model\.)?(multi_modal_projector|multimodal_embedder)\..*",
    ),
}
SHARED_KV = {"hf": r"(?:.*\.)?layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.weight"}
