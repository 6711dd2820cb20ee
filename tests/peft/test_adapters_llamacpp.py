# SPDX-License-Identifier: Apache-2.0
"""llama.cpp loads the GGUF adapters that we write, and its logits move as ours do."""

from __future__ import annotations

import ctypes as C
import os

import jax
import numpy as np
import pytest
import real_harness
from lora_models import adapted, logits

from gemma import adapters, gm, peft, testing
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import CheckpointError, UnsupportedError
from gemma.saving import save

IDS = [2, 40, 41, 90, 91, 17, 200, 300, 33, 120]  # longer than the window of five
ROWS = 320


class Adapted(real_harness.LlamaCpp):
    """llama.cpp with an adapter; `loaded` is False where it refused the file."""

    def __init__(self, path, adapter, scale: float = 1.0):
        super().__init__(path, 256)
        lib, pointer = self._lib, C.c_void_p
        lib.llama_adapter_lora_init.restype = pointer
        lib.llama_adapter_lora_init.argtypes = [pointer, C.c_char_p]
        lib.llama_set_adapters_lora.argtypes = [pointer, C.POINTER(pointer), C.c_size_t, C.POINTER(C.c_float)]
        self.adapter = lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        self.loaded = bool(self.adapter)
        if self.loaded:
            status = lib.llama_set_adapters_lora(self._context, (pointer * 1)(self.adapter), 1, (C.c_float * 1)(scale))
            assert status == 0


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def base(request, tmp_path_factory):
    """(the loaded model, its GGUF)."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32, vocab_size=ROWS)
    config = testing.tiny_config(request.param, **sizes, query_pre_attn_scalar=None, num_hidden_layers=2)
    values = testing.random_tensors(config, seed=5)
    values["embed"] *= np.float32(0.1)  # or a tied model repeats its last token
    path = tmp_path_factory.mktemp("llamacpp") / "base.gguf"
    testing.write_tiny_gguf(path, config, tensors=values)
    return gm.text.load_model(path), path


def run(path, adapter, scale=1.0):
    model = Adapted(path, adapter, scale)
    try:
        assert model.loaded
        return model._decode(IDS, 0)
    finally:
        model.close()


def seen(model, params):
    """Our logits [T, V] of the rows that the file has."""
    return logits(model, params, np.array([IDS], np.int32))[0, :, :ROWS]


def native_logits(path, adapter):
    """The native CPU decoder's [T, V]; None where there is no library."""
    from gemma.kernels import _native
    from gemma.serving._runner_cpu import load_runner

    if _native.library() is None:
        return None
    runner = load_runner(path, threads=1, max_len=len(IDS), adapter=adapter)
    return runner.model.score(0, IDS)[:, :ROWS].copy()


def test_its_logits_move_as_ours(base, tmp_path, monkeypatch):
    loaded, path = base
    monkeypatch.setattr(real_harness, "VOCAB", ROWS)
    config = loaded.model.config.gemma
    patterns = dict(rank_pattern={r"layer_0/mlp/linear": 5}, alpha_pattern={r"layer_1/attn/.*": 9.0})
    model, params = adapted(seed=4, alpha=6.0, targets=("attention", "mlp"), base=loaded, size=0.15, **patterns)
    peft.save_adapter(tmp_path / "adapter.gguf", params, model)
    ours, plain = seen(model, params), seen(loaded.model, loaded.params)
    theirs, still = run(path, tmp_path / "adapter.gguf"), run(path, tmp_path / "adapter.gguf", 0.0)
    # keys and values are rounded to 11 bits there; the adapter moves the logits by more than their own size
    assert np.abs(still - plain).max() < 0.02 * plain.std()
    assert np.abs(theirs - ours).max() < 0.02 * ours.std()
    assert np.abs(ours - plain).max() > ours.std()

    # the native decoder runs the file beside the weights of the file
    native = native_logits(path, tmp_path / "adapter.gguf")
    assert native is None or np.abs(native - ours).max() < 1e-5 * np.abs(ours).max()

    # read back, and through PEFT's format and back to a file
    again = peft.load_adapter(tmp_path / "adapter.gguf", loaded.model, loaded.params)
    fused = peft.fuse_params(peft.merge_params(loaded.params, again.lora), again.model)
    np.testing.assert_allclose(seen(loaded.model, fused), ours, atol=2e-5)
    adapters.save_adapter_file(tmp_path / "folder", again.file, config)
    back = adapters.open_adapter(tmp_path / "folder", config)
    assert back.base_checksum == again.file.base_checksum != ""
    for name, low in again.file.tensors.items():
        np.testing.assert_allclose(back.tensors[name].delta(), low.delta(), rtol=1e-6)

    # and merged: the file that `save` writes with the adapter folded in
    with open_checkpoint(path) as opened:
        tensors = adapters.fused(load_tensors(opened), again.file)
        save(tmp_path / "merged.gguf", tensors, opened.config(), format="gguf")
    merged = gm.text.load_model(tmp_path / "merged.gguf")
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), merged.params, fused)


def test_what_the_format_cannot_hold_is_refused(base, tmp_path):
    loaded, path = base
    model, params = adapted(base=loaded, use_dora=True, targets=("attention",))
    with pytest.raises(UnsupportedError, match="DoRA"):
        peft.save_adapter(tmp_path / "x.gguf", params, model)
    model, params = adapted(base=loaded, targets=("embedder",))
    with pytest.raises(UnsupportedError, match="output head"):
        peft.save_adapter(tmp_path / "x.gguf", params, model)
    assert not (tmp_path / "x.gguf").exists()
    config = loaded.model.config.gemma
    with pytest.raises(CheckpointError, match="expected an adapter"):
        adapters.open_adapter(path, config)
    other = "gemma3" if not config.use_qk_norm else "gemma2"
    wrong = testing.tiny_config(other, num_hidden_layers=2, query_pre_attn_scalar=None)
    model, params = adapted(base=loaded, targets=("attention",))
    peft.save_adapter(tmp_path / "x.gguf", params, model)
    with pytest.raises(CheckpointError, match="is an adapter of"):
        adapters.open_adapter(tmp_path / "x.gguf", wrong)
