# SPDX-License-Identifier: Apache-2.0
"""Every name and every parameter of the official inference API: where it is, its kind, its default."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import jax.numpy as jnp
import pytest

from gemma import gm

NAMES = {
    "gm.nn": """Transformer Gemma2_2B Gemma2_9B Gemma2_27B Gemma3_270M Gemma3_1B Gemma3_4B Gemma3_12B Gemma3_27B Einsum
        RMSNorm Embedder Attention FeedForward Block AttentionType Cache Output TransformerLike config LoRA IntWrapper
        QuantizationAwareWrapper AnchoredPolicy""",
    "gm.data": """pad make_seq2seq_fields Seq2SeqTask ContrastiveTask DecodeBytes FormatText Tokenize Pad MapInts
        AddSeq2SeqFields Parquet""",
    "gm.losses": "DpoLoss NpoLoss",
    "gm.evals": "SamplerEvaluator",
    "gm.nn.config": """TransformerConfig QueryPreAttentionNormalisation make_attention_layers_types
        GEMMA3_ATTENTION_PATTERN AttentionType ModelInfo""",
    "gm.text": """Tokenizer Gemma2Tokenizer Gemma3Tokenizer SpecialTokens SamplingMethod Greedy RandomSampling
        TopkSampling TopPSampling Sampler SamplerOutput ChatSampler ToolSampler""",
    "gm.ckpts": "CheckpointPath save_params load_params LoadCheckpoint SkipLoRA AnchoredPolicyLoader",
    "gm.math": "apply_rope count_consecutive",
    "gm.tools": "Tool Example ToolOutput ToolManagerBase OneShotToolManager Calculator FileExplorer OfflineToolSearch",
    "gm.testing": "DummyGemma DummyTokenizer use_hermetic_tokenizer",
    "gm.typing": "Params",
}

# The private modules that official tests and scripts import, and what they take from them.
PRIVATE = {
    "gm.nn._config": "TransformerConfig ModelInfo",
    "gm.nn._gemma": "Gemma3_4B",
    "gm.nn._layers": "Einsum RMSNorm",
    "gm.nn._modules": "Attention Block FeedForward Embedder AttentionType",
    "gm.nn._transformer": "Transformer Output ModelInfo",
    "gm.data._functional": "pad make_seq2seq_fields",
    "gm.data._tasks": "Seq2SeqTask ContrastiveTask _decode_bytes",
    "gm.data._transforms": "DecodeBytes FormatText Tokenize Pad MapInts AddSeq2SeqFields",
    "gm.data._parquet": "Parquet",
    "gm.math._misc": "count_consecutive",
    "gm.math._pos_utils": "build_positions_from_mask",
    "gm.utils._types": "Input InputConfig",
    "gm.utils._cache_helper": "Cache",
    "gm.utils._attention_mask": "make_causal_bidirectional_attention_mask",
    "gm.utils._jax_utils": "flatten_unflatten_batch_dim _get_argname_to_non_batch_dim_size",
    "gm.utils._file_cache": "maybe_get_from_cache _get_cache_dir",
    "gm.vision._token_utils": """SOFT_TOKEN_PLACEHOLDER get_num_mm_tokens add_extra_tokens_for_images insert_sequence
        merge_embeddings remove_mm_logits""",
    "gm.vision._preprocess": "",
    "gm.text._prefill": "prefill _make_full_attention_mask _get_or_init_cache _make_prefill_input",
    "gm.text._full_loop": "FullState SamplerLoop",
    "gm.text._sampler_loop": """SamplingState SamplerLoop _mask_tokens_after_end_tokens
        _mask_full_attention_mask_prefix_for_next_turn""",
    "gm.text._turn_utils": "PrevTurns",
    "gm.text._template": "PROMPT ANSWER Turn UserTurn ModelTurn",
}


def find(path: str):
    """`gm.nn.Transformer.init_cache` or a private module's attribute."""
    module, parts = importlib.import_module("gemma.gm"), path.split(".")[1:]
    for i, part in enumerate(parts):
        try:
            module = getattr(module, part)
        except AttributeError:
            module = importlib.import_module(f"gemma.{'.'.join(path.split('.')[: i + 2])}")
    return module


@pytest.mark.parametrize("module", [*NAMES, *PRIVATE])
def test_names(module):
    found = importlib.import_module(f"gemma.{module}")
    names = (NAMES | PRIVATE)[module].split()
    assert [name for name in names if not hasattr(found, name)] == []


def test_public_modules_list_their_names():
    """Completion in a notebook reads `dir`; it must not need the modules to be loaded."""
    for module in ("ckpts", "data", "evals", "losses", "math", "nn", "sharding", "testing", "text", "tools", "typing"):
        assert module in dir(gm)
        for name in NAMES.get(f"gm.{module}", "").split():
            assert name in dir(getattr(gm, module)), f"gm.{module}.{name}"


