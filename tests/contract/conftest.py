"""Marks the parts of the contract that are not built yet; a strict xfail turns red the moment one of them works.

Whoever builds a part removes its line here.
"""

import pytest

OPEN = {
    "PyTorch": [
        "test_000_gemma_language_model",
        "test_000_literal_configuration",
        "test_000_001_components",
        "test_001_paligemma_forward",
        "test_003_config_defaults",
        "test_003_flat_import",
        "test_003_kv_cache",
        "test_003_generation_step",
    ],
    "JAX inference": [
        "test_002_public_names[text-ChatSampler]",
        "test_002_public_names[text-ToolSampler]",
        "test_002_public_names[tools-",
        "test_002_named_modules[gemma.gm.vision]",
        "test_002_named_modules[gemma.multimodal]",
    ],
    "LoRA and quantization": [
        "test_002_public_names[nn-LoRA]",
        "test_002_public_names[nn-QuantizationAwareWrapper]",
        "test_002_public_names[nn-IntWrapper]",
        "test_002_public_names[ckpts-SkipLoRA]",
        "test_002_named_modules[gemma.peft]",
    ],
    "checkpoints": [
        "test_002_public_names[ckpts-save_params]",
        "test_002_public_names[ckpts-CheckpointPath]",
        "test_002_public_names[ckpts-LoadCheckpoint]",
        "test_002_public_names[ckpts-AnchoredPolicyLoader]",
    ],
    "training": [
        "test_002_public_names[nn-AnchoredPolicy]",
        "test_002_public_names[data-",
        "test_002_public_names[losses-",
        "test_002_public_names[evals-",
    ],
    "T5Gemma": ["test_002_named_modules[gemma.research.t5gemma]"],
}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, prefixes in OPEN.items():
            if item.path.name == "test_seed_usage.py" and any(item.name.startswith(p) for p in prefixes):
                item.add_marker(pytest.mark.xfail(reason=f"not built yet: {part}", strict=True))
