"""examples/kauldron_seq2seq.py: its configuration resolves, and trains when its model is made tiny."""

import importlib.util
import json
from pathlib import Path

import kauldron_tiny
import optax
import pytest
from kauldron import konfig

from gemma import gm

pytestmark = [pytest.mark.kauldron, pytest.mark.filterwarnings("default")]

EXAMPLE = Path(__file__).parents[2] / "examples/kauldron_seq2seq.py"


@pytest.fixture(scope="module")
def config():
    spec = importlib.util.spec_from_file_location("kauldron_seq2seq", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_the_example_is_a_configuration(config):
    made = konfig.resolve(konfig.ConfigDict(json.loads(config.to_json())).model)
    assert made == gm.nn.Gemma3_270M(tokens="batch.input")
    rows = json.loads(EXAMPLE.with_suffix(".json").read_text())
    assert len(rows) == 16 and all(set(row) == {"question", "answer"} for row in rows)


def test_the_example_trains(config, tmp_path):
    gm.ckpts.save_params(kauldron_tiny.params_of(), tmp_path / "base")
    config.model = konfig.ConfigDict(kauldron_tiny.tiny.TinyGemma(tokens="batch.input"))
    config.init_transform.path = str(tmp_path / "base")
    bytewise = kauldron_tiny.doubles.ByteTokenizer()
    for ds in (config.train_ds, config.evals.sampling.ds):
        ds.transforms[0].tokenizer = bytewise
    config.workdir, config.num_train_steps = str(tmp_path / "run"), 2
    config.checkpointer.save_interval_steps = 2
    config.evals.sampling.run = kauldron_tiny.kd.evals.EveryNSteps(2)
    state, _ = konfig.resolve(config).train()
    assert int(state.step) == 3  # kauldron's loop ends with step number 2, and updates after it
    assert optax.tree.norm(gm.ckpts.load_params(tmp_path / "run/checkpoints/ckpt_2")) > 0
