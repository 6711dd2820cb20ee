# SPDX-License-Identifier: Apache-2.0
"""Training on optax: the loop, its optimizers and objectives, checkpoints of a run, many devices, and memory.

    trainer = gm.train.Trainer(gm.train.Supervised(model), params, "lora", loader, steps=200)
    params = trainer.fit().params

Rows and batches are `gm.data`, losses `gm.losses`, adapters and which leaves are trained `gm.peft`. `finetune` does a
whole run, from a file of examples to exported weights; its settings are `gemma/finetuning.py`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_checkpoints": ["Checkpoints"],
        "_distributed": ["Placement", "initialize_distributed"],
        "_evaluate": ["evaluate"],
        "_loggers": ["Csv", "Logger", "Png", "Samples", "TensorBoard"],
        "_loop": ["Trainer"],
        "_memory": ["MemoryEstimate", "estimate_memory"],
        "_objectives": ["Classification", "Objective", "Supervised"],
        "_optimizer": ["OptimizerConfig", "make_optimizer", "make_schedule"],
        "_preference": ["Kto", "Preference"],
        "_result": ["Callback", "EarlyStop", "Result"],
        "_run": ["RunResult", "finetune"],
        "_state": ["State", "init_state", "merge_trainable", "split_trainable"],
        "_step": ["make_step"],
    },
)
