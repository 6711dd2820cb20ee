"""The configurations of the official examples, resolved and trained by the real kauldron, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kauldron_tiny
import numpy as np
import optax
import pytest
from kauldron import kd, konfig

import gemma
from gemma import gm, peft
from gemma.errors import CheckpointError
from gemma.testing import ByteTokenizer

pytestmark = [
    pytest.mark.kauldron,
    pytest.mark.filterwarnings("default"),  # kauldron's own
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A base model, saved by us in the layout of released checkpoints."""
    path = tmp_path_factory.mktemp("base") / "flat"
    gm.ckpts.save_params(kauldron_tiny.params_of(), path, layout="flat", config=kauldron_tiny.CONFIG)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    texts = [{"src": src, "dst": dst} for src, dst in kauldron_tiny.PAIRS]
    return kauldron_tiny.write_json(tmp_path_factory.mktemp("rows"), texts)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    texts = [{"src": src, "dst": dst, "bad": dst[::-1] + "!"} for src, dst in kauldron_tiny.PAIRS]
    return kauldron_tiny.write_json(tmp_path_factory.mktemp("pairs"), texts)


def resolved(config):
    """Through JSON, as `python -m kauldron.main` and a restored experiment have it."""
    return konfig.resolve(konfig.ConfigDict(json.loads(config.to_json())))


def loss_of(aux):
    return float(aux.compute(flatten=False).loss_values["loss"])


def losses_of(trainer):
    """The losses along a training of the trainer's own steps, and the state after it."""
    state, losses = trainer.init_state(), []
    batch = jax.device_put(next(iter(trainer.train_ds)))
    for _ in range(6):
        state, aux = trainer.trainstep.step(state=state, batch=batch, return_losses=True)
        losses.append(loss_of(aux))
    return losses, state


def most_apart(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def checkpoints(workdir):
    return kd.ckpts.Checkpointer(workdir=workdir, save_interval_steps=1)


def same(a, b):
    flat = jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))
    return all(flat) and len(flat) > 0


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, rows, checkpoint):
    workdir = tmp_path_factory.mktemp("seq2seq")
    trainer = resolved(kauldron_tiny.seq2seq(workdir, rows, checkpoint))
    state, _ = trainer.train()
    return workdir, trainer, state


def test_finetuning(finetuned):
    _, trainer, state = finetuned
    batch = trainer.train_ds[0]
    assert batch["input"].shape == (2, kauldron_tiny.LENGTH) and batch["target"].shape == (2, kauldron_tiny.LENGTH, 1)
    assert int(state.step) == 3  # kauldron's loop ends with step number 2, and updates after it
    assert not same(state.params, kauldron_tiny.params_of())
    fresh = trainer.init_state()
    assert same(fresh.params, kauldron_tiny.params_of())  # what was loaded, in the trainer's own dtypes
    losses, _ = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    text = gm.text.ChatSampler(
        model=trainer.model, params=state.params, tokenizer=ByteTokenizer(), cache_length=512
    ).chat("one", max_new_tokens=2)
    assert isinstance(text, str)


def test_the_trainers_loss_is_ours(finetuned):
    """The number that kauldron minimises is the mean cross-entropy over the tokens of the answers."""
    _, trainer, _ = finetuned
    batch = trainer.train_ds[0]
    params = kauldron_tiny.params_of()
    logits = trainer.model.apply({"params": params}, jnp.asarray(batch["input"])).logits
    logps = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = np.take_along_axis(np.asarray(logps), batch["target"], axis=-1)[batch["loss_mask"]]
    _, aux = trainer.trainstep.step(state=trainer.init_state(), batch=jax.device_put(batch), return_losses=True)
    assert loss_of(aux) == pytest.approx(-picked.mean(), rel=1e-5)


def test_the_evaluator_samples(finetuned):
    _, trainer, state = finetuned
    evaluator = trainer.evals["sampling"]
    assert isinstance(evaluator, kd.evals.EvaluatorBase)
    found = evaluator.evaluate(state, step=3).compute(flatten=False)
    texts = {
        name: list(np.asarray(getattr(value, "texts", value)).reshape(-1))
        for name, value in found.summary_values.items()
    }
    assert texts["gt"] == ["un<end_of_turn>", "deux<end_of_turn>"] and len(texts["answer"]) == 2
    assert texts["prompt"][0].startswith("<start_of_turn>user\none<end_of_turn>")
    sampler = gm.text.Sampler(
        model=trainer.model, params=state.params, tokenizer=ByteTokenizer(), cache_length=128, pad_length=64
    )
    assert sampler.sample(texts["prompt"][0], max_new_tokens=3) == texts["answer"][0]


