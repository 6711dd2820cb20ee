# SPDX-License-Identifier: Apache-2.0
"""Names of kernels under quantization-aware training, as the official package spells them; no value is changed.

    layer_0/attn/q_einsum/w         layer_0/attn/q_einsum/_SimulateQuantizedEinsum_0/kernel
    layer_0/mlp/linear              layer_0/mlp/_SimulateQuantizedEinsum_linear/kernel

Which float weight such a name stands for is `_detect.plain_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma.gm.ckpts._orbax import flatten

_OWN_LEAF = ("gating_einsum", "linear")  # kernels of the MLP: leaves themselves, without a `w`


def qat_name(name: str) -> str:
    """The official name of a leaf in the tree for quantization-aware training; what is no kernel keeps its own."""
    parts = name.split("/")
    if len(parts) > 1 and parts[-2] == "mlp" and parts[-1] in _OWN_LEAF:
        return "/".join((*parts[:-1], f"_SimulateQuantizedEinsum_{parts[-1]}", "kernel"))
    if len(parts) > 1 and parts[-1] == "w":
        return "/".join((*parts[:-1], "_SimulateQuantizedEinsum_0", "kernel"))
    return name


def convert_to_qat_checkpoint(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested tree with its kernels renamed; the arrays are the same objects."""
    tree: dict[str, Any] = {}
    for name, leaf in flatten(params).items():
        *folders, last = qat_name(name).split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = leaf
    return tree
