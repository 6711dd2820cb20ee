# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 with images in PyTorch against Hugging Face's oracle: one to three images, past the window, later turns."""

import dataclasses

import pytest
import torch
from hf_tiny_oracles import make
from torch_vision_oracles import load, our_config

from gemma import weights
from gemma._torch.load import without_values
from gemma.config import PRESETS
from gemma.errors import ConfigError, PromptError, ShapeError
from gemma.modeling_gemma import KVCache
from gemma.modeling_gemma3 import Gemma3ForConditionalGeneration
from gemma.sampling import SamplingParams

pytestmark = pytest.mark.supports("Gemma 3 vision", "PyTorch", "run")
TOLERANCE = 2e-5  # float32, logits of order 1
BOI, EOI, IMAGE, S = 298, 299, 300, 4  # the oracle's; its window is 6 tokens


@pytest.fixture(scope="module")
def pair():
    oracle, config = make("gemma3")
    return load(Gemma3ForConditionalGeneration(our_config(config)), oracle), oracle


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prompt(images, text=5, seed=0, bos=True):
    """Text around each image: [T] ids."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.tensor([2] if bos else [])]
    for _ in range(images):
        parts += [torch.randint(3, 290, (text,), generator=g), torch.tensor([BOI] + [IMAGE] * S + [EOI])]
    return torch.cat([*parts, torch.randint(3, 290, (text,), generator=g)]).long()


def pixels(count, seed=0):
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def expected_logits(oracle, ids, images):
    ids = ids[None] if ids.ndim == 1 else ids
    return oracle(input_ids=ids, pixel_values=images, token_type_ids=(ids == IMAGE).long()).logits


@pytest.mark.parametrize("images", [1, 2, 3])
def test_full_pass_equals_hugging_face(pair, images):
    """With two images and more the text is far longer than the window of six."""
    ours, oracle = pair
    ids, pictures = prompt(images)[None], pixels(images)
    theirs = expected_logits(oracle, ids, pictures)
    assert theirs.std() > 0.1 and (ours(ids, pictures)["logits"] - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_hugging_face_alone(pair, side):
    ours, oracle = pair
    rows, pictures = [prompt(1), prompt(2, text=4, seed=1)], pixels(3)
    T = max(map(len, rows))
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    for at, row in enumerate(rows):
        part = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[at, part], mask[at, part] = row, 1
    logits = ours(ids, pictures, mask)["logits"]
    for at, (row, own) in enumerate(zip(rows, (pictures[:1], pictures[1:]))):
        assert (logits[at][mask[at].bool()] - expected_logits(oracle, row, own)[0]).abs().max() < TOLERANCE


def test_images_in_a_later_turn_equal_one_pass(pair):
    """Turns with an image, without one, and with two, on one cache; then a few tokens one by one."""
    ours, oracle = pair
    turns = [
        prompt(1),
        prompt(0, seed=1, bos=False),
        prompt(2, seed=2, bos=False),
        prompt(0, text=3, seed=3, bos=False),
    ]
    pictures = pixels(3)
    cache, logits, used = KVCache(), [], 0
    for turn in turns[:3]:
        count = int((turn == IMAGE).sum()) // S
        own = pictures[used : used + count] if count else None
        logits.append(ours(turn[None], own, kv_cache=cache)["logits"])
        used += count
    for token in turns[3]:
        logits.append(ours(token[None, None], pictures, kv_cache=cache)["logits"])  # ignored: no placeholder
    theirs = expected_logits(oracle, torch.cat(turns), pictures)
    assert (torch.cat(logits, 1) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_the_whole_sequence_again(pair, side):
    ours, _ = pair
    rows, pictures = [prompt(1), prompt(2, text=4, seed=1)], pixels(3)
    T = max(map(len, rows))
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    for at, row in enumerate(rows):
        part = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[at, part], mask[at, part] = row, 1
    out = ours.generate(ids, pictures, attention_mask=mask, max_new_tokens=6, end_ids=())[:, T:]
    for at, (row, own) in enumerate(zip(rows, (pictures[:1], pictures[1:]))):
        for step in range(6):
            logits = ours(row[None], own)["logits"][0, -1]
            logits[[0, IMAGE]] = -torch.inf
            assert int(out[at, step]) == int(logits.argmax())
            row = torch.cat([row, logits.argmax()[None]])


def test_generate_without_images(pair):
    ours, oracle = pair
    out = ours.generate(prompt(0, text=9)[None], max_new_tokens=3, end_ids=())
    theirs = oracle(input_ids=out[:, :-1]).logits[0, -3:]
    theirs[:, [0, IMAGE]] = -torch.inf
    assert out[0, -3:].tolist() == theirs.argmax(-1).tolist()
    again = ours.generate(prompt(0, text=9)[None], params=SamplingParams(temperature=0.0, max_new_tokens=3), end_ids=())
    assert torch.equal(out, again)


def test_the_tower_runs_once(pair, monkeypatch):
    ours, _ = pair
    runs, tower = [], type(ours.model.vision_tower)
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, x: runs.append(len(x)) or forward(self, x))
    ours.generate(prompt(2)[None], pixels(2), max_new_tokens=5, end_ids=())
    assert runs == [2]


# --- mutations


def no_groups(model, patch):
    patch.setattr(model, "groups", lambda input_ids, here, call: None)


def one_group_for_all_images(model, patch):
    patch.setattr(model, "groups", lambda input_ids, here, call: here.long())


def max_pooling(model, patch):
    patch.setattr(torch.nn.functional, "avg_pool2d", torch.nn.functional.max_pool2d)


def columns_first(model, patch):
    project = model.model.multi_modal_projector.forward
    patch.setattr(
        model.model.multi_modal_projector,
        "forward",
        lambda x: project(x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)),
    )


def norm_without_one(model, patch):
    norm = model.model.multi_modal_projector.mm_soft_emb_norm
    patch.setattr(norm, "forward", lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight)


def scaled_features(model, patch):
    project = model.model.multi_modal_projector.forward
    patch.setattr(model.model.multi_modal_projector, "forward", lambda x: project(x) * 72**0.5)


MUTATIONS = [no_groups, one_group_for_all_images, max_pooling, columns_first, norm_without_one, scaled_features]


@pytest.mark.parametrize("break_it", MUTATIONS)
def test_mutations_are_seen(pair, monkeypatch, break_it):
    """Text of one token between the images: a group too wide stays within the window."""
    ours, oracle = pair
    ids, pictures = prompt(2, text=1)[None], pixels(2)
    theirs = expected_logits(oracle, ids, pictures)
    assert (ours(ids, pictures)["logits"] - theirs).abs().max() < TOLERANCE
    break_it(ours, monkeypatch)
    assert (ours(ids, pictures)["logits"] - theirs).abs().max() > 10 * TOLERANCE


def test_the_literal_mask_of_two_images(pair):
    """Both kinds of layers, drawn out: two images of two tokens, window 3."""
    from gemma._torch.masks import visible

    ours, _ = pair
    model = object.__new__(Gemma3ForConditionalGeneration)  # the mask alone: no such tower is needed
    torch.nn.Module.__init__(model)
    model.config = dataclasses.replace(ours.config, mm_tokens_per_image=2)
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, IMAGE, IMAGE, 7]])
    groups = model.groups(ids, ids == IMAGE, dict(kv_cache=None))
    assert groups.tolist() == [[0, 1, 1, 0, 2, 2, 0]]
    positions = torch.arange(7)[None]
    draw = {False: ".", True: "x"}
    masks = {
        window: [
            "".join(draw[bool(v)] for v in row)
            for row in visible(positions, positions, window=window, groups=groups)[0]
        ]
        for window in (None, 3)
    }
    assert masks[None] == ["x......", "xxx....", "xxx....", "xxxx...", "xxxxxx.", "xxxxxx.", "xxxxxxx"]
    assert masks[3] == ["x......", "xxx....", "xxx....", ".xxx...", "..xxxx.", "...xxx.", "....xxx"]


# --- shapes and bad input


@pytest.mark.parametrize("name", ["gemma3_4b", "gemma3_12b", "gemma3_27b"])
def test_published_sizes(name):
    with without_values():
        model = Gemma3ForConditionalGeneration(PRESETS[name])
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert shapes == weights.expected(PRESETS[name], "hf")
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters
    assert model.get_image_features(torch.empty(1, 3, 896, 896, device="meta")).shape == (
        1,
        256,
        PRESETS[name].hidden_size,
    )


def test_images_and_placeholders_are_counted(pair):
    ours, _ = pair
    ids = prompt(2)[None]
    with pytest.raises(PromptError, match="but 1 images came with 8 image tokens"):
        ours(ids, pixels(1))
    with pytest.raises(PromptError, match="no pixel_values"):
        ours(ids)
    with pytest.raises(PromptError, match="1 images came with 0"):
        ours(prompt(0)[None], pixels(1))
    cache = KVCache()
    ours(ids, pixels(2), kv_cache=cache)
    with pytest.raises(PromptError, match="no pixel_values"):
        ours(prompt(1, bos=False)[None], kv_cache=cache)


def test_features_of_another_shape_are_refused(pair):
    with pytest.raises(ShapeError, match=r"image_features: expected \[images of the batch, 4, 72\]"):
        pair[0](prompt(1)[None], image_features=torch.zeros(1, 5, 72))


def test_bad_configurations(pair):
    config = pair[0].config
    with pytest.raises(ConfigError, match="mm_tokens_per_image"):
        Gemma3ForConditionalGeneration(dataclasses.replace(config, mm_tokens_per_image=5))
    with pytest.raises(ConfigError, match="needs a `vision` tower"):
        Gemma3ForConditionalGeneration(dataclasses.replace(config, vision=None))


def test_gradients_reach_every_parameter():
    oracle, config = make("gemma3")
    model = load(Gemma3ForConditionalGeneration(our_config(config)), oracle)
    ids = prompt(1)[None]
    with torch.enable_grad():
        model(ids, pixels(1), labels=ids.masked_fill(ids == IMAGE, -100))["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
