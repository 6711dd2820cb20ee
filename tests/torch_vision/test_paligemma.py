# SPDX-License-Identifier: Apache-2.0
"""PaliGemma 1 and 2 in PyTorch against Hugging Face's oracles: full and cached, padded, with suffixes and labels."""

import pytest
import torch
from hf_tiny_oracles import BUILD, make, randomize
from torch_vision_oracles import load, our_config

from gemma.errors import ConfigError, PromptError, ShapeError
from gemma.hf_config import read_config
from gemma.modeling_gemma import KVCache
from gemma.sampling import SamplingParams
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

TOLERANCE = 2e-5  # float32, logits of order 1; the noise floor of such comparisons is 1e-6 to 4e-6
IMAGE, S = 310, 16
FAMILIES = [
    pytest.param(f"paligemma{n}", marks=pytest.mark.supports(f"PaliGemma {n}", "PyTorch", "run")) for n in (1, 2)
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    oracle, config = make(request.param)
    return load(PaliGemmaForConditionalGeneration(our_config(config)), oracle), oracle


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def batch(images=1, prefix=(6, 3), suffix=(4, 6), side="left", seed=0):
    """Rows of different lengths: image tokens, bos, prefix, newline, suffix; labels on the suffix."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for before, after in zip(prefix, suffix):
        text = torch.randint(3, 290, (before + after,), generator=g)
        ids = torch.cat(
            [torch.full((images * S,), IMAGE), torch.tensor([2]), text[:before], torch.tensor([108]), text[before:]]
        )
        types = torch.zeros_like(ids)
        types[len(ids) - after :] = 1
        rows.append((ids, types))
    T = max(len(ids) for ids, _ in rows)
    out = {
        name: torch.zeros(len(rows), T, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for at, (ids, types) in enumerate(rows):
        part = slice(T - len(ids), T) if side == "left" else slice(0, len(ids))
        out["input_ids"][at, part], out["token_type_ids"][at, part] = ids, types
        out["attention_mask"][at, part] = 1
    pixels = torch.randn(images * len(rows), 3, 56, 56, generator=g)
    return out | dict(pixel_values=pixels)


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)


def difference(ours, theirs, inputs):
    real = inputs["attention_mask"].bool()
    return (ours - theirs)[real].abs().max()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("suffix", [(0, 0), (4, 6)])
def test_full_pass_equals_hugging_face(pair, images, side, suffix):
    ours, oracle = pair
    inputs = batch(images, suffix=suffix, side=side)
    expected = oracle(**inputs).logits
    assert expected.std() > 0.1
    assert difference(ours(**inputs)["logits"], expected, inputs) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_equals_hugging_face(pair, side):
    """Theirs averages over all labelled tokens of the batch."""
    ours, oracle = pair
    inputs = batch(side=side)
    labels = labels_of(inputs)
    expected = oracle(**inputs, labels=labels).loss
    out = ours(**inputs, labels=labels)
    assert out["logits"] is None and abs(out["loss"] - expected) < TOLERANCE
    assert abs(ours(**inputs, labels=labels, logits_to_keep=1)["loss"] - expected) < TOLERANCE
    inputs.pop("token_type_ids")  # the suffix begins at the first label
    assert abs(ours(**inputs, labels=labels)["loss"] - expected) < TOLERANCE


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_one_full_pass(pair, images, side):
    """Prompts of different lengths, then four tokens one by one, against Hugging Face's pass over everything."""
    ours, oracle = pair
    inputs = batch(images, suffix=(0, 0), side=side)
    more = torch.randint(3, 290, (2, 4), generator=torch.Generator().manual_seed(5))
    cache = KVCache()
    logits = [ours(**inputs, kv_cache=cache)["logits"]]
    mask = inputs["attention_mask"]
    for at in range(4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = dict(input_ids=more[:, at : at + 1], attention_mask=mask, pixel_values=inputs["pixel_values"])
        logits.append(ours(**step, kv_cache=cache)["logits"])
    for row in range(2):  # their reference: each row alone, without padding
        real = inputs["attention_mask"][row].bool()
        ids = torch.cat([inputs["input_ids"][row][real], more[row]])[None]
        types = torch.zeros_like(ids)
        types[:, -4:] = 1
        pixels = inputs["pixel_values"][row * images : (row + 1) * images]
        expected = oracle(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        mine = torch.cat([logits[0][row][real], *(step[row] for step in logits[1:])])
        assert (mine - expected.logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_that_is_asked_for_is_hugging_faces(side):
    """Theirs cuts the suffix on every second layer, not the prompt; the default has no window at all."""
    import transformers

    cls, config = BUILD["paligemma2"]()
    config = transformers.PaliGemmaConfig.from_dict(config.to_dict())
    config.text_config.sliding_window = 7
    oracle = randomize(cls._from_config(config, attn_implementation="eager"))
    inputs = batch(side=side)
    windowed = read_config(config.to_dict() | dict(model_type="paligemma"), paligemma_window=True)
    assert windowed.text_config.sliding_window == 7
    ours = load(PaliGemmaForConditionalGeneration(windowed), oracle)
    expected = oracle(**inputs).logits
    assert difference(ours(**inputs)["logits"], expected, inputs) < TOLERANCE
    free = load(PaliGemmaForConditionalGeneration(our_config(config)), oracle)
    assert difference(free(**inputs)["logits"], expected, inputs) > 10 * TOLERANCE
    T = inputs["input_ids"].shape[1]
    prompt = batch(suffix=(0, 0), side=side)
    new = ours.generate(**prompt, max_new_tokens=5, end_ids=())
    assert new[:, -5:].tolist() == greedy(ours, prompt, 5) and T > 7


def test_batched_equals_alone(pair):
    ours, _ = pair
    inputs = batch(suffix=(0, 0))
    together = ours(**inputs)["logits"]
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = ours(inputs["input_ids"][row][real][None], inputs["pixel_values"][row : row + 1])["logits"]
        assert (together[row][real] - alone[0]).abs().max() < TOLERANCE


def test_images_of_the_batch_go_to_their_rows(pair):
    """Rows with one and with two images: exchanging pictures must change exactly the rows that hold them."""
    ours, _ = pair
    one, two = batch(1, prefix=(5,), suffix=(0,)), batch(2, prefix=(5,), suffix=(0,))
    T = two["input_ids"].shape[1]
    pad = T - one["input_ids"].shape[1]
    ids = torch.cat([torch.nn.functional.pad(one["input_ids"], (pad, 0)), two["input_ids"]])
    mask = (ids != 0).long()
    pixels = torch.randn(3, 3, 56, 56)
    first = ours(ids, pixels, mask)["logits"]
    second = ours(ids, pixels[[0, 2, 1]], mask)["logits"]
    assert torch.equal(first[0, pad:], second[0, pad:]) and (first[1] - second[1]).abs().max() > 1e-2


# --- the tower runs once


def count_tower_runs(model, monkeypatch):
    runs, tower = [], type(model.model.vision_tower)
    forward = tower.forward

    def counted(self, pixel_values):
        runs.append(pixel_values.shape[0])
        return forward(self, pixel_values)

    monkeypatch.setattr(tower, "forward", counted)
    return runs


def test_the_tower_runs_once_per_image(pair, monkeypatch):
    ours, _ = pair
    runs = count_tower_runs(ours, monkeypatch)
    inputs = batch(suffix=(0, 0))
    cache = KVCache()
    ours(**inputs, kv_cache=cache)
    for _ in range(3):
        ours(input_ids=torch.full((2, 1), 7), pixel_values=inputs["pixel_values"], kv_cache=cache)
    assert runs == [2]
    runs.clear()
    new = ours.generate(**inputs, max_new_tokens=5, end_ids=())
    assert runs == [2] and new.shape[1] == inputs["input_ids"].shape[1] + 5


def test_features_may_be_computed_once_for_several_questions(pair, monkeypatch):
    ours, _ = pair
    inputs = batch(suffix=(0, 0))
    expected = ours(**inputs)["logits"]
    features = ours.get_image_features(inputs.pop("pixel_values"))
    assert features.shape == (2, S, 72)
    runs = count_tower_runs(ours, monkeypatch)
    assert torch.equal(ours(**inputs, image_features=features)["logits"], expected) and not runs


# --- generating


def greedy(model, inputs, steps):
    """The readable reference: the whole sequence again for every token, one row at a time."""
    rows = []
    for row in range(inputs["input_ids"].shape[0]):
        real = inputs["attention_mask"][row].bool()
        ids, types = inputs["input_ids"][row][real], torch.zeros(int(real.sum()), dtype=torch.long)
        new = []
        for _ in range(steps):
            out = model(ids[None], inputs["pixel_values"][row : row + 1], token_type_ids=types[None])["logits"][0, -1]
            out[IMAGE] = -torch.inf
            new.append(int(out.argmax()))
            ids, types = torch.cat([ids, torch.tensor(new[-1:])]), torch.cat([types, torch.ones(1, dtype=torch.long)])
        rows.append(new)
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_the_whole_sequence_again(pair, side):
    ours, _ = pair
    inputs = batch(suffix=(0, 0), side=side)
    expected = greedy(ours, inputs, 6)
    T = inputs["input_ids"].shape[1]
    for options in (dict(temperature=0.0), dict(params=SamplingParams(temperature=0.0, max_new_tokens=9))):
        ids = ours.generate(**inputs, max_new_tokens=6, end_ids=(), **options)
        assert torch.equal(ids[:, :T], inputs["input_ids"]) and ids[:, T:].tolist() == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_one_full_pass(pair, side):
    """Prompts of different lengths, padded on one side, and five tokens after them."""
    ours, oracle = pair
    inputs = batch(suffix=(0, 0), side=side)
    T = inputs["input_ids"].shape[1]
    answers = torch.randint(3, 290, (2, 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([inputs["input_ids"], answers], 1)
    scores = ours.score(ids, T, inputs["pixel_values"], attention_mask=inputs["attention_mask"])
    for row in range(2):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        alone = torch.cat([prompt, answers[row]])[None]
        types = torch.zeros_like(alone)
        types[:, -5:] = 1
        logits = oracle(
            input_ids=alone, token_type_ids=types, pixel_values=inputs["pixel_values"][row : row + 1]
        ).logits
        expected = logits[0, -6:-1].log_softmax(-1).gather(1, answers[row][:, None])[:, 0]
        assert (scores[row] - expected).abs().max() < TOLERANCE
    inputs["input_ids"] = ids
    with pytest.raises(ShapeError, match="prompt_length"):
        ours.score(inputs["input_ids"], T + 5, inputs["pixel_values"])


def test_generate_never_writes_an_image_token(pair):
    ours, _ = pair
    inputs = batch(suffix=(0, 0))
    embedding = ours.get_input_embeddings().weight
    before = embedding[IMAGE].clone()
    try:
        embedding[IMAGE] = embedding[5] * 50  # whatever the activations are, one of two signs makes it the largest
        for sign in (1, -1):
            embedding[IMAGE] *= sign
            ids = ours.generate(**inputs, max_new_tokens=4, end_ids=())
            assert IMAGE not in ids[:, inputs["input_ids"].shape[1] :]
    finally:
        embedding[IMAGE] = before


# --- mutations: each must be seen by the comparison above


def scaled_features(model, monkeypatch):
    project = model.model.multi_modal_projector.forward
    monkeypatch.setattr(model.model.multi_modal_projector, "forward", lambda x: project(x) * 72**-0.5)


def causal_prompt(model, monkeypatch):
    monkeypatch.setattr(model, "groups", lambda input_ids, here, call: torch.zeros_like(input_ids))


def label_leak(model, monkeypatch):
    monkeypatch.setattr(model, "groups", lambda input_ids, here, call: torch.ones_like(input_ids))


def two_groups(model, monkeypatch):
    """Image and prompt apart: the image no longer sees the question."""
    monkeypatch.setattr(model, "groups", lambda i, here, call: torch.where(here, 1, 2) * (call["token_type_ids"] == 0))


def columns_first(model, monkeypatch):
    project = model.model.multi_modal_projector.forward
    monkeypatch.setattr(
        model.model.multi_modal_projector,
        "forward",
        lambda x: project(x).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2),
    )


def scaled_embeddings_twice(model, monkeypatch):
    embed = model.model.language_model.embed_tokens.forward
    monkeypatch.setattr(model.model.language_model.embed_tokens, "forward", lambda ids: embed(ids) * 72**0.5)


@pytest.mark.parametrize(
    "break_it", [scaled_features, causal_prompt, label_leak, two_groups, columns_first, scaled_embeddings_twice]
)
def test_mutations_are_seen(pair, monkeypatch, break_it):
    ours, oracle = pair
    inputs = batch()
    break_it(ours, monkeypatch)
    assert difference(ours(**inputs)["logits"], oracle(**inputs).logits, inputs) > 10 * TOLERANCE


def test_no_label_leaks(pair):
    """Changing a suffix token may change what comes after it, and nothing before."""
    ours, _ = pair
    inputs = batch(side="right")
    before = ours(**inputs)["logits"]
    T = int(inputs["attention_mask"][0].sum())
    changed = inputs["input_ids"].clone()
    changed[0, T - 2] = 99
    after = ours(**(inputs | dict(input_ids=changed)))["logits"]
    assert torch.equal(before[0, : T - 2], after[0, : T - 2])
    assert (before[0, T - 2 : T] - after[0, T - 2 : T]).abs().min(-1).values.min() >= 0
    assert (before[0, T - 1] - after[0, T - 1]).abs().max() > 1e-3
    with pytest.raises(PromptError, match="read the answer"):
        ours(**inputs | dict(token_type_ids=inputs["token_type_ids"] * 0), labels=labels_of(inputs))


def test_the_prompt_sees_itself_both_ways(pair):
    ours, _ = pair
    inputs = batch(side="right")
    before = ours(**inputs)["logits"]
    changed = inputs["input_ids"].clone()
    changed[0, S + 4] = 99  # a prompt token
    after = ours(**(inputs | dict(input_ids=changed)))["logits"]
    assert (before[0, :S] - after[0, :S]).abs().amax(-1).min() > 1e-5  # every image token has seen it


# --- bad input


def test_images_and_placeholders_are_counted(pair):
    ours, _ = pair
    inputs = batch(suffix=(0, 0))
    with pytest.raises(PromptError, match="2 images came with 32|but 3 images came with 32"):
        ours(inputs["input_ids"], torch.zeros(3, 3, 56, 56), inputs["attention_mask"])
    with pytest.raises(PromptError, match="32 image tokens .id 310., but no pixel_values"):
        ours(inputs["input_ids"], None, inputs["attention_mask"])
    with pytest.raises(PromptError, match="1 images came with 0 image tokens"):
        ours(torch.tensor([[2, 5, 6]]), torch.zeros(1, 3, 56, 56))
    short = torch.cat([torch.full((1, S - 1), IMAGE), torch.tensor([[2, 5]])], 1)
    with pytest.raises(PromptError, match="expected 16 image tokens"):
        ours(short, torch.zeros(1, 3, 56, 56))
    split = torch.full((1, S + 1), IMAGE)
    split[0, 4] = 5
    with pytest.raises(PromptError, match="next to each other"):
        ours(split, torch.zeros(1, 3, 56, 56))
    uneven = torch.full((2, S), IMAGE)
    uneven[0, 0] = 5
    with pytest.raises(PromptError, match="15, 16 by prompt"):
        ours(uneven, torch.zeros(2, 3, 56, 56))


@pytest.mark.parametrize("token", [-1, 320, 257152])
def test_ids_outside_of_the_vocabulary_are_refused(pair, token):
    with pytest.raises(PromptError, match=f"ids in 0..319, got {token}"):
        pair[0](torch.tensor([[2, token]]))


def test_a_new_image_on_a_filled_cache_is_counted_too(pair):
    ours, _ = pair
    inputs = batch(prefix=(4,), suffix=(0,))
    cache = KVCache()
    ours(**inputs, kv_cache=cache)
    with pytest.raises(PromptError, match="expected 16 image tokens"):
        ours(torch.tensor([[IMAGE, 5]]), inputs["pixel_values"], kv_cache=cache)
    more = torch.cat([torch.full((1, S), IMAGE), torch.tensor([[5, 6]])], 1)
    assert torch.isfinite(ours(more, torch.zeros(1, 3, 56, 56), kv_cache=cache)["logits"]).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(input_ids=torch.zeros(2, 0, dtype=torch.long)), "input_ids"),
        (dict(input_ids=torch.zeros(2, 3)), "input_ids"),
        (dict(input_ids=torch.zeros(5, dtype=torch.long)), "input_ids"),
        (dict(token_type_ids=torch.zeros(2, 3, dtype=torch.long)), "token_type_ids"),
        (dict(labels=torch.zeros(2, 3, dtype=torch.long)), "labels"),
        (dict(pixel_values=torch.zeros(3, 56, 56)), "pixel_values"),
        (dict(pixel_values=torch.zeros(2, 3, 28, 28)), "pixel_values"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask"),
    ],
)
def test_bad_shapes(pair, changes, match):
    with pytest.raises(ShapeError, match=match):
        pair[0](**batch() | changes)


def test_bad_configurations():
    import dataclasses

    config = our_config(make("paligemma1")[1])
    with pytest.raises(ConfigError, match="projection_dim"):
        PaliGemmaForConditionalGeneration(dataclasses.replace(config, projection_dim=71))
    head = dataclasses.replace(config.vision_config, vision_use_head=True)
    with pytest.raises(ConfigError, match="no pooling head"):
        PaliGemmaForConditionalGeneration(dataclasses.replace(config, vision_config=head))


def test_the_published_image_token_lies_past_the_training_tables_rows(pair):
    """big_vision's table ends before the placeholder: its id is never looked up."""
    ours, _ = pair
    inputs = batch(suffix=(0, 0))
    expected = ours(**inputs)["logits"]
    row = ours.get_input_embeddings().weight[IMAGE]
    before = row.clone()
    row.fill_(torch.nan)
    try:
        assert torch.equal(ours(**inputs)["logits"][..., :IMAGE], expected[..., :IMAGE])
    finally:
        row.copy_(before)
