"""Which classes are kauldron's where it is installed, and that nothing imports it before one of them is used."""

import dataclasses
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import kauldron_tiny
import numpy as np
import pytest
from kauldron import kd, konfig, kontext

from gemma import gm
from gemma.errors import DataError
from gemma.gm.data import _parquet
from gemma.gm.evals import _sample
from gemma.gm.losses import _official

pytestmark = [pytest.mark.kauldron, pytest.mark.filterwarnings("default")]


def test_kauldron_waits_for_its_first_use():
    """Every public name but four leaves it alone, though it is installed."""
    code = (
        "import sys\nimport gemma\nfrom gemma import gm, peft\nimport gemma.cli.__main__\n"
        "kept = {'DpoLoss', 'NpoLoss', 'Parquet', 'SamplerEvaluator'}\n"
        "seen = 0\n"
        "for package in [peft, *(getattr(gm, name) for name in dir(gm))]:\n"
        "    for name in set(dir(package)) - kept:\n"
        "        getattr(package, name)\n"
        "        seen += 1\n"
        "print(seen > 100, 'kauldron' in sys.modules, 'tensorflow' in sys.modules)\n"
        "gm.losses.DpoLoss\nprint('kauldron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False", "True"]


def test_base_classes():
    assert issubclass(gm.losses.DpoLoss, kd.losses.Loss) and issubclass(gm.losses.NpoLoss, kd.losses.Loss)
    assert issubclass(gm.evals.SamplerEvaluator, kd.evals.EvaluatorBase)
    assert issubclass(gm.data.Parquet, kd.data.py.DataSourceBase)
    loss = gm.losses.DpoLoss(tokens="a", sequence_mask="b", policy_logits="c", anchor_logits="d", weight=2.0)
    assert kontext.get_keypaths(loss) == dict(
        tokens="a", sequence_mask="b", policy_logits="c", anchor_logits="d", mask=None, step="step"
    )
    assert (loss.tau, loss.label_smoothing, gm.losses.NpoLoss().tau) == (0.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        (gm.losses.DpoLoss, _official.DpoLoss),
        (gm.losses.NpoLoss, _official.NpoLoss),
        (gm.data.Parquet, _parquet.Parquet),
        (gm.evals.SamplerEvaluator, _sample.SamplerEvaluator),
    ],
)
def test_plain_forms_know_the_fields_that_they_lack(form, plain):
    asked, has = (
        {field.name: field.default for field in dataclasses.fields(cls) if field.init and field.name[0] != "_"}
        for cls in (form, plain)
    )
    assert asked.keys() - has.keys() == plain.KAULDRON_FIELDS
    filled = {"ds", "model"}  # from the trainer's configuration
    for name in asked.keys() & has.keys() - filled:
        assert asked[name] == has[name]


def test_models_say_where_their_inputs_are():
    model = kauldron_tiny.TinyGemma(tokens="batch.input", images="batch.image")
    keys = dict(tokens="batch.input", images="batch.image", positions=None, attention_mask=None)
    for wrapped in (
        model,
        gm.nn.LoRA(rank=2, model=model),
        gm.nn.QuantizationAwareWrapper(method="INT4", model=model),
        gm.nn.IntWrapper(model=model),
        gm.nn.AnchoredPolicy(policy=model),
    ):
        assert kontext.get_keypaths(wrapped) == keys
    with pytest.raises(ValueError, match="REQUIRED|tokens"):
        kontext.resolve_from_keyed_obj({"batch": {}}, kauldron_tiny.TinyGemma())