ANY = object()
KEYS = "tokens=KEY, images=None, positions=None, attention_mask=None"
SAMPLER = "model, params, tokenizer=None, sampling=Greedy(), forbidden_tokens=None, stop_tokens=None, cache_length=4096"
ATTENTION = """num_heads, num_kv_heads, features, head_dim, attn_type, query_pre_attn_scalar,
    rope_base_frequency=10_000, rope_scale_factor=1.0, attn_logits_soft_cap=None, sliding_window_size=None,
    use_qk_norm=False"""

# As `def` would have it. `ANY` is a default that is not compared; parameters of ours that are not here must be optional.
SIGNATURES = {
    "gm.nn.Transformer": f"*, return_last_only=None, dtype=jnp.bfloat16, {KEYS}, config",
    "gm.nn.Gemma3_270M": f"*, return_last_only=None, dtype=jnp.bfloat16, {KEYS}, config=ANY",
    "gm.nn.Gemma3_4B": f"*, return_last_only=None, dtype=jnp.bfloat16, {KEYS}, config=ANY, text_only=False",
    "gm.nn.Transformer.__call__": """self, tokens, *, images=None, positions=None, cache=None, attention_mask=None,
        return_last_only=None, return_hidden_states=None""",
    "gm.nn.Transformer.init_cache": "self, *, batch_size, dtype, cache_length, sharding=None",
    "gm.nn.Einsum": "shape, weight_name='w', initializer=ANY, dtype=None",
    "gm.nn.Einsum.__call__": "self, eqn, x",
    "gm.nn.RMSNorm.__call__": "self, x",
    "gm.nn.Embedder": "vocab_size, embed_dim, vision_proj_dim=None",
    "gm.nn.Embedder.encode": "self, x",
    "gm.nn.Embedder.decode": "self, x",
    "gm.nn.Embedder.encode_vision": "self, x",
    "gm.nn.Attention": ATTENTION,
    "gm.nn.Attention.init_cache": "cache_size, num_heads, head_dim, batch_size, dtype=jnp.bfloat16",
    "gm.nn.FeedForward": "features, hidden_dim, transpose_gating_einsum",
    "gm.nn.config.TransformerConfig": """num_embed, embed_dim, hidden_dim, num_heads, head_dim, num_kv_heads,
        final_logit_softcap, use_post_attn_norm, use_post_ffw_norm, attention_types,
        query_pre_attn_norm=QPAN.BY_ONE_OVER_SQRT_HEAD_DIM, attn_logits_soft_cap=None, sliding_window_size=None,
        transpose_gating_einsum=False, use_qk_norm=False, local_base_frequency=10_000, global_base_frequency=10_000,
        local_scale_factor=1.0, global_scale_factor=1.0, vision_encoder=None""",
    "gm.nn.config.TransformerConfig.init_cache": "self, batch_size, dtype=jnp.bfloat16, *, cache_length",
    "gm.nn.config.make_attention_layers_types": "pattern, *, num_layers",
    "gm.nn.config.ModelInfo": "*, tokenizer_version=None, default_ckpt=None",
    "gm.text.Gemma3Tokenizer": "path=ANY, custom_tokens=ANY",
    "gm.text.Gemma3Tokenizer.encode": "self, text, *, add_bos=False, add_eos=False",
    "gm.text.Gemma3Tokenizer.decode": "self, ids",
    "gm.text.Gemma3Tokenizer.split": "self, text",
    "gm.text.Gemma3Tokenizer.plot_logits": "self, logits, *, keep_top=30",
    "gm.text.Tokenizer.from_version": "version",
    "gm.text.RandomSampling": "*, temperature=1.0",
    "gm.text.TopkSampling": "*, temperature=1.0, k=1",
    "gm.text.TopPSampling": "*, p=0.9, temperature=1.0",
    "gm.text.SamplingMethod.get_next_tokens": "self, logits, rng",
    "gm.text.Sampler": f"*, {SAMPLER}, max_out_length=2048, pad_length=ANY",
    "gm.text.Sampler.sample": """self, prompt, *, images=None, max_new_tokens=None, stream=False, sampling=None, rng=None,
        return_state=False, last_state=None, sharding=None""",
    "gm.text.ChatSampler": f"""*, {SAMPLER}, max_out_length=2048, multi_turn=False, print_stream=False,
        last_state=None, turns=ANY""",
    "gm.text.ChatSampler.chat": """self, prompt, *, images=None, sampling=None, rng=None, max_new_tokens=None,
        multi_turn=None, print_stream=None""",
    "gm.text.ToolSampler": f"""*, {SAMPLER}, max_out_length=2048, multi_turn=False, print_stream=False,
        last_state=None, turns=ANY, tools=ANY, manager_cls=gm.tools.OneShotToolManager""",
    "gm.text.ToolSampler.chat": """self, prompt, *, images=None, sampling=None, rng=None, max_new_tokens=None,
        multi_turn=None, print_stream=None""",
    "gm.text._prefill.prefill": """*, model, params, input, last_state, cache_length, max_out_length, pad_length=None,
        rng, sharding""",
    "gm.text._turn_utils.PrevTurns": "*, last_state",
    # The samplers' own states are made by them alone; this is the one that scripts put together.
    "gm.text._full_loop.FullState": """*, step, done, last_token, last_token_pos, predicted_tokens, cache, rng,
        init_cache_length, full_attention_mask""",
    "gm.ckpts.load_params": "path, *, params=None, donate=True, text_only=False, sharding=None, quantize=False",
    "gm.ckpts.save_params": "params, path, *, wait_until_finished=False",
    "gm.ckpts.LoadCheckpoint": "path, quantize=False",
    "gm.ckpts.SkipLoRA": "wrapped",
    "gm.ckpts.AnchoredPolicyLoader": "*, policy, anchor=None",
    "gm.nn.AnchoredPolicy": "policy, anchor=None",
    "gm.data.pad": "element, max_length, *, truncate=False, fill_value=0, axis=-1",
    "gm.data.make_seq2seq_fields": "prompt, response",
    "gm.data.Seq2SeqTask": """*, in_prompt, in_response, out_input, out_target, out_target_mask, drop_inputs=True,
        tokenizer, max_length, truncate=False, sampling=False""",
    "gm.data.ContrastiveTask": """*, in_prompt, in_chosen, in_rejected, out_tokens, out_targets, out_mask, tokenizer,
        max_length, truncate=False, drop_inputs=True""",
    "gm.data.DecodeBytes": "*, key, encoding='utf-8'",
    "gm.data.FormatText": "*, key, template",
    "gm.data.Tokenize": "*, key, tokenizer, add_eos=False, add_bos=False",
    "gm.data.Pad": "*, key, max_length, truncate=False",
    "gm.data.MapInts": "*, key, old_to_new",
    "gm.data.AddSeq2SeqFields": "*, in_prompt, in_response, out_input, out_target, out_target_mask",
    "gm.data.Parquet": "path",
    "gm.losses.DpoLoss": """*, tau=0.1, label_smoothing=0.0, tokens=ANY, sequence_mask=ANY, policy_logits=ANY,
        anchor_logits=ANY""",
    "gm.losses.NpoLoss": "*, tau=1.0, tokens=ANY, sequence_mask=ANY, policy_logits=ANY, anchor_logits=ANY",
    "gm.evals.SamplerEvaluator": """*, max_new_tokens, cache_length=4096, pad_length=None, num_batches=None, cache=False,
        ds, model""",
    "gm.math.apply_rope": "inputs, positions, *, base_frequency, scale_factor=1.0, rope_proportion=1.0",
    "gm.math.count_consecutive": "values",
    "gm.tools.Example": "*, query, thought=None, tool_kwargs, tool_kwargs_doc, result, answer",
    "gm.tools.ToolOutput": "*, text, images=None, update_tools=None",
    "gm.tools.OneShotToolManager": "*, tools",
    "gm.tools.OneShotToolManager.maybe_execute_tool": "self, model_output",
    "gm.tools.OneShotToolManager.update_tools": "self, tools",
    "gm.tools.OfflineToolSearch": "*, tools",
    "gm.utils._types.InputConfig": "*, support_images, num_tokens_per_image, special_tokens",
    "gm.utils._types.Input": "*, text, images, config",
    "gm.utils._types.Input.pad": "self, length_with_mm",
    "gm.utils._cache_helper.Cache": "cache",
    "gm.utils._file_cache.maybe_get_from_cache": "*, remote_file_path, cache_subdir",
    "gm.vision._token_utils.get_num_mm_tokens": "*, max_num_images, num_tokens_per_image",
}
# Called by position only, there and here, so that their parameters' names are free.
UNNAMED = {"gm.tools.OneShotToolManager.maybe_execute_tool", "gm.tools.OneShotToolManager.update_tools"}
UNNAMED |= {"gm.text.Tokenizer.from_version", "gm.nn.RMSNorm.__call__", "gm.math.count_consecutive"}


