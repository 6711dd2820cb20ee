"""Run in a process of its own with eight virtual devices: sharded parameters give the single-device answer."""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma import gm
from gemma.testing import ByteTokenizer, tiny_config, write_tiny_safetensors

SIZES = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=320, intermediate_size=96)
CONFIG = tiny_config("gemma3", num_hidden_layers=2, layer_pattern="LG", **SIZES)  # a layer of each kind
TOKENS = np.random.default_rng(0).integers(3, 300, (8, 12))


def strategies():
    sharding = gm.sharding
    yield "fsdp", sharding.FSDPSharding(min_size=1)
    yield "tensor", sharding.TensorSharding(CONFIG, sharding.make_mesh(data=4, tensor=2))
    yield "both", sharding.TensorSharding(CONFIG, sharding.make_mesh(data=2, fsdp=2, tensor=2))


def main() -> None:
    assert jax.device_count() == 8
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    write_tiny_safetensors(folder, CONFIG)
    model = gm.nn.Transformer.from_config(CONFIG, dtype=jnp.float32)
    single = gm.ckpts.load_params(folder)
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
    expected = np.asarray(apply(single, TOKENS))
    sampler = gm.text.Sampler(model=model, params=single, tokenizer=ByteTokenizer(), cache_length=64, pad_length=16)
    prompts = ["ab", "hello", "x", "some text", "y", "more", "words here", "end"]
    texts = sampler.sample(prompts, max_new_tokens=6)
    for name, strategy in strategies():
        params = gm.ckpts.load_params(folder, sharding=strategy)
        for leaf, whole in zip(jax.tree.leaves(params), jax.tree.leaves(single)):
            assert len(leaf.sharding.device_set) == 8 and np.array_equal(leaf, whole), name
        rows = gm.sharding.split_batch(jax.tree.leaves(params)[0].sharding.mesh)
        tokens = jax.device_put(TOKENS, rows)
        got = np.asarray(apply(params, tokens))
        assert np.abs(got - expected).max() <= 2e-5, (name, np.abs(got - expected).max())
        again = gm.text.Sampler(
            model=model, params=params, tokenizer=ByteTokenizer(), cache_length=64, pad_length=16
        ).sample(prompts, max_new_tokens=6, sharding=rows)
        assert again == texts, (name, again, texts)
        if name == "tensor":
            layer = params["layer_0"]
            assert layer["attn"]["q_einsum"]["w"].sharding.spec == P("tensor", None, None)
            assert layer["attn"]["kv_einsum"]["w"].sharding.spec == P(None, "tensor", None, None)
            assert layer["mlp"]["gating_einsum"].sharding.spec == P(None, "tensor", None)
            assert layer["mlp"]["linear"].sharding.spec == P("tensor", None)
            assert params["embedder"]["input_embedding"].sharding.spec == P("tensor", None)
        print(name, "ok")


if __name__ == "__main__":
    main()
