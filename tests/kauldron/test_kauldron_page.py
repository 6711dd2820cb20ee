"""Runs docs/kauldron.md from top to bottom, with a tiny model in the place of the real one."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import kauldron_tiny
import pytest

from gemma import gm, testing

pytestmark = [pytest.mark.kauldron, pytest.mark.filterwarnings("default")]

PAGE = Path(__file__).parents[2] / "docs/kauldron.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TINY = {
    "gm.nn.Gemma3_270M(": "tiny.TinyGemma(",
    "gm.text.Gemma3Tokenizer()": "doubles.ByteTokenizer()",
    'path="demo"': 'path="base"',
    "num_train_steps=60": "num_train_steps=2",
    "EveryNSteps(20)": "EveryNSteps(2)",
    "max_length=64": "max_length=80",
    "num_batches=2,": "num_batches=2, cache_length=128, pad_length=64,",
    "save_interval_steps=60": "save_interval_steps=2",
    "ckpt_60": "ckpt_2",
    "step=60": "step=2",
    "tokenizer=doubles.ByteTokenizer())\n": "tokenizer=doubles.ByteTokenizer(), cache_length=512)\n",
    "    import optax\n": "    import optax\n    import kauldron_tiny as tiny\n    from gemma import testing as doubles\n",
}


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n}?", "answer": n} for n in ("red", "blue", "grey", "pink")]
    (tmp_path / "colours.json").write_text(json.dumps(rows))
    gm.ckpts.save_params(kauldron_tiny.params_of(), tmp_path / "base", config=kauldron_tiny.CONFIG)
    text, names, used = PAGE.read_text(encoding="utf-8"), {}, set()
    blocks = list(FENCE.finditer(text))
    assert len(blocks) == 4
    for block in blocks:
        code = block[1]
        for old, new in TINY.items():
            used |= {old} if old in code else set()
            code = code.replace(old, new)
        code = code.replace('"/tmp/', f'"{tmp_path}/')
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)  # errors name about the line of the page
        names["doubles"] = testing  # for text in the first block only, as `gm` on the page
    assert used == set(TINY)
    assert (tmp_path / "my-adapter/adapter_config.json").is_file()
    kept = jax.tree.leaves(gm.ckpts.load_params("colours/checkpoints/ckpt_2"))
    again = jax.tree.leaves(names["again"])
    assert len(kept) == len(again) and all(map(jnp.array_equal, kept, again))
