# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA) and quantization of the JAX networks, layer by layer and as whole trees of parameters.

`gm.nn.LoRA`, `gm.nn.QuantizationAwareWrapper` and `gm.nn.IntWrapper` put these to work on a model; `split_params` and
its neighbours work on trees, `save_adapter` and `load_adapter` on files. Losses and training loops are not here.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_interception": ["Interceptor", "ModuleInterceptor"],
        "_lora": [
            "LoRADense",
            "LoRADenseAdapter",
            "LoRADenseGeneral",
            "LoRADenseGeneralAdapter",
            "LoRAEinsum",
            "LoRAEinsumAdapter",
        ],
        "_quantization": [
            "IntDense",
            "IntEinsum",
            "SimulateQuantizedDense",
            "SimulateQuantizedEinsum",
            "get_axis_to_reduce_from_einsum_str",
            "quantize",
            "simulate_quantize",
        ],
        "_quantization_methods": ["QuantizationMethod"],
        "_spec": ["LoRASpec"],
        "_tree": ["SplittedParams", "fuse_params", "merge_params", "split_params", "unfuse_params"],
        "_masks": ["label_tree", "mask_tree"],
        "_adapter_files": ["Adapter", "adapter_file", "fuse_adapter", "load_adapter", "save_adapter"],
        "_adapter_set": ["AdapterSet"],
    },
)
