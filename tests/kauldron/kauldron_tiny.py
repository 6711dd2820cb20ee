"""A tiny Gemma, rows, and the official examples' configurations at its size. Configurations import this by its name."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
from kauldron import konfig

with konfig.imports():
    import kauldron_tiny as tiny
    import numpy as types
    import optax
    from kauldron import kd

    from gemma import gm
    from gemma import testing as doubles

import numpy as np

from gemma.gm import nn as networks
from gemma.gm.nn.config import TransformerConfig
from gemma.gm.testing import tiny_model
from gemma.testing import tiny_config

CONFIG = tiny_config("gemma3", num_hidden_layers=2, layer_pattern="LG", max_position_embeddings=512)
SEEING_CONFIG = tiny_model(images=True).config
LENGTH = 56
PAIRS = [("one", "un"), ("two", "deux"), ("red", "rouge"), ("blue", "bleu")]


class TinyGemma(networks.Transformer, kw_only=True):
    """A Gemma 3 of two layers, with a default for every field, as the models of the package have."""

    config: TransformerConfig = TransformerConfig.of(CONFIG)
    dtype: object = jnp.float32


class SeeingGemma(TinyGemma, kw_only=True):
    """One with an encoder for pictures of 16 x 16 pixels."""

    config: TransformerConfig = TransformerConfig.of(SEEING_CONFIG)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source of plain pictures and their names, as TFDS has them: bytes and arrays by a row's number."""

    def __len__(self):
        return 4

    def __getitem__(self, record_key):
        picture = np.full((32, 32, 3), 60 * record_key, np.uint8)
        return {"picture": picture, "caption": f"grey {record_key}".encode(), "id": np.int64(record_key)}


def params_of(model: nn.Module | None = None, seed: int = 0):
    model = TinyGemma() if model is None else model
    return model.init(jax.random.key(seed), jnp.ones((1, 3), jnp.int32))["params"]


def write_json(folder, rows, name="rows.json"):
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def trainer(workdir, train_ds, model, loss, **fields):
    """As the examples write it; a `konfig.ConfigDict`."""
    fields = dict(num_train_steps=2, optimizer=optax.adam(learning_rate=3e-3)) | fields
    return kd.train.Trainer(
        seed=42,
        workdir=str(workdir),
        train_ds=train_ds,
        model=model,
        train_losses={"loss": loss},
        log_metrics_every=1,
        log_summaries_every=1,
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=2),
        **fields,
    )


def seq2seq_ds(path, *, sampling=False):
    return kd.data.py.Json(
        path=path,
        shuffle=not sampling,
        num_epochs=1 if sampling else None,
        batch_size=None if sampling else 2,
        num_workers=0,
        transforms=[
            gm.data.Seq2SeqTask(
                in_prompt="src",
                in_response="dst",
                out_input="input",
                out_target="target",
                out_target_mask="loss_mask",
                tokenizer=doubles.ByteTokenizer(),
                max_length=LENGTH,
                truncate=True,
                sampling=sampling,
            )
        ],
    )


def cross_entropy(**fields):
    return kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", **fields)


def seq2seq(workdir, rows, checkpoint, **fields):
    """examples/seq2seq.py, with its evaluators; `sharding=` makes it examples/sharding.py."""
    return trainer(
        workdir,
        seq2seq_ds(rows),
        tiny.TinyGemma(tokens="batch.input"),
        cross_entropy(labels="batch.target", mask="batch.loss_mask"),
        init_transform=gm.ckpts.LoadCheckpoint(path=str(checkpoint)),
        evals={
            "test": kd.evals.Evaluator(
                run=kd.evals.EveryNSteps(2),
                num_batches=1,
                ds=seq2seq_ds(rows),
                losses={"loss": cross_entropy(labels="batch.target", mask="batch.loss_mask")},
            ),
            "sampling": gm.evals.SamplerEvaluator(
                run=kd.evals.EveryNSteps(2),
                max_new_tokens=3,
                num_batches=2,
                cache_length=128,
                pad_length=64,
                ds=seq2seq_ds(rows, sampling=True),
            ),
        },
        **fields,
    )


def lora(workdir, rows, checkpoint):
    """examples/lora.py."""
    return trainer(
        workdir,
        seq2seq_ds(rows),
        gm.nn.LoRA(rank=2, model=tiny.TinyGemma(tokens="batch.input"), dtype=types.float32),
        cross_entropy(labels="batch.target", mask="batch.loss_mask"),
        init_transform=gm.ckpts.SkipLoRA(wrapped=gm.ckpts.LoadCheckpoint(path=str(checkpoint))),
        optimizer=kd.optim.partial_updates(optax.adam(learning_rate=3e-2), mask=kd.optim.select("lora")),
    )


