# SPDX-License-Identifier: Apache-2.0
"""llama.cpp runs what we wrote: tiny models of each generation, and the real 270M quantized by us.

The tiny models are float32 and their reference is Hugging Face's model, loaded from the safetensors that we wrote of
the same weights. llama.cpp keeps keys and values in float16, so logits agree to its rounding, not to float32's.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import real_harness
from saving_models import text_config, tiny_source

from gemma import hub
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.saving import ArrayReader, from_arrays, save
from gemma.testing import random_tensors

FAMILIES = {
    "gemma": dict(num_key_value_heads=1),
    "gemma2": {},
    "gemma3": {},
    "gemma3-other-bases": dict(rope_local_base_freq=5e3, rope_theta=3e5, rope_scaling_factor=1.0),
    "gemma3-other-pattern": dict(layer_pattern="LLG"),
}
PROMPT = [2, 40, 41, 90, 91, 17, 200, 300, 33, 120]  # longer than the window of five
STEPS = 24


@contextlib.contextmanager
def llamacpp(path, rows, monkeypatch):
    monkeypatch.setattr(real_harness, "VOCAB", rows)
    model = real_harness.LlamaCpp(path, 256)
    try:
        yield model
    finally:
        model.close()


def hf_logits(folder, ids):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_llamacpp_continues_as_the_reference(family, tmp_path, monkeypatch):
    config = text_config(family.split("-")[0], **FAMILIES[family])
    values = random_tensors(config, seed=5)
    values["embed"] *= np.float32(0.1)  # or a tied model repeats its last token
    tensors = from_arrays(values, config)
    save(tmp_path / "st", tensors, config, format="safetensors")
    report = save(tmp_path / "x.gguf", tensors, config, format="gguf", tokenizer=tiny_source())
    assert not report.notes
    with llamacpp(tmp_path / "x.gguf", config.vocab_size, monkeypatch) as model:
        tokens, got = model.greedy(PROMPT, STEPS)
    want = hf_logits(tmp_path / "st", tokens[:-1])[len(PROMPT) - 1 :]
    assert len(set(tokens[len(PROMPT) :])) > 3, "a constant continuation proves little"
    # keys and values rounded to 11 bits; a swapped base, cap, norm or window is off by the size of the logits
    error = np.abs(got - want).max() / want.std()
    assert error < 0.02, error
    cosine = (got * want).sum(axis=1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1))
    assert cosine.min() > 0.9999, cosine
    margin = np.sort(want, axis=1)[:, -1] - np.sort(want, axis=1)[:, -2]
    clear = margin > 2 * np.abs(got - want).max()
    assert clear.mean() > 0.75 and (want.argmax(axis=1) == tokens[len(PROMPT) :])[clear].all()


@pytest.mark.parametrize("quantize", ["bf16", "q8_0", "q4_0", "q6_k", "q4_k_m", "q2_k"])
def test_llamacpp_reads_every_kind_of_file(quantize, tmp_path, monkeypatch):
    """Against its own run of the dequantized values: the bytes mean the same to both."""
    config = text_config("gemma3")
    values = random_tensors(config, seed=6)
    save(
        tmp_path / "q.gguf",
        from_arrays(values, config),
        config,
        format="gguf",
        quantize=quantize,
        tokenizer=tiny_source(),
    )
    with open_checkpoint(tmp_path / "q.gguf") as checkpoint:
        floats = {tensor.name: reader(np.float32).copy() for tensor, reader in load_tensors(checkpoint)}
    save(tmp_path / "f.gguf", from_arrays(floats, config), config, format="gguf", tokenizer=tiny_source())
    logits = []
    for name in ("q", "f"):
        with llamacpp(tmp_path / f"{name}.gguf", config.vocab_size, monkeypatch) as model:
            logits.append(model._decode(PROMPT, 0))
    # llama.cpp rounds the other operand as well (to 8 bits for quantized rows): about a tenth of the logits' spread at
    # worst in models of this size; a block read differently leaves no correlation at all
    assert np.abs(logits[0] - logits[1]).max() < 0.2 * logits[1].std()
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.999


@pytest.mark.real
def test_the_real_model_made_again_from_dequantized_values(tmp_path):
    """GGUF to floats to Q4_K_M: llama.cpp gives the published continuation, and the types are those of the original."""
    with open_checkpoint(hub.demo_path()) as source:
        config, tokenizer = source.config(), source.tokenizer_source()
        tensors = [
            (tensor, ArrayReader(lambda reader=reader: reader(np.float32), np.float32))
            for tensor, reader in load_tensors(source)
        ]
        report = save(tmp_path / "x.gguf", tensors, config, format="gguf", quantize="q4_k_m", tokenizer=tokenizer)
        assert not report.notes
        with open_checkpoint(tmp_path / "x.gguf") as copy:
            assert copy.config() == config
            assert {n: i.dtype for n, i in copy.tensors.items()} == {n: i.dtype for n, i in source.tensors.items()}
            again = copy.tokenizer_source()
            assert again.pieces == tokenizer.pieces and np.array_equal(again.scores, tokenizer.scores)
    model = real_harness.LlamaCpp(tmp_path / "x.gguf", 256)
    try:
        tokens, _ = model.greedy(real_harness.PROMPT_IDS, 10)
    finally:
        model.close()
    # " with the invention of the first computer in 1947", as the original continues
    assert tokens[6:] == [607, 506, 17410, 529, 506, 1171, 5194, 528, 236743, 236770]
