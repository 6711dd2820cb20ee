# SPDX-License-Identifier: Apache-2.0
"""One model over several devices: a mesh, where the parameters live, loading, sampling and training.

    python examples/sharding.py                            a tiny random model on 8 pretended devices of this CPU
    python examples/sharding.py --model demo               the real Gemma 3 270M, the same way
    python examples/sharding.py --model PATH --devices 0   on the GPUs or TPUs of this machine
    python examples/sharding.py --steps 4                  also a few steps of training

Nothing in a network knows about devices. A strategy says where each parameter lives, the first axis of a batch says
where its rows are, and XLA moves what has to be moved. The numbers are those of one device up to rounding.
"""

from __future__ import annotations

import argparse
import math
import tempfile

import jax
import jax.numpy as jnp

from gemma import gm, hub, testing
from gemma.checkpoint import open_checkpoint
from gemma.config import text_only
from gemma.tokenizer import Tokenizer

PROMPTS = ["The history of computing", "Hi", "Water boils at", "One, two, three,"]


def strategies(config) -> dict[str, gm.sharding.ShardingStrategy]:
    """Two ways to spread a model.

    FSDP cuts every large array and gathers it where it is used: any model, memory divided, most traffic. Tensor
    parallelism cuts the products themselves, along heads and MLP columns: less traffic per token, and the heads must be
    divisible. The other devices hold copies of the model, each with its part of the batch: the axis `data` of the mesh.
    (`ReplicatedSharding` is copies alone; a function from a tree of shapes to a tree of shardings is one of your own.)
    """
    tensor = 2 if jax.device_count() % 2 == 0 and config.num_attention_heads % 2 == 0 else 1
    mesh = gm.sharding.make_mesh(data=-1, tensor=tensor)
    return {
        "fsdp": gm.sharding.FSDPSharding(min_size=1024),  # smaller arrays are copied
        "tensor": gm.sharding.TensorSharding(config, mesh),
    }


def show(params) -> None:
    """How much of the model each device holds, and how one array was cut."""
    leaves = jax.tree.leaves(params)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print(f"   one device holds {held / sum(leaf.nbytes for leaf in leaves):.0%} of the parameters")
    query = params["layer_0"]["attn"]["q_einsum"]["w"]
    print(f"   q_einsum {query.shape}: {query.sharding.spec}, {query.addressable_shards[0].data.shape} on each")


def make_sampler(config, tokenizer, params, count: int) -> gm.text.Sampler:
    """A Sampler as ever: it takes the parameters where they are."""
    return gm.text.Sampler(
        model=gm.nn.Transformer.from_config(config, dtype=jnp.float32),
        params=params,
        tokenizer=tokenizer,
        cache_length=64,
        max_out_length=count,
        pad_length=32,
    )


def rows_of(params) -> jax.sharding.NamedSharding | None:
    """How the rows of a batch are spread, and with them the cache; None where they cannot be divided."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    copies = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    return gm.sharding.split_batch(mesh) if len(PROMPTS) % copies == 0 else None


def train(params, config, tokenizer, steps: int, strategy=None) -> list[float]:
    """The loss of each step of a full fine-tune. Weights, gradients and moments live where the strategy says."""
    rows = gm.data.Examples.of([gm.data.Completion(text, " and so on") for text in PROMPTS * 2])
    trainer = gm.train.Trainer(
        gm.train.Supervised(gm.nn.Transformer.from_config(config)),
        params,
        "all",
        gm.data.Loader(rows, tokenizer, batch_size=8, max_length=64, buckets=(64,)),
        steps=steps,
        optimizer=gm.train.OptimizerConfig(learning_rate=1e-3),
        sharding=strategy,
    )
    return [row["loss"] for row in trainer.fit().history]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a file, or demo; without it, a tiny random model")
    parser.add_argument("--devices", type=int, default=8, help="CPU devices to pretend; 0: those that there are")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help='of training, which needs pip install "gemmakit[train]"')
    chosen = parser.parse_args(arguments)
    if chosen.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", chosen.devices)  # before the first array is made
    print(jax.device_count(), "devices:", jax.devices()[0].platform)
    with tempfile.TemporaryDirectory() as folder:
        path = hub.resolve(chosen.model) if chosen.model else testing.write_tiny_safetensors(folder, tiny())
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config()
            tokenizer = (
                Tokenizer.from_source(checkpoint.tokenizer_source()) if chosen.model else testing.ByteTokenizer()
            )
        whole = gm.ckpts.load_params(path, text_only=True)
        count = chosen.max_new_tokens
        config = text_only(config)
        losses = train(whole, config, tokenizer, chosen.steps) if chosen.steps else []
        expected = make_sampler(config, tokenizer, whole, count).sample(PROMPTS, max_new_tokens=count)
        for name, strategy in strategies(config).items():
            print(f"\n== {name}")
            # Each array goes to its devices as it is read: no device ever holds all of them.
            params = gm.ckpts.load_params(path, sharding=strategy, text_only=True)
            show(params)
            sampler = make_sampler(config, tokenizer, params, count)
            texts = sampler.sample(PROMPTS, max_new_tokens=count, sharding=rows_of(params))
            print("   the texts of one device:", texts == expected)
            if losses:
                found = train(params, config, tokenizer, chosen.steps, strategy)
                same = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(losses, found))
                print(f"   {chosen.steps} steps, loss {found[0]:.4f} to {found[-1]:.4f}, as on one device: {same}")
    for prompt, text in zip(PROMPTS, expected):
        print(repr(prompt), "->", repr(text))


def tiny():
    """The configuration of a tiny model whose heads divide by two."""
    return testing.tiny_config(num_hidden_layers=2, layer_pattern="LG", num_attention_heads=4, num_key_value_heads=2)


if __name__ == "__main__":
    main()
