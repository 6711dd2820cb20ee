# SPDX-License-Identifier: Apache-2.0
"""UL2, span corruption and PrefixLM: what is hidden, where it goes, and that nothing is lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma import testing
from gemma.errors import ConfigError, PromptError, TokenizerError
from gemma.gm import data
from gemma.gm.data import _span_corruption as spans
from gemma.seq2seq import IGNORED, make_targets

MARKS = tuple(range(1000, 1099))


class Words(testing.ByteTokenizer):
    """A byte tokenizer that knows the unused tokens of the real vocabularies."""

    def id_of(self, piece: str) -> int:
        if piece.startswith("<unused"):
            return 1000 + int(piece[7:-1])
        raise TokenizerError(f"no piece {piece!r}")


def whole(inputs: list[int], target: list[int]) -> list[int]:
    """The text again: each mark of the input replaced by what follows it in the target."""
    hidden: dict[int, list[int]] = {}
    for token in target:
        if token >= 1000:
            hidden[token] = []
        else:
            hidden[max(hidden)].append(token)
    return [t for token in inputs for t in (hidden[token] if token >= 1000 else [token])]


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3), (0.5, 3), (0.15, 64), (0.5, 1), (0.99, 2), (0.01, 8)])
def test_spans(rate, mean):
    for seed, length in enumerate((2, 3, 10, 57, 400)):
        rng = np.random.default_rng(seed)
        mask = spans.span_mask(length, rate, mean, rng)
        hidden, number = spans.counts(length, rate, mean)
        assert mask.shape == (length,) and mask.sum() == hidden == min(max(round(length * rate), 1), length - 1)
        assert not mask[0] and (np.diff(mask.astype(int)) == 1).sum() == number <= 99
        ids = list(range(length))
        inputs, target = spans.corrupt(ids, mask, MARKS)
        assert whole(inputs, target) == ids
        assert len(inputs) == length - hidden + number and len(target) == hidden + number
        marks = [t for t in inputs if t >= 1000]
        assert marks == [t for t in target if t >= 1000] == sorted(marks)


def test_a_known_example():
    mask = np.array([0, 0, 1, 1, 0, 0, 1, 0], bool)
    inputs, target = spans.corrupt([5, 6, 7, 8, 9, 10, 11, 12], mask, MARKS)
    assert inputs == [5, 6, 1000, 9, 10, 1001, 12] and target == [1000, 7, 8, 1001, 11]


def test_every_token_is_hidden_about_equally_often():
    rng = np.random.default_rng(0)
    mean = np.mean([spans.span_mask(40, 0.25, 2, rng) for _ in range(2000)], axis=0)
    assert abs(mean.mean() - 0.25) < 1e-9
    assert mean[3:-3].min() > 0.19 and mean[:-3].max() < 0.28 and mean[0] == 0
    assert mean[-1] == 1  # shown and hidden parts take turns, so that a text ends with a hidden one, as in T5


def test_prefix_lm():
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(500):
        inputs, target = spans.prefix_lm(range(100), 0.5, rng, 200, 200)
        assert [*inputs, *target] == list(range(100)) and inputs and target
        shares.append(len(target) / 100)
    assert abs(np.mean(shares) - 0.5) < 0.05
    inputs, target = spans.prefix_lm(range(100), 0.5, rng, 10, 7)
    assert len(inputs) <= 10 and len(target) <= 7 and target[0] == inputs[-1] + 1


def test_ul2_makes_examples():
    task = data.UL2Task(tokenizer=Words(), max_input_length=48, max_target_length=40, prefixes=True)
    text = "the quick brown fox jumps over the lazy dog, again and again and again"
    seen = set()
    for seed in range(60):
        one, two = (task({"text": text, "id": 7}, np.random.default_rng(seed)) for _ in range(2))
        assert one["id"] == 7 and "text" not in one
        for key in ("input_tokens", "target_tokens", "labels"):
            np.testing.assert_array_equal(one[key], two[key])  # everything random comes from the generator
        assert one["input_tokens"].shape == (48,) and one["labels"].shape == (40,)
        assert one["input_tokens"][0] == 2 and one["target_tokens"][0] == 2
        labels = one["labels"][one["labels"] != IGNORED]
        assert labels[-1] == 1 and (labels[:-1] == one["target_tokens"][1 : len(labels)]).all()
        seen.add(Words().decode([int(i) for i in one["input_tokens"][1:6]]))
    assert seen == {"[NLU]", "[NLG]", "[S2S]"}
    assert task.random_map({"text": text}, np.random.default_rng(0))["labels"].shape == (40,)


def test_tasks_of_one_kind():
    ids = np.arange(20, 60)
    out = data.SpanCorruptionTask(tokenizer=Words(), bos=False)({"text": ids}, np.random.default_rng(3))
    target = [int(i) for i in out["labels"] if i not in (IGNORED, 1)]
    assert whole([int(i) for i in out["input_tokens"] if i], target) == ids.tolist()
    out = data.PrefixLMTask(tokenizer=Words(), bos=False)({"text": ids}, np.random.default_rng(3))
    joined = [*out["input_tokens"], *out["labels"]]
    assert [int(i) for i in joined if i not in (0, 1, IGNORED)] == ids.tolist()


def test_bad_input():
    rng = np.random.default_rng(0)
    task = data.UL2Task(tokenizer=testing.ByteTokenizer(), denoisers=(data.Denoiser(3, 0.5),), sentinels=(5, 6))
    assert 5 in task({"text": "a longer text"}, rng)["input_tokens"]
    with pytest.raises(PromptError, match="expected the key 'text'"):
        task({"prompt": "a"}, rng)
    with pytest.raises(PromptError, match="at least two tokens, got 1"):
        task({"text": "a"}, rng)
    assert data.PrefixLMTask(tokenizer=Words())({"text": b"a longer text"}, rng)["labels"].size  # as TensorFlow has it
    with pytest.raises(PromptError, match="expected UTF-8"):
        task({"text": b"a\xff"}, rng)
    with pytest.raises(PromptError, match="expected a text or its ids, got float"):
        task({"text": 0.5}, rng)
    with pytest.raises(PromptError, match="holds padding"):
        task({"text": [20, 21, 0, 0]}, rng)
    with pytest.raises(ConfigError, match="sentinels: expected at least one mark, all different"):
        dataclasses.replace(task, sentinels=())
    for length in (5, 6):  # bos and the five bytes of the prefix
        said = data.UL2Task(
            tokenizer=Words(), denoisers=data.UL2_DENOISERS[2:3], prefixes=True, max_input_length=length
        )
        with pytest.raises(ConfigError, match=f"max_input_length: {length} leave no room"):
            said({"text": "a longer text"}, rng)
    with pytest.raises(PromptError, match="the text holds token 5"):
        task({"text": [5, 20, 21, 22, 23, 24]}, rng)
    with pytest.raises(TokenizerError, match="has no <unused0>"):
        dataclasses.replace(task, sentinels=None, tokenizer=Words.__new__(NoUnused))._marks()
    with pytest.raises(ConfigError, match="rate"):
        data.Denoiser(3, 1.5)
    with pytest.raises(ConfigError, match="denoisers"):
        data.UL2Task(tokenizer=Words(), denoisers=())


class NoUnused(testing.ByteTokenizer):
    def id_of(self, piece: str) -> int:
        raise TokenizerError(f"no piece {piece!r}")


def test_targets_of_three_tokens():
    """The decoder reads bos and the text, and says the text and eos: shifted once."""
    made = make_targets([[5, 6, 7], [8]])
    assert made.target_tokens.tolist() == [[2, 5, 6, 7], [2, 8, 0, 0]]
    assert made.labels.tolist() == [[5, 6, 7, 1], [8, 1, IGNORED, IGNORED]]
    for bad in ([[]], [[5, 0]], [[2, 5]], []):
        with pytest.raises(PromptError):
            make_targets(bad)
    with pytest.raises(PromptError, match="needs 4 places"):
        make_targets([[5, 6, 7]], 3)
