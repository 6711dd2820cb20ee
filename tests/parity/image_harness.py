# SPDX-License-Identifier: Apache-2.0
"""One tiny random Gemma 3 with images: Hugging Face's and ours, holding the same weights.

The vision part of the weight layout is written by hand from the published description, a second time on purpose;
`gemma.weights` is compared with it. Axis letters as in docs/axes.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hf_tiny_oracles import gemma3, randomize
from parity_harness import TOLERANCE, gap, hand_tree, nest

from gemma import gm
from gemma.config import GemmaConfig, SiglipVisionConfig
from gemma.gm.vision import ImageTokens

__all__ = ["BEGIN", "SOFT", "TOLERANCE", "ImagePair", "gap", "pair", "pixels", "prompt"]

BEGIN, END, SOFT, NEW_LINES, Q = 298, 299, 300, 108, 4  # the oracle's ids, and soft tokens of an image
LAYERS = 2  # a local and a global one; deeper networks are compared in test_hf.py
WINDOW = 6
QUICK = dict(xla_backend_optimization_level=0)

CONFIG = GemmaConfig(
    vocab_size=320,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=128,
    eos_token_id=1,
    model_type="gemma3",
    layer_pattern="LG",
    sliding_window=WINDOW,
    use_post_norms=True,
    use_qk_norm=True,
    query_pre_attn_scalar=18.0,
    transpose_gating_einsum=True,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling_factor=8.0,
    vision=SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=56
    ),
    mm_tokens_per_image=Q,
    image_token_index=SOFT,
    boi_token_index=BEGIN,
    eoi_token_index=END,
)
IMAGE_TOKENS = ImageTokens.of(CONFIG)


def vision_tree(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{nested Flax path: array} of the parts of a Hugging Face state dict that belong to images."""
    root, heads, size = "model.vision_tower.", 4, 12
    top = "vision_encoder/siglip_encoder/"
    tree = {
        f"{top}embedding/kernel": state[f"{root}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        f"{top}embedding/bias": state[f"{root}embeddings.patch_embedding.bias"],
        f"{top}pos_embedding": state[f"{root}embeddings.position_embedding.weight"][None],
        f"{top}Transformer/encoder_norm/scale": state[f"{root}post_layernorm.weight"],
        f"{top}Transformer/encoder_norm/bias": state[f"{root}post_layernorm.bias"],
        "embedder/mm_soft_embedding_norm/scale": state["model.multi_modal_projector.mm_soft_emb_norm.weight"],
        "embedder/mm_input_projection/w": state["model.multi_modal_projector.mm_input_projection_weight"],
    }
    for i in range(2):
        hf = functools.partial(lambda name, at: state[f"{at}.{name}"], at=f"{root}encoder.layers.{i}")
        ours = f"{top}Transformer/encoderblock_{i}/"
        attention = f"{ours}MultiHeadDotProductAttention_0/"
        for part in ("query", "key", "value"):
            name = f"self_attn.{part[0]}_proj"
            tree[f"{attention}{part}/kernel"] = hf(f"{name}.weight").T.reshape(-1, heads, size)
            tree[f"{attention}{part}/bias"] = hf(f"{name}.bias").reshape(heads, size)
        tree[f"{attention}out/kernel"] = hf("self_attn.out_proj.weight").T.reshape(heads, size, -1)
        tree[f"{attention}out/bias"] = hf("self_attn.out_proj.bias")
        for j in range(2):
            tree[f"{ours}LayerNorm_{j}/scale"] = hf(f"layer_norm{j + 1}.weight")
            tree[f"{ours}LayerNorm_{j}/bias"] = hf(f"layer_norm{j + 1}.bias")
            tree[f"{ours}MlpBlock_0/Dense_{j}/kernel"] = hf(f"mlp.fc{j + 1}.weight").T
            tree[f"{ours}MlpBlock_0/Dense_{j}/bias"] = hf(f"mlp.fc{j + 1}.bias")
    return tree


@dataclasses.dataclass(eq=False)
class ImagePair:
    """The oracle and our model with its weights."""

    hf: Any
    flat: dict[str, np.ndarray]

    @functools.cached_property
    def model(self) -> gm.nn.Transformer:
        return gm.nn.Transformer.from_config(CONFIG, dtype=jnp.float32)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return jax.tree.map(jnp.asarray, nest(self.flat))

    @functools.cached_property
    def state(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.hf.state_dict().items()}

    @functools.lru_cache(maxsize=128)  # noqa: B019  (it lives as long as the session)
    def _expected(self, ids: tuple[int, ...], pictures: bytes | None) -> np.ndarray:
        tokens = torch.tensor([ids])
        more = {}
        if pictures is not None:
            array = np.frombuffer(pictures, np.float32).reshape(-1, 56, 56, 3).transpose(0, 3, 1, 2)
            more = dict(pixel_values=torch.tensor(array), token_type_ids=(tokens == SOFT).long())
        with torch.no_grad():
            return self.hf(input_ids=tokens, **more).logits[0].numpy()

    def expected(self, ids, pictures=None) -> np.ndarray:
        """The oracle's logits of one prompt with its markers, expanded: ids [T], pictures [I, H, W, C] -> [T', V]."""
        count = 0 if pictures is None else len(pictures)
        expanded = IMAGE_TOKENS.expand([int(i) for i in ids], count)
        theirs = tuple(SOFT if i < 0 else i for i in expanded)
        return self._expected(theirs, np.ascontiguousarray(pictures, np.float32).tobytes() if count else None)

    @functools.cached_property
    def apply(self):
        """The jitted model: (params, tokens, **arguments) -> Output."""
        return jax.jit(
            lambda params, tokens, last=None, hidden=None, **kw: self.model.apply(
                {"params": params}, tokens, return_last_only=last, return_hidden_states=hidden, **kw
            ),
            static_argnames=("last", "hidden"),
            compiler_options=QUICK,
        )

    @functools.cached_property
    def encode(self):
        """The jitted encoder: pictures [I, H, W, C] -> soft tokens [I, Q, D]."""
        return jax.jit(
            lambda params, pictures: self.model.apply({"params": params}, pictures, method="encode_images"),
            compiler_options=QUICK,
        )


@functools.cache
def pair() -> ImagePair:
    """The pair, made once per process."""
    cls, config = gemma3()
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = ["sliding_attention", "full_attention"]
    hf = randomize(cls._from_config(config, attn_implementation="eager"))
    state = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
    text = {name.replace("model.language_model.", "model."): value for name, value in state.items()}
    return ImagePair(hf, hand_tree(text, CONFIG) | vision_tree(state))


def pixels(count: int, seed: int = 0) -> np.ndarray:
    """Random prepared pictures, float32 [count, 56, 56, 3] in -1..1."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 56, 56, 3)).astype(np.float32)


def prompt(*parts: int, seed: int = 0) -> np.ndarray:
    """Random text of those lengths with a marker between every two: prompt(3, 4) is 3 tokens, an image, 4 tokens."""
    rng = np.random.default_rng(100 + seed)
    text = [rng.integers(3, 290, n) for n in parts]
    joined = [text[0]]
    for more in text[1:]:
        joined += [np.array([BEGIN]), more]
    return np.concatenate(joined)
