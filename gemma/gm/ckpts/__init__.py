# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as JAX parameter trees. `gemma.checkpoint` reads the files, `gemma.weights` knows names and axes.

`latest_valid` and `verify_manifest` need no JAX; `gemma.saving` has them too.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_checkpoint": ["AnchoredPolicyLoader", "LoadCheckpoint", "SkipLoRA"],
        "_compat": ["Layout"],
        "_load": ["load_params", "release"],
        "_orbax": ["OrbaxCheckpoint", "open_checkpoint"],
        "_partial": ["Restored", "restore_partial"],
        "_paths": ["CheckpointPath"],
        "_save": ["latest_valid", "save_params", "save_tensors", "verify_manifest"],
    },
)
