# SPDX-License-Identifier: Apache-2.0
"""Every guide in `examples/` runs, on tiny random models, and says what its prose claims."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# guides that tests of another folder run: tests/gm/tools/test_tools_example.py, tests/kauldron/test_kauldron_example.py
ELSEWHERE = {"tools", "kauldron_seq2seq"}


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def falls(found) -> bool:
    """Whether the second of two numbers is the smaller one."""
    return float(found[2]) < float(found[1])


def guide(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sampling(capsys):
    guide("sampling").main(["--max-new-tokens", "4", "--methods", "your own", "params"])
    said = capsys.readouterr().out
    assert "alone the same: True" in said and "the Sampler's, too: True" in said
    assert said.count("your own") == said.count("params") == 1
    assert said.count("UserTurn") == 2


def test_the_users_own_method_never_repeats():
    from gemma import gm

    loaded, module = gm.testing.tiny_model(), guide("sampling")
    out = module.make_sampler(loaded).sample("abc", max_new_tokens=32, sampling=module.NeverTwice(), return_state=True)
    seen = [*loaded.tokenizer.encode("abc", add_bos=True), *filter(None, out.tokens.tolist())]
    assert len(seen) == len(set(seen)) > 4


def test_lora(capsys):
    guide("lora").main(["--max-new-tokens", "4", "--steps", "0"])
    said = capsys.readouterr().out
    assert "7,584 numbers in the adapters" in said
    assert float(re.search(r"logits differ by (.*)", said)[1]) < 1e-5
    assert "14 adapted matrices: adapter, adapter.gguf" in said and said.count("next token") == 3


def test_multimodal(capsys):
    guide("multimodal").main(["--max-new-tokens", "4"])
    said = capsys.readouterr().out
    assert "0 <start_of_image> and comes with 1 images" in said
    assert "pictures: [(300, 900, 3), (300, 300, 3), (300, 300, 3), (300, 300, 3)]" in said
    assert "ids: 8 - logits: (1, 8, 320) - tokens per picture: 4" in said


def test_multimodal_needs_a_model_with_vision(tmp_path, capsys):
    from gemma import testing

    path = testing.write_tiny_gguf(tmp_path / "text.gguf", testing.tiny_config("gemma"))
    with pytest.raises(SystemExit):
        guide("multimodal").main(["--model", str(path)])
    assert "has no vision encoder" in capsys.readouterr().err


def test_tokenizer(capsys):
    guide("tokenizer").main([])
    said = capsys.readouterr().out
    assert said.count("the same:   True") == 2 and "spelled:    True" in said
    assert "is '<unused0>'" in said and "is '<thought>'" in said
    assert "'漢', '字'" in said


def run_sharding(*more: str) -> str:
    """In a process of its own: how many devices there are is decided once."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "sharding.py"), "--max-new-tokens", "4", *more],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sharding():
    said = run_sharding()
    assert "8 devices: cpu" in said
    assert said.count("the texts of one device: True") == 2
    assert said.count("(2, 72, 24) on each") == 1  # the heads in two parts
    assert said.count("one device holds 100%") == 0


def test_search(capsys):
    guide("search").main(["--dim", "16"])
    said = capsys.readouterr().out
    assert said.count("0.") >= 4 and "question: Which planet" in said
    assert "alone the same: True" in said and "16 of 32 numbers: (4, 16)" in said
    assert "each text is nearest to itself: True" in said


# Guides that train compile a step each, 5 to 15 seconds: one in the default run, whose parts the others share.


@pytest.mark.slow
def test_lora_is_trained(capsys):
    guide("lora").main(["--max-new-tokens", "4", "--steps", "4"])
    said = capsys.readouterr().out
    assert falls(re.search(r"4 steps on 4 sayings: the loss went from (\S+) to (\S+)", said))
    assert "14 adapted matrices" in said


def test_seq2seq(capsys):
    guide("seq2seq").main(["--steps", "12"])
    said = capsys.readouterr().out
    assert "rows kept" in said and falls(re.search(r"went from (\S+) to (\S+); ended by: steps", said))
    assert "written: adapter, checkpoints" in said and said.count("->") == 2


@pytest.mark.slow
def test_dpo(capsys):
    guide("dpo").main(["--steps", "8"])
    margins = re.findall(r"leads by (\S+),", capsys.readouterr().out)
    assert float(margins[0]) == 0 < float(margins[-1])  # it begins at the reference


@pytest.mark.slow
def test_classification(capsys):
    guide("classification").main(["--steps", "12"])
    said = capsys.readouterr().out
    assert "labels and their tokens: {'negative': " in said and "held out: " in said
    assert re.search(r"training: \d+% right at first, (8|9|10)\d% at the end|, 100% at the end", said)


@pytest.mark.slow
def test_finetune_images(capsys):
    guide("finetune_images").main(["--steps", "8"])
    said = capsys.readouterr().out
    assert "'images': (4, 1, 16, 16, 3)" in said and falls(re.search(r"loss (\S+) at the first step, (\S+) at", said))


@pytest.mark.slow
def test_qat(capsys):
    guide("qat").main(["--steps", "4"])
    said = capsys.readouterr().out
    assert falls(re.search(r"loss (\S+) at the first step, (\S+) at", said))
    assert re.search(r"model-q4_0.gguf, .* same arg-max (\d+) of \1\n", said)


@pytest.mark.slow
def test_training_over_devices():
    said = run_sharding("--steps", "2")
    assert said.count("as on one device: True") == 2


def test_every_guide_is_run():
    guides = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert guides <= tested | ELSEWHERE
