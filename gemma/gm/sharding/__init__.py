# SPDX-License-Identifier: Apache-2.0
"""How parameters, caches and batches are spread over the devices of a mesh.

    mesh = gm.sharding.make_mesh(data=2, tensor=4)
    params = gm.ckpts.load_params(path, sharding=gm.sharding.TensorSharding(gm.nn.Gemma3_1B().config, mesh))

A strategy is called with a tree of arrays (or of their shapes) and returns a tree of `jax.sharding.NamedSharding`.
What to split is decided by the axes of the weight table; the computation follows from where the arrays are (GSPMD), so
nothing in the networks knows about devices. Training over several processes is not here.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_mesh": ("make_mesh", "replicated", "split_batch"),
        "_strategies": ("FSDPSharding", "ReplicatedSharding", "ShardingStrategy", "TensorSharding"),
    },
)
