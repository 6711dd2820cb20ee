# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training: the model learns on the very numbers of the 4-bit file that is shipped.

    python examples/qat.py                          a tiny random model: everything runs in seconds
    python examples/qat.py --model demo --steps 20  the real Gemma 3 270M (all weights are trained: 7.4 GB of memory)
    python examples/qat.py --type int8              another grid: q4_0, int4, int8, sfp8

This is the whole run in one call, as `gemma finetune notes.txt --method qat --quantize q4_0` makes it; `seq2seq.py` shows
the parts. What is trained and what is written agree: the logits of the file are those of the last training step.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gemma import gm, testing
from gemma.finetuning import RunConfig

TEXT = "Roses are red\nViolets are blue\nSugar is sweet\nAnd so are you\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "notes.txt").write_text(TEXT)
        run = RunConfig(
            data=str(folder / "notes.txt"),
            model=asked.model or str(testing.write_tiny_gguf(folder / "tiny.gguf", tiny())),
            method="qat",
            quantize=asked.type,
            output=str(folder / "run"),
            steps=asked.steps,
            max_length=64,
            learning_rate=1e-3 if not asked.model else 1e-5,
            export=("quantized",),
            tensorboard=False,
        )
        result = gm.train.finetune(run)
        losses = [row["loss"] for row in result.training.history]
        print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
        [file] = result.exports
        print(f"{file.path.name}, {file.bytes:,} bytes: {file}")


def tiny():
    """The configuration of a tiny model whose rows are whole blocks of 32."""
    sizes = dict(hidden_size=64, intermediate_size=64, head_dim=32, num_hidden_layers=2, layer_pattern="LG")
    return testing.tiny_config("gemma3", query_pre_attn_scalar=None, rope_local_base_freq=1e4, **sizes)


if __name__ == "__main__":
    main()
