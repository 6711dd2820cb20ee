# SPDX-License-Identifier: Apache-2.0
"""How fast a step of training is, and what it needs, beside Hugging Face's PEFT on the same weights, batch and length.

    python benchmarks/bench_finetune.py [--model demo] [--batch 4] [--length 256] [--rank 8] [--rounds 5]
                                        [--sides lora,qlora,peft-float32,...] [--methods lora,full]

Each side is a process of its own that holds a model and an optimizer (AdamW) and does one step when told to; the sides
take turns, so that whatever else the machine does meets all of them, and a ratio is the median over the rounds of the
ratio within a round. All tokens are labels: nothing is gained by leaving positions out of the head (`--labels 0.3`
labels that share of them, on every side). Peak memory is the process's own high-water mark of resident memory, after
loading, compiling and all steps.

A LoRA step of N parameters, of which E are the embedding, does 4 (N - E) + 4 E operations per token: forward, and
backward to activations only; a full one 6 N. The floor that is printed is that count over the measured rate of a large
float32 product. Needs `peft` and `transformers` for the peer. The last line is one JSON object. Close other programs
before believing absolute figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

METHODS = {
    "lora": ("gemmakit-lora", "gemmakit-qlora", "peft-float32", "peft-bfloat16"),
    "full": ("gemmakit-full", "hf-float32", "hf-bfloat16"),
}


def batch(arguments) -> dict:
    """Tokens, next tokens and which of them count, the same on every side."""
    import numpy as np

    random = np.random.default_rng(0)
    shape = (arguments.batch, arguments.length)
    tokens = random.integers(5, 100_000, shape).astype(np.int32)
    mask = random.random(shape) < arguments.labels
    mask[:, -1] = False
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "loss_mask": mask}


# ---- the sides: each returns a function that does one step and gives its loss ----------------------------------------


def gemmakit(arguments, method: str):
    import jax
    import jax.numpy as jnp

    from gemma import gm, hub, peft
    from gemma.checkpoint import open_checkpoint
    from gemma.gm.train import _state

    path = hub.resolve(arguments.model)
    with open_checkpoint(path) as checkpoint:
        model = gm.nn.Transformer.from_config(checkpoint.config(), dtype=jnp.float32)
    packing = {"quantize": "keep"} if method == "qlora" else {}
    params, trainable = gm.ckpts.load_params(path, dtype=jnp.float32, text_only=True, **packing), "all"
    if method != "full":
        targets = ("attention", "mlp")
        model = gm.nn.LoRA(rank=arguments.rank, model=model, targets=targets, alpha=arguments.rank, dtype=jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
        lora = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), peft.split_params(shapes).lora)
        params, trainable = peft.merge_params(params, lora), "lora"
    model = model.clone(remat=arguments.remat) if arguments.remat else model
    optimizer = gm.train.make_optimizer(gm.train.OptimizerConfig(learning_rate=1e-4, total_steps=1000))
    split = gm.train.split_trainable(params, trainable)
    del params
    state = jax.jit(lambda leaves: _state.init_state(leaves, optimizer))(split.trainable)
    frozen = split.frozen
    del split
    step = gm.train.make_step(gm.train.Supervised(model), optimizer)
    rows = batch(arguments)

    def once() -> float:
        nonlocal state
        state, metrics = step(state, frozen, rows)
        return float(metrics["loss"])

    return once


def hugging_face(arguments, method: str, dtype: str):
    import torch

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from bench_torch import load_ours, load_theirs

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = load_theirs(load_ours(arguments.model, dtype)).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if method == "peft":
        from peft import LoraConfig, get_peft_model

        config = dict(r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, LoraConfig(**config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = batch(arguments)
    ids = torch.tensor(rows["tokens"]).long()
    labels = torch.full_like(ids, -100)
    counted = torch.tensor(rows["loss_mask"])
    labels[:, 1:][counted[:, :-1]] = ids[:, 1:][counted[:, :-1]]  # their label of position t + 1 is our target of t

    def once() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return once


def serve(arguments) -> None:
    """A side: one step per line that comes in, one JSON object per line out."""
    family, _, kind = arguments.side.partition("-")
    once = gemmakit(arguments, kind) if family == "gemmakit" else hugging_face(arguments, family, kind)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = once()
        seconds = time.perf_counter() - begin
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) / 1e6 for line in status if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_gb": peak}), flush=True)


# ---- the turns -------------------------------------------------------------------------------------------------------


class Side:
    """A process that waits to be told to do a step."""

    def __init__(self, name: str, arguments):
        command = [
            sys.executable,
            __file__,
            "--side",
            name,
            "--model",
            arguments.model,
            "--batch",
            str(arguments.batch),
        ]
        command += ["--length", str(arguments.length), "--rank", str(arguments.rank), "--labels", str(arguments.labels)]
        command += ["--threads", str(arguments.threads)] + (["--remat", arguments.remat] if arguments.remat else [])
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.process = name, subprocess.Popen(command, **pipes)
        self.answers: list[dict] = []
        self._read()

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name}: the process ended with {self.process.wait()}; its message is above")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answers.append(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def rates(self, tokens: int) -> list[float]:
        return [tokens / answer["seconds"] for answer in self.answers[1:]]  # the first one compiles


def product_rate() -> float:
    """Operations per second of a float32 product of numpy's library."""
    import numpy as np

    a = np.ones((2048, 2048), np.float32)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(seconds)