def test_we_read_what_the_trainer_wrote(finetuned):
    workdir, trainer, state = finetuned
    steps = sorted(folder.name for folder in (workdir / "checkpoints").iterdir())
    assert steps == ["ckpt_0", "ckpt_2"]
    last = workdir / "checkpoints" / "ckpt_2"
    ours = gm.ckpts.load_params(last)
    theirs = checkpoints(workdir).restore(trainer.init_state(skip_transforms=True))
    assert int(theirs.step) == 2
    assert same(ours, theirs.params)
    assert 0 < most_apart(ours, state.params) < 0.01  # the state has one update more, of adam at 3e-3
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), state.params)
    assert same(gm.ckpts.load_params(last, params=like), jax.tree.map(lambda x: x.astype(jnp.bfloat16), ours))
    assert same(gm.ckpts.load_params(workdir / "checkpoints" / "ckpt_0"), kauldron_tiny.params_of())


def test_the_trainer_restores_what_we_wrote(finetuned, tmp_path):
    workdir, trainer, _ = finetuned
    ours = kauldron_tiny.params_of(seed=5)
    gm.ckpts.save_params(
        ours, tmp_path / "checkpoints" / "ckpt_7", layout="kauldron", step=7, config=kauldron_tiny.CONFIG
    )
    whole = checkpoints(tmp_path).restore(kd.ckpts.items.StandardCheckpointItem())
    assert checkpoints(tmp_path).latest_step == int(whole["step"]) == 7 and same(whole["params"], ours)
    for written in (tmp_path, workdir):  # and what either side wrote is where the next training starts
        last = sorted((written / "checkpoints").iterdir())[-1]
        state = gm.ckpts.LoadCheckpoint(path=last).transform(trainer.init_state(skip_transforms=True))
        assert same(state.params, gm.ckpts.load_params(last))


def test_training_goes_on_after_a_restart(finetuned, rows, checkpoint):
    """The same configuration with one step more repeats the last update from its own checkpoint, and makes another."""
    workdir, _, state = finetuned
    longer = resolved(kauldron_tiny.seq2seq(workdir, rows, checkpoint, num_train_steps=3))
    again, _ = longer.train()
    assert int(again.step) == 4
    assert 0 < most_apart(again.params, state.params) < 0.01


def test_lora_finetuning(tmp_path, rows, checkpoint):
    trainer = resolved(kauldron_tiny.lora(tmp_path, rows, checkpoint))
    losses, _ = losses_of(trainer)
    assert losses[-1] < 0.95 * losses[0]
    state, _ = trainer.train()
    original, adapter = peft.split_params(state.params)
    assert same(original, kauldron_tiny.params_of())  # frozen, and loaded
    b = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapter) if path[-1].key == "b"]
    assert b and all(bool(jnp.any(leaf != 0)) for leaf in b)
    reread = gm.ckpts.load_params(tmp_path / "checkpoints" / "ckpt_2")
    assert jax.tree.structure(reread) == jax.tree.structure(dict(state.params))
    fused = peft.fuse_params(reread)  # what was trained is one model without the wrapper
    tokens = jnp.asarray(trainer.train_ds[0]["input"])
    wanted = trainer.model.apply({"params": reread}, tokens).logits
    given = kauldron_tiny.TinyGemma().apply({"params": fused}, tokens).logits
    assert float(jnp.abs(given - wanted).max()) < 1e-4 * float(jnp.abs(wanted).max())


def test_dpo(tmp_path, pairs, checkpoint):
    trainer = resolved(kauldron_tiny.dpo(tmp_path, pairs, checkpoint))
    assert isinstance(trainer.train_losses["loss"], kd.losses.Loss)
    losses, state = losses_of(trainer)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # policy and anchor are the same at first
    assert losses[-1] < losses[0]
    assert set(state.params) == {"policy", "anchor"}
    assert same(state.params["anchor"], kauldron_tiny.params_of())
    assert not same(state.params["policy"], state.params["anchor"])