def signature_of(text: str) -> inspect.Signature:
    """The signature that a parameter list in source stands for."""
    scope = {"jnp": jnp, "gm": gm, "ANY": ANY, "KEY": "__KEY_REQUIRED__", "Greedy": gm.text.Greedy}
    scope["QPAN"] = gm.nn.config.QueryPreAttentionNormalisation
    exec(f"def f({text}): ...", scope)
    return inspect.signature(scope["f"])


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    official, ours = signature_of(SIGNATURES[path]).parameters, inspect.signature(find(path)).parameters
    positional = [p for p in official.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if path in UNNAMED:
        assert len(ours) >= len(positional)
        return
    first = [p.name for p in ours.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY][: len(positional)]
    assert first == [p.name for p in positional]
    for name, parameter in official.items():
        assert name in ours, name
        if parameter.default is not ANY:
            assert ours[name].default == parameter.default, name
        else:
            assert ours[name].default is not inspect.Parameter.empty, name
    extra = [p for p in ours.values() if p.name not in official and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert [p.name for p in extra if p.default is inspect.Parameter.empty] == []


def test_flax_modules_take_a_name():
    parameters = inspect.signature(gm.nn.Einsum).parameters
    assert parameters["name"].default is None


def test_the_package_is_not_called_gm():
    import gemma

    with pytest.raises(AttributeError, match='Please use "from gemma import gm", NOT "import gemma as gm"'):
        getattr(gemma, "nn")  # noqa: B009 - what `import gemma as gm` would do
    assert isinstance(gemma.__version__, str)


def test_importing_is_lazy():
    """`from gemma import gm` costs next to nothing: neither JAX nor flax, and never TensorFlow or kauldron."""
    code = "import sys; from gemma import gm; print({m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(eval(loaded)) & {"jax", "flax", "torch", "numpy", "tensorflow", "kauldron"}


def test_checkpoint_paths():
    paths = gm.ckpts.CheckpointPath
    names = [f"GEMMA2_{size}_{kind}" for size in ("2B", "9B", "27B") for kind in ("PT", "IT")]
    names += [f"GEMMA3_{size}_{kind}" for size in ("270M", "1B", "4B", "12B", "27B") for kind in ("PT", "IT")]
    for name in names:
        assert paths[name] == "gs://gemma-data/checkpoints/" + name.lower().replace("_", "-")


def test_what_takes_text_only():
    assert gm.nn.Gemma3_4B(text_only=True).config.vision_encoder is None
    for model in (gm.nn.Gemma3_270M, gm.nn.Gemma3_1B, gm.nn.Gemma2_2B):
        with pytest.raises(TypeError):
            model(text_only=True)


@pytest.mark.parametrize(
    ("name", "sizes", "window", "version"),
    [
        ("Gemma2_2B", (26, 2304, 9216, 8, 4, 256, 256128), 4096, 2),
        ("Gemma2_9B", (42, 3584, 14336, 16, 8, 256, 256128), 4096, 2),
        ("Gemma2_27B", (46, 4608, 36864, 32, 16, 128, 256128), 4096, 2),
        ("Gemma3_270M", (18, 640, 2048, 4, 1, 256, 262144), 512, 3),
        ("Gemma3_1B", (26, 1152, 6912, 4, 1, 256, 262144), 512, 3),
        ("Gemma3_4B", (34, 2560, 10240, 8, 4, 256, 262144), 1024, 3),
        ("Gemma3_12B", (48, 3840, 15360, 16, 8, 256, 262144), 1024, 3),
        ("Gemma3_27B", (62, 5376, 21504, 32, 16, 128, 262144), 1024, 3),
    ],
)
def test_models(name, sizes, window, version):
    model = getattr(gm.nn, name)()
    config = model.config
    assert model.INFO.tokenizer_version == version
    assert sizes == (
        config.num_layers,
        config.embed_dim,
        config.hidden_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.num_embed,
    )
    assert config.sliding_window_size == window
    assert model == getattr(gm.nn, name)() and hash(model) == hash(getattr(gm.nn, name)())
    local = gm.nn.AttentionType.LOCAL_SLIDING
    if version == 2:
        assert (config.final_logit_softcap, config.attn_logits_soft_cap) == (30.0, 50.0) and not config.use_qk_norm
        assert config.attention_types[:3] == (local, gm.nn.AttentionType.GLOBAL, local)
        assert config.transpose_gating_einsum is (name != "Gemma2_2B")
    else:
        assert config.final_logit_softcap is None and config.attn_logits_soft_cap is None and config.use_qk_norm
        assert [i for i, kind in enumerate(config.attention_types) if kind != local] == [*range(5, sizes[0], 6)]
        assert config.transpose_gating_einsum and config.global_base_frequency == 1_000_000
        assert config.global_scale_factor == (8.0 if sizes[0] > 26 else 1.0)
        assert (config.vision_encoder is not None) == (sizes[0] > 26)
    scale = {"Gemma2_27B": 144**-0.5, "Gemma3_27B": 168**-0.5}.get(name, sizes[5] ** -0.5)
    assert config.query_pre_attn_scalar() == pytest.approx(scale)