def measured(names: tuple[str, ...], arguments) -> dict[str, dict]:
    """{side: tokens per second, ratio of the first side to it, peak, first and last loss}."""
    sides = [Side(name, arguments) for name in names]
    for index in range(arguments.rounds + 1):
        for side in sides if index % 2 else sides[::-1]:
            side.step()
    for side in sides:
        side.close()
    tokens = arguments.batch * arguments.length
    first = sides[0].rates(tokens)
    rows = {}
    for side in sides:
        rates = side.rates(tokens)
        ratio = statistics.median(a / b for a, b in zip(first, rates))
        last = side.answers[-1]
        rows[side.name] = {"tokens_per_s": statistics.median(rates), "ratio": ratio, "peak_gb": last["peak_gb"]}
        rows[side.name] |= {"first_loss": side.answers[0]["loss"], "last_loss": last["loss"]}
    return rows


def floor(arguments, method: str) -> float:
    """Tokens per second that the products alone would allow."""
    from gemma import hub
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(hub.resolve(arguments.model)) as checkpoint:
        config = checkpoint.config()
    embedding = config.vocab_size * config.hidden_size
    inner = config.num_parameters - embedding
    per_token = (4 if method == "lora" else 6) * (inner + embedding * arguments.labels)
    return product_rate() / per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--sides", help="only these, for example gemmakit-lora,peft-float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--labels", type=float, default=1.0, help="share of the tokens that are labels")
    parser.add_argument("--remat", help="block or dots: see gm.nn.Transformer.remat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    wanted = arguments.sides.split(",") if arguments.sides else None
    report = {"model": arguments.model, "batch": arguments.batch, "length": arguments.length, "rank": arguments.rank}
    report |= {"labels": arguments.labels, "machine": platform.machine(), "threads": arguments.threads, "methods": {}}
    for method in arguments.methods.split(","):
        names = tuple(name for name in METHODS[method] if wanted is None or name in wanted)
        if not names:
            continue
        rows, limit = measured(names, arguments), floor(arguments, method)
        print(f"{method:18}{'tokens/s':>10}{'ratio':>8}{'peak GB':>9}{'loss':>18}")
        for name, row in rows.items():
            losses = f"{row['first_loss']:.4f} {row['last_loss']:.4f}"
            print(f"{name:18}{row['tokens_per_s']:10.1f}{row['ratio']:8.2f}{row['peak_gb']:9.2f}{losses:>18}")
        print(f"{'floor':18}{limit:10.1f}")
        report["methods"][method] = {"rows": rows, "floor": limit}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
