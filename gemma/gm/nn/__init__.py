# SPDX-License-Identifier: Apache-2.0
"""The networks in Flax linen: Gemma 1 to 4 and the blocks that they are made of.

Sizes come from `gemma.config`; loading weights is in `gm/ckpts`, sampling in `gm/text`. One set of files serves every
generation: a family is data, read from a configuration.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_anchored": ["AnchoredPolicy", "AnchoredPolicyOutput"],
        "_gemma": [
            "Gemma_2B",
            "Gemma_7B",
            "Gemma2_2B",
            "Gemma2_9B",
            "Gemma2_27B",
            "Gemma3_270M",
            "Gemma3_1B",
            "Gemma3_4B",
            "Gemma3_12B",
            "Gemma3_27B",
            "Gemma3n_E2B",
            "Gemma3n_E4B",
            "Gemma4_E2B",
            "Gemma4_E4B",
            "Gemma4_31B",
            "Gemma4_26B_A4B",
        ],
        "_embedding": ["EmbeddingGemma", "EmbeddingGemma_300M"],
        "_transformer": ["Output", "Transformer"],
        "_transformer_like": ["TransformerLike"],
        "_modules": ["Attention", "Block", "Embedder", "FeedForward"],
        "_layers": ["Einsum", "RMSNorm"],
        "_config": ["AttentionType", "ModelInfo", "TransformerConfig"],
        "_cache": ["Cache", "WindowedCache"],
        "_packed": ["Packed", "PackedArray", "PackedParts"],
        "_quantization": ["IntWrapper", "QuantizationAwareWrapper"],
        "_lora": ["LoRA"],
    },
    modules=["config"],
)
