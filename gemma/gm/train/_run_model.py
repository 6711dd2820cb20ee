# SPDX-License-Identifier: Apache-2.0
"""What a run trains: the checkpoint of a `RunConfig` looked at, its data as loaders, its network with what is trained.

Nothing is read of the weights before `build`. The run itself is `_run.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma import adapters, hub, peft
from gemma import config as configs
from gemma.errors import CheckpointError, ConfigError, TokenizerError, UnsupportedError, WeightsMismatch
from gemma.finetuning import RunConfig
from gemma.gm import ckpts, data, nn, sharding
from gemma.gm.train import _evaluate
from gemma.gm.typing import Params
from gemma.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Base:
    """The model of a run, before its weights are read.

    Attributes:
      path: of the checkpoint.
      config: of the whole model.
      tokenizer: that came with it.
    """

    path: Path
    config: configs.GemmaConfig
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
    """The loaders of a run.

    Attributes:
      training: without end.
      evaluation: None where nothing is held out.
      images: the batches hold pictures.
      chat: the examples are turns in the model's chat template.
      classification: the labels to tell apart; None where there are none.
    """

    training: data.Loader
    evaluation: data.Loader | None
    images: bool
    chat: bool
    classification: adapters.Classification | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with all parameters, which of them are trained (`gm.train.Trainer`'s argument), and on what."""

    model: Any
    params: Params
    trainable: Any
    chat: bool = False
    classification: adapters.Classification | None = None


def look(run: RunConfig) -> Base:
    """Finds the model of a run.

    Raises:
      HubError, CheckpointError: it cannot be found or read, or the adapter to go on from is another model's.
      UnsupportedError: it is no decoder. TokenizerError: it has no tokenizer.
    """
    path = hub.resolve(run.model)
    with ckpts.open_checkpoint(path) as checkpoint:
        config, source = checkpoint.config(), checkpoint.tokenizer_source()
    if not isinstance(config, configs.GemmaConfig) or config.use_bidirectional_attention:
        kind = type(config).__name__.removesuffix("Config")
        raise UnsupportedError(f"{path}: holds a {kind} model; expected a Gemma decoder, which `finetune` trains")
    if source is None:
        raise TokenizerError(f"{path}: no tokenizer came with these weights; put tokenizer.model beside them")
    if run.max_length > config.max_position_embeddings:
        raise ConfigError(
            f"max_length: {run.max_length} tokens, but {path.name} was made for {config.max_position_embeddings}"
        )
    if run.adapter is not None:
        _check_adapter(run.adapter, path, config)
    return Base(path, config, Tokenizer.from_source(source))


def _check_adapter(adapter: str, path: Path, config: configs.GemmaConfig) -> None:
    """Whether an adapter is one of this model's, before anything large is read; which base it had is seen later."""
    try:
        adapters.open_adapter(adapter, config)
    except WeightsMismatch as error:
        odd = [*error.unexpected, *error.misshaped] or [str(error)]
        raise CheckpointError(
            f"{adapter}: the adapter belongs to another model than {path.name}: {len(odd)} of its tensors have no place "
            f"in it, the first is {odd[0]}"
        ) from error


def read(run: RunConfig, base: Base) -> Data:
    """The examples of a run, read and encoded once: those held out too, and the prompts of its samples.

    Raises:
      DataError: they cannot be used. ConfigError: they are not of the kind that the method learns from, or a prompt is
        too long.
    """
    options = dict(format=run.format, sample_by=run.sample_by, skip_bad=run.skip_bad, **dict(run.columns))
    examples = data.read_examples(run.data, limit=run.limit, **options)
    _check_kind(run, examples)
    held = None
    if run.eval_data:
        held = data.read_examples(run.eval_data, **options)
        _check_kind(run, held)
    elif run.eval_split:
        examples, held = examples.split(run.eval_split, seed=run.seed)
    size = base.config.vision.image_size if base.config.vision is not None else None
    plain = examples.format == "text" and run.truncate == "error"
    shared: dict[str, Any] = dict(
        batch_size=run.batch_size,
        max_length=run.max_length,
        truncate="split" if plain else run.truncate,
        image_size=size,
    )
    if run.objective == "classification":
        shared |= dict(labels=dict(run.labels) or None, template=run.template)
    shard = (jax.process_index(), jax.process_count())
    training = data.Loader(
        examples,
        base.tokenizer,
        packing=run.packing,
        shuffle=run.shuffle,
        seed=run.seed,
        shard=shard,
        **shared,
    )
    if run.objective == "classification":
        shared["labels"] = training.labels
    evaluation = None
    if held is not None:
        own = dict(shuffle=False, epochs=1, buckets=training.buckets, shard=shard)
        evaluation = data.Loader(held, base.tokenizer, packing=run.packing, **own, **shared)
        evaluation.report  # noqa: B018 - goes through the rows: a bad one is found now, not after the training
    loaders = [training] if evaluation is None else [training, evaluation]
    images = size is not None and any("images" in next(iter(loader)) for loader in loaders)
    told = None
    if run.objective == "classification":  # words, not ids: they are what a later evaluation takes
        told = adapters.Classification(run.labels or tuple((name, name) for name in training.labels), run.template)
    chat, limit = _is_chat(run, examples), base.config.max_position_embeddings
    options = dict(tokens=_evaluate.SAMPLE_TOKENS, limit=limit, chat=chat)
    _evaluate.encode_prompts(run.sample_prompts, base.tokenizer, **options)
    return Data(training, evaluation, images, chat, told)


