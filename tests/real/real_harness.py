# SPDX-License-Identifier: Apache-2.0
"""The real Gemma 3 270M in three implementations: ours, Hugging Face's in float32, and llama.cpp's.

Used by the tests beside it and by scripts/golden_270m.py. The tensor names and the sizes are written out by hand here,
a second time on purpose: the proof must not rest on `gemma.weights` or `gemma.config`.
"""

from __future__ import annotations

import ctypes as C
import glob
import importlib.util
import os
import pathlib

import numpy as np

PROMPT = "The history of computing began"
PROMPT_IDS = (2, 818, 4083, 529, 20124, 6074)
CONTINUATION = " with the invention of the first computer in 1947."
TEXT = pathlib.Path(__file__).with_name("data") / "declaration.txt"

NUM_LAYERS, VOCAB = 18, 262_144
_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def gguf_to_hf() -> dict[str, tuple[str, float]]:
    """{name in the GGUF: (name in Hugging Face's state dict, what to add)}; a GGUF norm holds 1 + w."""
    names = {"token_embd.weight": ("model.embed_tokens.weight", 0.0), "output_norm.weight": ("model.norm.weight", -1.0)}
    for i in range(NUM_LAYERS):
        for table, offset in ((_MATRICES, 0.0), (_NORMS, -1.0)):
            for source, target in table.items():
                names[f"blk.{i}.{source}.weight"] = (f"model.layers.{i}.{target}.weight", offset)
    return names


def hf_model(checkpoint, attention: str = "eager"):
    """Hugging Face's Gemma 3 with the checkpoint's weights, dequantized to float32. `checkpoint` is an open one."""
    import torch
    import transformers

    rope = {
        "full_attention": dict(rope_type="default", rope_theta=1e6),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4),
    }
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32_768,
        rope_parameters=rope,
    )
    names = gguf_to_hf()
    assert set(checkpoint.tensors) == set(names), set(checkpoint.tensors) ^ set(names)
    state = {}
    for source, (target, offset) in names.items():
        array = checkpoint.read(source, dtype=np.float32)
        state[target] = torch.from_numpy(np.ascontiguousarray(array + offset if offset else array))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):  # no random initialization of 268 million values
        model = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation=attention)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are computed, not loaded
    for module in model.modules():  # the embedding scale is a computed buffer as well
        if "embed_scale" in module._buffers:
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, left
    return model.eval()


def hf_logits(model, ids) -> np.ndarray:
    """[T] -> float32 [T, V]."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def hf_norms(model, ids) -> dict[str, np.ndarray]:
    """{stage: L2 norm of the residual stream at each position, [T]}; stages as in `our_norms`."""
    import torch

    found: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            found[name] = hidden.double().norm(dim=-1)[0].numpy()

        return hook

    stages = [("embedding", model.model.embed_tokens)]
    stages += [(f"layer {i}", layer) for i, layer in enumerate(model.model.layers)]
    stages += [("final norm", model.model.norm)]
    handles = [module.register_forward_hook(keep(name)) for name, module in stages]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: found[name] for name, _ in stages}


def our_norms(model, params, ids) -> dict[str, np.ndarray]:
    """{stage: L2 norm of the residual stream at each position, [T]} of our JAX model."""
    import jax.numpy as jnp

    from gemma import gm

    def wanted(module, method) -> bool:
        stage = isinstance(module, gm.nn.Embedder) and method == "encode"
        stage |= isinstance(module, gm.nn.Block) and method == "__call__"
        return stage or (module.name == "final_norm" and method == "__call__")

    tokens = jnp.asarray([list(ids)], jnp.int32)
    _, state = model.apply({"params": params}, tokens, capture_intermediates=wanted, mutable=["intermediates"])
    seen = state["intermediates"]

    def norm(hidden):
        return np.linalg.norm(np.asarray(hidden, np.float64), axis=-1)[0]

    found = {"embedding": norm(seen["embedder"]["encode"][0])}
    for i in range(NUM_LAYERS):
        found[f"layer {i}"] = norm(seen[f"layer_{i}"]["__call__"][0][1])
    found["final norm"] = norm(seen["final_norm"]["__call__"][0])
    return found


# Kept for the life of the process: the library holds the pointer, and calls it even while it is being freed.
QUIET = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda *_: None)


class _Blob(C.Structure):
    """llama.cpp's parameter structs, by value: longer than either is; only leading fields are touched."""

    _fields_ = [("words", C.c_uint32 * 256)]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.c_void_p),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class LlamaCpp:
    """llama.cpp out of the xllamacpp wheel through its C interface: one sequence, one thread, float32 logits."""

    def __init__(self, path: str | os.PathLike[str], context: int = 1024):
        folder = os.path.dirname(importlib.util.find_spec("xllamacpp").origin)
        self._lib = lib = C.CDLL(glob.glob(os.path.join(folder, "xllamacpp*.so"))[0])
        pointer, size = C.c_void_p, C.c_int32
        for name, result, *arguments in (
            ("llama_model_default_params", _Blob),
            ("llama_context_default_params", _Blob),
            ("llama_model_load_from_file", pointer, C.c_char_p, _Blob),
            ("llama_init_from_model", pointer, pointer, _Blob),
            ("llama_n_ctx", C.c_uint32, pointer),
            ("llama_set_n_threads", None, pointer, size, size),
            ("llama_batch_init", _Batch, size, size, size),
            ("llama_batch_free", None, _Batch),
            ("llama_decode", size, pointer, _Batch),
            ("llama_get_logits_ith", C.POINTER(C.c_float), pointer, size),
            ("llama_get_memory", pointer, pointer),
            ("llama_memory_clear", None, pointer, C.c_bool),
            ("llama_free", None, pointer),
            ("llama_model_free", None, pointer),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.llama_log_set(QUIET, None)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        assert self._model, f"llama.cpp cannot read {path}"
        params = lib.llama_context_default_params()
        params.words[0] = context  # n_ctx is the first field
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context and lib.llama_n_ctx(self._context) == context
        lib.llama_set_n_threads(self._context, 1, 1)
        self._batch = lib.llama_batch_init(context, 0, 1)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _decode(self, ids, start: int) -> np.ndarray:
        """Logits after each of ids, which stand at positions start...: float32 [T, V]."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        status = self._lib.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        rows = (self._lib.llama_get_logits_ith(self._context, i) for i in range(len(ids)))
        return np.stack([np.ctypeslib.as_array(row, (VOCAB,)).copy() for row in rows])

    def greedy(self, ids, steps: int) -> tuple[list[int], np.ndarray]:
        """Continues ids greedily: (prompt and continuation, the logits [steps, V] that chose the continuation)."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        tokens, rows = list(ids), []
        last = self._decode(tokens, 0)[-1]
        for _ in range(steps):
            rows.append(last)
            tokens.append(int(last.argmax()))
            if len(rows) < steps:
                last = self._decode(tokens[-1:], len(tokens) - 1)[-1]
        return tokens, np.stack(rows)
