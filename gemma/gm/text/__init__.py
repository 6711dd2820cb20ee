# SPDX-License-Identifier: Apache-2.0
"""Text in, text out with the JAX networks: tokenizers, sampling methods, samplers."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_sampler": ["Sampler", "SamplerOutput", "SamplingState"],
        "_chat_sampler": ["ChatSampler"],
        "_tool_sampler": ["ToolSampler"],
        "_sampling": [
            "SamplingMethod",
            "Greedy",
            "RandomSampling",
            "TopkSampling",
            "TopPSampling",
            "MinPSampling",
            "RepetitionPenalty",
        ],
        "_tokenizer": [
            "Tokenizer",
            "Gemma2Tokenizer",
            "Gemma3Tokenizer",
            "Gemma3nTokenizer",
            "Gemma4Tokenizer",
            "SpecialTokens",
        ],
        "_embedding": ["TextEmbedder"],
        "_template": ["Turn", "UserTurn", "ModelTurn"],
        "_load": ["LoadedModel", "load_model"],
        "_generate": ["Session", "generate_ids"],
    },
)
