"""`gm.nn.AnchoredPolicy` with its loader, and `gm.evals.SamplerEvaluator` without a trainer."""

import importlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm
from gemma.errors import DataError, DependencyError
from gemma.gm.evals import _sample  # the name itself is kauldron's class where kauldron is installed
from gemma.testing import ByteTokenizer

TASK = gm.data.Seq2SeqTask(
    in_prompt="q", in_response="a", out_input="prompt", out_target="gt", out_target_mask="m",
    tokenizer=ByteTokenizer(), max_length=40,
)  # fmt: skip
ROWS = [{"q": "one", "a": "un"}, {"q": "two", "a": "deux"}, {"q": "ten", "a": "dix"}]


class Bigram(nn.Module):
    """The smallest language model: the next token by the last one. It compiles in no time."""

    tokens: str = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        return self.param("table", nn.initializers.normal(), (13, 13))[tokens]

    def __kontext_keys__(self):
        return {"tokens": self.tokens}


@pytest.fixture(scope="module")
def policy():
    """A network, its wrapper, and the parameters of both."""
    model = Bigram()
    both = gm.nn.AnchoredPolicy(policy=model)
    params = both.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    return model, both, params


def test_anchored_policy_is_two_models(policy):
    model, both, params = policy
    assert set(params) == {"policy", "anchor"}
    assert jax.tree.structure(params["policy"]) == jax.tree.structure(params["anchor"])
    assert not np.array_equal(params["policy"]["table"], params["anchor"]["table"])  # parameters of its own
    tokens = jnp.array([[2, 5, 6], [2, 9, 0]])
    out = both.apply({"params": params}, tokens)
    assert isinstance(out, gm.nn.AnchoredPolicyOutput)
    for side in ("policy", "anchor"):
        np.testing.assert_array_equal(getattr(out, side), params[side]["table"][tokens])
    assert both.__kontext_keys__() == model.__kontext_keys__() and both.__kontext_keys__()["tokens"] == "batch.tokens"


def test_no_gradient_reaches_the_anchor(policy):
    _, both, params = policy
    tokens = jnp.array([[2, 5, 6]])

    def loss(params):
        out = both.apply({"params": params}, tokens)
        return jnp.sum(out.policy * out.anchor)

    gradient = jax.grad(loss)(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["anchor"]))
    assert np.any(gradient["policy"]["table"])


def test_an_anchor_may_be_another_model():
    model = gm.testing.DummyGemma(tokens="batch.tokens")
    both = gm.nn.AnchoredPolicy(policy=gm.nn.LoRA(rank=2, model=model), anchor=model)
    tree = jax.eval_shape(both.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    names = ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert any("lora" in name for name in names if name.startswith("policy/"))
    assert not any("lora" in name for name in names if name.startswith("anchor/"))
    assert gm.nn.AnchoredPolicy(policy=model) == gm.nn.AnchoredPolicy(policy=model)
    assert hash(gm.nn.AnchoredPolicy(policy=model)) == hash(gm.nn.AnchoredPolicy(policy=model))


def test_the_loader_fills_both():
    """The tree of the wrapper is the one that `AnchoredPolicyLoader` wants; real files are in tests/gm/ckpts."""
    both = gm.nn.AnchoredPolicy(policy=gm.testing.DummyGemma())
    shapes = jax.eval_shape(both.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    filled = jax.device_put(jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), shapes["policy"]))

    class Fill:
        def transform(self, state):
            assert jax.tree.structure(state["params"]) == jax.tree.structure(filled)
            return {"params": filled}

    empty = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    done = gm.ckpts.AnchoredPolicyLoader(policy=Fill()).transform({"params": empty})["params"]
    for side in ("policy", "anchor"):
        jax.tree.map(np.testing.assert_array_equal, done[side], filled)


class Parrot:
    """A sampler whose answers can be foretold; it keeps what it was asked."""

    def __init__(self, **fields):
        Parrot.last, self.asked = self, []
        self.fields = fields

    def sample(self, prompt, **keywords):
        self.asked.append((prompt, keywords))
        return [f"said {len(text)}" for text in prompt]


@pytest.fixture
def parrot(monkeypatch):
    monkeypatch.setattr(_sample, "Sampler", Parrot)


def evaluator(**fields):
    return _sample.SamplerEvaluator(**(dict(ds=ROWS, task=TASK, model=None, max_new_tokens=5) | fields))


