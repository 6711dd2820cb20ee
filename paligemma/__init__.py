# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: SigLIP, one projection and a Gemma decoder; its sizes are stated in `gemma.config`."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["GemmaConfig", "PaliGemmaConfig", "SiglipVisionConfig"],
        "detection": ["Detection", "draw", "encode_box", "encode_detections", "parse_detections"],
        "modeling_paligemma": ["PaliGemmaForConditionalGeneration", "PaliGemmaMultiModalProjector"],
        "processing_paligemma": ["PaliGemmaProcessor", "Shot", "task_prompt"],
        "segmentation": ["MaskCodec"],
    },
    modules=["config", "detection", "modeling_gemma", "modeling_paligemma", "processing_paligemma", "segmentation"],
)