def dpo(workdir, rows, checkpoint):
    """examples/dpo.py."""
    task = gm.data.ContrastiveTask(
        in_prompt="src",
        in_chosen="dst",
        in_rejected="bad",
        out_tokens="tokens",
        out_targets="targets",
        out_mask="mask",
        tokenizer=doubles.ByteTokenizer(),
        max_length=LENGTH,
        truncate=True,
    )
    ds = kd.data.py.Json(path=rows, shuffle=True, batch_size=2, num_workers=0, transforms=[task])
    return trainer(
        workdir,
        ds,
        gm.nn.AnchoredPolicy(policy=tiny.TinyGemma(tokens="batch.tokens")),
        gm.losses.DpoLoss(
            tokens="batch.targets",
            sequence_mask="batch.mask",
            policy_logits="preds.policy.logits",
            anchor_logits="preds.anchor.logits",
        ),
        init_transform=gm.ckpts.AnchoredPolicyLoader(policy=gm.ckpts.LoadCheckpoint(path=str(checkpoint))),
    )


def npo(workdir, rows, checkpoint):
    """examples/npo.py: the answers of the data set are unlearned."""
    return trainer(
        workdir,
        seq2seq_ds(rows),
        gm.nn.AnchoredPolicy(policy=tiny.TinyGemma(tokens="batch.input")),
        gm.losses.NpoLoss(
            tau=0.1,
            tokens="batch.target",
            sequence_mask="batch.loss_mask",
            policy_logits="preds.policy.logits",
            anchor_logits="preds.anchor.logits",
        ),
        init_transform=gm.ckpts.AnchoredPolicyLoader(policy=gm.ckpts.LoadCheckpoint(path=str(checkpoint))),
    )


def multimodal(workdir):
    """examples/multimodal.py: a picture in the prompt."""
    return trainer(
        workdir,
        pictures_ds(),
        tiny.SeeingGemma(tokens="batch.input", images="batch.image"),
        cross_entropy(labels="batch.target", mask="batch.loss_mask"),
        train_summaries={"image": kd.summaries.ShowImages(images="batch.image", rearrange="b 1 h w c -> b h w c")},
        evals={
            "sampling": gm.evals.SamplerEvaluator(
                run=kd.evals.EveryNSteps(2),
                max_new_tokens=2,
                num_batches=1,
                cache_length=128,
                pad_length=64,
                ds=pictures_ds(sampling=True),
            ),
        },
    )


def pictures_ds(*, sampling=False):
    return kd.data.py.DataSource(
        data_source=tiny.Pictures(),
        shuffle=False,
        num_epochs=1 if sampling else None,
        batch_size=None if sampling else 2,
        num_workers=0,
        transforms=[
            kd.data.Elements(keep=["caption"], rename={"picture": "image"}),
            kd.data.AddConstants({"question": "What is in <start_of_image>?"}),
            kd.data.py.Resize(key="image", size=(16, 16)),
            kd.data.Cast(key="image", dtype="uint8"),
            kd.data.Rearrange(key="image", pattern="h w c -> 1 h w c"),
            gm.data.Seq2SeqTask(
                in_prompt="question",
                in_response="caption",
                out_input="input",
                out_target="target",
                out_target_mask="loss_mask",
                tokenizer=doubles.ByteTokenizer(),
                max_length=LENGTH,
                sampling=sampling,
            ),
        ],
    )


def classification(workdir, rows):
    """examples/classification.py, over a parquet file of texts as bytes."""
    ds = gm.data.Parquet(
        path=rows,
        shuffle=False,
        batch_size=2,
        num_workers=0,
        transforms=[
            gm.data.DecodeBytes(key="sentence"),
            gm.data.FormatText(key="sentence", template="Right? {text}\n"),
            gm.data.Tokenize(key="sentence", tokenizer=doubles.ByteTokenizer(), add_bos=True),
            gm.data.Pad(key="sentence", max_length=24),
            gm.data.MapInts(key="label", old_to_new={0: 94, 1: 105}),
            kd.data.Rearrange(key="label", pattern="... -> ... 1"),
        ],
    )
    return trainer(
        workdir,
        ds,
        tiny.TinyGemma(tokens="batch.sentence", return_last_only=True),
        cross_entropy(labels="batch.label"),
    )


def quantization_aware(workdir, rows, checkpoint):
    """The colab of quantization-aware training."""
    return trainer(
        workdir,
        seq2seq_ds(rows),
        gm.nn.QuantizationAwareWrapper(method="INT8", model=tiny.TinyGemma(tokens="batch.input")),
        cross_entropy(labels="batch.target", mask="batch.loss_mask"),
        init_transform=gm.ckpts.LoadCheckpoint(path=str(checkpoint)),
    )