def _is_chat(run: RunConfig, examples: data.Examples) -> bool:
    """Whether what is learnt is an answer in a chat; of a mixture of files, whether the first example is."""
    if run.objective == "classification":
        return run.template is None
    return isinstance(examples[0], (data.Conversation, data.Preference, data.Rated))


_WANTS = {
    "supervised": "conversations, prompts with completions, or text",
    "preference": "rows with a chosen and a rejected answer",
    "kto": "answers with a label true or false",
    "classification": "rows with a text and a label",
}


def _check_kind(run: RunConfig, examples: data.Examples) -> None:
    if examples.kind == run.objective:
        return
    fits = {"preference": "dpo", "kto": "kto", "classification": "classify", "supervised": "lora"}[examples.kind]
    raise ConfigError(
        f"method: {run.method} learns from {_WANTS[run.objective]}; these files hold {_WANTS[examples.kind]} "
        f"(format {examples.format}): use the method {fits}, or other data"
    )


def compute_dtype(run: RunConfig) -> str:
    """Of frozen weights and activations."""
    if run.dtype != "auto":
        return run.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def strategy(run: RunConfig, base: Base) -> Any:
    """How the run is spread over devices; None: it is not."""
    if run.sharding == "none":
        return None
    if run.sharding == "tensor":
        return sharding.TensorSharding(base.config, sharding.make_mesh(data=-1, tensor=run.tensor))
    return sharding.FSDPSharding() if run.sharding == "fsdp" else sharding.ReplicatedSharding()


def build(run: RunConfig, base: Base, *, images: bool, chat: bool = False) -> Network:
    """Reads the weights and puts on what is trained.

    Args:
      run: resolved.
      base: of `look`.
      images: keep the vision tower.
      chat: what is learnt are turns in the chat template.

    Raises:
      GemmaError: weights or an adapter that do not fit.
    """
    dtype = compute_dtype(run)
    config = base.config if images else configs.text_only(base.config)
    net: Any = nn.Transformer.from_config(config, dtype=jnp.dtype(dtype))
    packed = run.quantize if run.tuned == "qlora" else False
    placed = strategy(run, base)
    options = {} if placed is None else dict(sharding=placed)
    params = ckpts.load_params(base.path, dtype=dtype, text_only=not images, quantize=packed or False, **options)
    if run.method == "qat":
        net = nn.QuantizationAwareWrapper(method=run.quantize, model=net)
    if run.tuned == "full":
        # A vision tower keeps what it sees: its weights are frozen, as when the family itself is tuned.
        return Network(net, params, lambda name, leaf: not name.startswith("vision_encoder"), chat)
    if run.adapter is not None:
        adapter = peft.load_adapter(run.adapter, net, params, dtype="float32")
        return Network(adapter.model, peft.merge_params(params, adapter.lora), "lora", chat)
    model = nn.LoRA(
        rank=run.rank,
        alpha=run.alpha,
        dropout=run.dropout,
        targets=run.targets or None,
        use_dora=run.use_dora,
        use_rslora=run.use_rslora,
        dtype=jnp.float32,
        model=net,
    )
    return Network(model, peft.merge_params(params, fresh_adapter(model, run.seed)), "lora", chat)


def fresh_adapter(model: Any, seed: int) -> Params:
    """The parameters that a `gm.nn.LoRA` begins with, float32; those of the network are never made."""

    def make(key: jax.Array) -> Params:
        return peft.split_params(model.init(key, jnp.ones((1, 2), jnp.int32))["params"]).lora

    return jax.jit(make)(jax.random.key(seed))