def test_npo(tmp_path, rows, checkpoint):
    trainer = resolved(kauldron_tiny.npo(tmp_path, rows, checkpoint))
    losses, state = losses_of(trainer)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert same(state.params["anchor"], kauldron_tiny.params_of())


def test_pictures(tmp_path):
    trainer = resolved(kauldron_tiny.multimodal(tmp_path))
    batch = trainer.train_ds[0]
    assert batch["image"].shape == (2, 1, 16, 16, 3) and batch["image"].dtype == np.uint8
    losses, state = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    found = trainer.evals["sampling"].evaluate(state, step=6).compute(flatten=False)
    prompt = found.summary_values["prompt"]
    assert "<start_of_image>" in str(np.asarray(getattr(prompt, "texts", prompt)).reshape(-1)[0])


def test_the_command_line_trains_over_two_devices(finetuned, tmp_path, rows, checkpoint):
    """`python -m kauldron.main` with FSDP gives the parameters that one device gives."""
    config = tmp_path / "config.py"
    config.write_text(
        "import kauldron_tiny\nfrom kauldron import konfig\nwith konfig.imports():\n    from kauldron import kd\n"
        "def get_config():\n"
        "    sharding = kd.sharding.ShardingStrategy(params=kd.sharding.FSDPSharding(min_size_to_shard_mb=0))\n"
        f"    return kauldron_tiny.seq2seq('unset', {rows!r}, {str(checkpoint)!r}, sharding=sharding)\n"
    )
    work = tmp_path / "work"
    flags = [f"--cfg={config}", f"--cfg.workdir={work}", "--cfg.num_train_steps=2", "--cfg.train_ds.num_workers=1"]
    paths = [str(Path(kauldron_tiny.__file__).parent), str(Path(gemma.__file__).parents[1])]
    environment = dict(XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-m", "kauldron.main", *flags],
        env=os.environ | environment | dict(PYTHONPATH=os.pathsep.join(paths), JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = work / "checkpoints" / "ckpt_2"
    assert "devices" in (folder / "default" / "_sharding").read_text()  # it was cut up
    alone = gm.ckpts.load_params(finetuned[0] / "checkpoints" / "ckpt_2")
    difference = jax.tree.map(jnp.subtract, gm.ckpts.load_params(folder), alone)
    update = jax.tree.map(jnp.subtract, alone, kauldron_tiny.params_of())
    # Sums are in another order; adam makes whole updates of the smallest gradients, so single numbers may differ.
    assert float(optax.tree.norm(difference)) < 2e-3 * float(optax.tree.norm(update))
    placed = gm.ckpts.load_params(folder, sharding=kd.sharding.FSDPSharding())
    assert same(placed, gm.ckpts.load_params(folder))


def test_classification(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = {"sentence": [b"it is", b"is it", b"we are", b"are we"], "label": [1, 0, 1, 0]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    trainer = resolved(kauldron_tiny.classification(tmp_path / "run", str(tmp_path / "rows.parquet")))
    batch = trainer.train_ds[0]
    assert batch["sentence"].shape == (2, 24) and batch["label"].tolist() == [[105], [94]]
    losses, _ = losses_of(trainer)
    assert losses[-1] < losses[0]


def test_quantization_aware_training(tmp_path, rows, checkpoint):
    trainer = resolved(kauldron_tiny.quantization_aware(tmp_path, rows, checkpoint))
    losses, state = losses_of(trainer)
    assert losses[-1] < losses[0]
    model = gm.nn.IntWrapper(model=kauldron_tiny.TinyGemma(), dtype=jnp.int8)
    params = peft.quantize(state.params, method="INT8", config=kauldron_tiny.CONFIG)
    table = state.params["embedder"]["input_embedding"]  # floats in that tree, but trained for its rounding, too
    params["embedder"]["input_embedding"] = peft.simulate_quantize(table, "INT8", axis_to_reduce=1)
    tokens = jnp.asarray(trainer.train_ds[0]["input"])
    trained = trainer.model.apply({"params": state.params}, tokens).logits
    shipped = model.apply({"params": params}, tokens).logits
    assert float(jnp.abs(trained - shipped).max()) < 1e-5 * float(jnp.abs(trained).max())


def test_a_wrong_checkpoint_is_an_error_of_ours(tmp_path, rows):
    trainer = resolved(kauldron_tiny.seq2seq(tmp_path / "run", rows, tmp_path / "nothing"))
    with pytest.raises(CheckpointError):
        trainer.init_state()
