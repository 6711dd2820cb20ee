# SPDX-License-Identifier: Apache-2.0
"""T5Gemma: an encoder and a decoder of Gemma layers, in JAX; the PyTorch twin is `modeling_t5gemma.py`.

T5Gemma has layers of Gemma 2 and a cross-attention in each decoder layer; T5Gemma 2 has layers of Gemma 3, one attention
over both sequences, and images. The networks are put together from the modules of `gemma.gm.nn`; sizes come from
`gemma.config`, names of tensors from `gemma.weights`. The guide is docs/t5gemma.md.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["CKPTType", "PretrainType", "T5GemmaPreset"],
        "modules": ["T5GemmaCache", "TransformerOutput"],
        "t5gemma": ["T5Gemma", "T5GemmaConfig", "T5GemmaOutput"],
        "sampling": ["Greedy", "RandomSampling", "Sampler", "SamplerOutput", "SamplingState", "TopkSampling"],
        "_seq2seq": ["Targets", "encode_inputs", "make_targets", "shift_right"],
        "_load": ["LoadedT5Gemma", "load_model"],
        "_loss": ["loss"],
        "_from_gemma": ["init_from_gemma"],
    },
)