def test_losses_give_the_plain_values():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (3, 2, 5))
    mask = rng.random((3, 2, 5)) < 0.7
    policy, anchor = (jnp.asarray(rng.standard_normal((3, 2, 5, 7)), jnp.float32) for _ in range(2))
    arguments = dict(
        tokens=jnp.asarray(tokens), sequence_mask=jnp.asarray(mask), policy_logits=policy, anchor_logits=anchor
    )

    def gain(logits):
        logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)[..., 0]
        return (logp * mask).sum(-1)

    delta = 0.3 * np.subtract(*np.moveaxis(gain(policy) - gain(anchor), -1, 0))
    wanted = -(0.9 * np.log(1 / (1 + np.exp(-delta))) + 0.1 * np.log(1 / (1 + np.exp(delta))))
    loss = gm.losses.DpoLoss(tau=0.3, label_smoothing=0.1)
    np.testing.assert_allclose(loss.get_values(**arguments)[:, 0], wanted, rtol=1e-5)
    plain = _official.DpoLoss(tau=0.3, label_smoothing=0.1).get_values(**arguments)
    np.testing.assert_array_equal(loss.get_values(**arguments), plain)
    assert float(loss(**arguments)) == pytest.approx(wanted.mean(), rel=1e-5)
    half = loss.get_state(**arguments, mask=jnp.array([[1.0], [0.0], [1.0]])).compute()
    assert float(half) == pytest.approx(wanted[[0, 2]].mean(), rel=1e-5)

    one = dict(tokens=jnp.asarray(tokens[:, 0, :, None]), sequence_mask=jnp.asarray(mask[:, 0, :, None]))
    one |= dict(policy_logits=policy[:, 0], anchor_logits=anchor[:, 0])
    away = np.log1p(np.exp(0.5 * (gain(policy) - gain(anchor))[:, 0]))
    np.testing.assert_allclose(gm.losses.NpoLoss(tau=0.5).get_values(**one)[:, 0], away, rtol=1e-5)


def test_configurations_are_text_and_come_back(tmp_path):
    config = kauldron_tiny.dpo(tmp_path, "rows.json", "checkpoint")
    again = konfig.ConfigDict(json.loads(config.to_json()))
    assert again == config and "gemma" in config.to_json()
    loss = konfig.resolve(again.train_losses["loss"])
    assert type(loss) is gm.losses.DpoLoss and loss.tokens == "batch.targets"
    model = konfig.resolve(again.model)
    assert model == gm.nn.AnchoredPolicy(policy=kauldron_tiny.TinyGemma(tokens="batch.tokens"))


def test_parquet_pipeline(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "n": [1, 2, 3]}), tmp_path / "rows.parquet")
    ds = gm.data.Parquet(
        str(tmp_path / "rows.parquet"),
        shuffle=False,
        num_epochs=1,
        batch_size=2,
        num_workers=0,
        batch_drop_remainder=False,
        seed=0,
        transforms=[gm.data.MapInts(key="n", old_to_new={1: 10, 2: 20, 3: 30})],
    )
    assert [batch["n"].tolist() for batch in ds] == [[10, 20], [30]] and len(ds) == 2
    assert pickle.loads(pickle.dumps(ds.data_source))[1] == {"text": "b", "n": 2}


def test_the_evaluator_says_what_it_needs(tmp_path):
    run = kd.evals.EveryNSteps(2)
    with pytest.raises(ValueError, match="Can only cache if num_batches is set"):
        gm.evals.SamplerEvaluator(run=run, max_new_tokens=2, cache=True)
    path = kauldron_tiny.write_json(tmp_path, [{"src": "a", "dst": "b"}])
    bare = kd.data.py.Json(path=path, shuffle=False, batch_size=None, transforms=[])
    with pytest.raises(DataError, match="Could not find a `Seq2SeqTask`"):
        _ = gm.evals.SamplerEvaluator(run=run, max_new_tokens=2, ds=bare)._task
    memory = kd.data.InMemoryPipeline(batch_size=1, loader=dict)
    with pytest.raises(ValueError, match="only supports `PyGrainPipeline`"):
        _ = gm.evals.SamplerEvaluator(run=run, max_new_tokens=2, ds=memory)._task


def test_plain_evaluator_reads_kauldrons_data_set(tmp_path):
    path = kauldron_tiny.write_json(tmp_path, [{"src": "a", "dst": "b"}])
    ds = konfig.resolve(kauldron_tiny.seq2seq_ds(path, sampling=True))
    evaluator = _sample.SamplerEvaluator(
        ds=ds, model=kauldron_tiny.TinyGemma(), max_new_tokens=2, cache_length=128, pad_length=64
    )
    done = evaluator.evaluate(kauldron_tiny.params_of())
    assert done.gt == ("b<end_of_turn>",) and len(done.answer) == 1