def test_evaluator_samples_every_prompt(parrot):
    exact = lambda prompts, answers, truths: sum(a == t for a, t in zip(answers, truths))
    length = lambda prompts, answers, truths: max(map(len, truths))
    done = evaluator(batch_size=2, metrics={"exact": exact, "longest": length}).evaluate({"w": 1}, step=7)
    prompts = tuple(f"<start_of_turn>user\n{row['q']}<end_of_turn>\n<start_of_turn>model\n" for row in ROWS)
    assert done.prompt == prompts and done.gt == ("un<end_of_turn>", "deux<end_of_turn>", "dix<end_of_turn>")
    assert done.answer == tuple(f"said {len(p)}" for p in prompts)
    assert done.summaries == {"prompt": done.prompt, "answer": done.answer, "gt": done.gt}
    assert done.metrics == {"exact": 0.0, "longest": float(len("deux<end_of_turn>"))} and done.step == 7
    assert "step 7" in str(done) and "deux" in str(done)
    asked = Parrot.last.asked
    assert [len(prompt) for prompt, _ in asked] == [2, 1] and asked[0][1]["max_new_tokens"] == 5
    assert Parrot.last.fields["params"] == {"w": 1} and Parrot.last.fields["tokenizer"] is TASK.tokenizer


def test_evaluator_takes_states_and_every_kind_of_data_set(parrot):
    state = type("State", (), {"params": {"w": 2}})()
    assert len(evaluator(num_batches=2).evaluate(state)) == 2 and Parrot.last.fields["params"] == {"w": 2}

    class Applied(list):
        transforms = (TASK,)

    made = [gm.data.Seq2SeqTask(**{**vars(TASK), "sampling": True}).map(row) for row in ROWS]
    wanted = evaluator().evaluate({}).summaries
    for ds, task in ((made, TASK), (Applied(made), None), (iter(ROWS), TASK)):
        assert evaluator(ds=ds, task=task).evaluate({}).summaries == wanted
    kept = dict(TASK.__dict__) | dict(drop_inputs=False, sampling=True)
    both = [gm.data.Seq2SeqTask(**kept).map(row) for row in ROWS]  # raw and formatted texts: formatted once
    assert evaluator(ds=both).evaluate({}).summaries == wanted


def test_evaluator_reads_once_when_told(parrot):
    rows = iter(ROWS)
    keeps = evaluator(ds=rows, num_batches=2, cache=True)
    assert keeps.evaluate({}).summaries == keeps.evaluate({}).summaries
    assert next(rows) == ROWS[2]


def test_evaluator_refuses(parrot):
    with pytest.raises(ValueError, match="Can only cache if num_batches is set"):
        evaluator(cache=True)
    with pytest.raises(ValueError, match="Could not find a `Seq2SeqTask`"):
        evaluator(task=None).evaluate({})
    with pytest.raises(DataError, match="no elements"):
        evaluator(ds=[]).evaluate({})
    with pytest.raises(DataError, match="at least 1 as batch_size"):
        evaluator(batch_size=0)

    class Ids(list):
        transforms = (TASK,)

    with pytest.raises(DataError, match="give the data set's Seq2SeqTask sampling=True"):
        evaluator(ds=Ids([TASK.map(ROWS[0])])).evaluate({})


def test_fields_of_kauldron_say_what_they_need(monkeypatch):
    """Without kauldron its names are plain classes; a configuration written for it says what to install."""
    from gemma.gm.data._parquet import Parquet
    from gemma.gm.losses._official import DpoLoss, NpoLoss

    for wrong, names in (
        (lambda: evaluator(run=None, losses={}), "SamplerEvaluator with losses, run"),
        (lambda: Parquet("rows.parquet", shuffle=False, batch_size=2), "Parquet with batch_size, shuffle"),
        (lambda: DpoLoss(tokens="batch.targets", weight=2.0), "DpoLoss with weight"),
        (lambda: NpoLoss(normalize_by="mask"), "NpoLoss with normalize_by"),
    ):
        with pytest.raises(DependencyError, match=rf'{names} needs the package "kauldron": .*gemmakit\[kauldron\]'):
            wrong()
    with pytest.raises(TypeError, match="unexpected keyword argument 'runs'"):
        evaluator(runs=None)
    monkeypatch.setitem(sys.modules, "kauldron", None)
    monkeypatch.delitem(sys.modules, "gemma.gm._kauldron", raising=False)
    with pytest.raises(DependencyError, match=r"importing kauldron failed: .*gemmakit\[kauldron\]"):
        importlib.import_module("gemma.gm._kauldron")


@pytest.mark.slow
def test_evaluator_with_a_real_sampler():
    loaded = gm.testing.tiny_model()
    asks = evaluator(model=loaded.model, ds=ROWS[:1], max_new_tokens=2, cache_length=64, pad_length=64)
    done = asks.evaluate(loaded.params)
    sampler = gm.text.Sampler(
        model=loaded.model, params=loaded.params, tokenizer=ByteTokenizer(), cache_length=64, pad_length=64
    )
    assert done.answer == (sampler.sample(done.prompt[0], max_new_tokens=2),)
