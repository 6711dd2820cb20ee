# SPDX-License-Identifier: Apache-2.0
"""How fast the PyTorch path reads and writes, beside Hugging Face on the same weights, dtype and threads.

    python benchmarks/bench_torch.py [--model demo] [--dtype bfloat16|float32] [--threads N] [--rounds 5] [--compile]
                                     [--prefill 64,512] [--depths 16,512] [--steps 24]

Prefill is one forward over a prompt that leaves its last token's logits and a filled cache; decoding is greedy, one
sequence, `transformers` called directly and without the overhead of its `generate`. The two run in turns in one
process, so that whatever else the machine does meets both; a ratio is the median over the rounds of the ratio within a
round. Peak memory is that of a fresh process each that loads, reads the longest prompt and writes 16 tokens; both read
the file through the same loader. Decoding one sequence reads every weight once per token: the memory limit is what the
bandwidth of summing the largest weight would allow.

Needs `transformers`. The last line is one JSON object. Close other programs before believing absolute figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time


def prompt(length: int, model):
    import torch

    return torch.tensor([[2, *((1000 + 7 * i % 5000) % model.config.vocab_size for i in range(length - 1))]])


def load_ours(model: str, dtype: str):
    import torch

    from gemma.modeling_gemma import GemmaForCausalLM

    return GemmaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))


def load_theirs(ours):
    """Hugging Face's class around the same tensors."""
    import torch
    import transformers

    from gemma._torch.load import without_values
    from gemma.hf_config import write_config

    values = write_config(ours.config)
    config = transformers.AutoConfig.for_model(**values)
    with without_values():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    state = dict(ours.state_dict())
    if ours.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are computed, not loaded
    for module in model.modules():  # the embedding scale is a computed buffer as well
        if "embed_scale" in module._buffers:
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    return model.eval()


class Ours:
    name = "gemmakit"

    def __init__(self, model, compile: bool = False):
        self.model, self.compile = model, compile

    def decode(self, ids, steps: int) -> list[float]:
        """Seconds per token of each of `steps` steps after the prompt."""
        from gemma._torch.generate import stream
        from gemma.sampling import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=steps + 1)
        times = [time.perf_counter() for _ in stream(self.model, ids, params=params, end_ids=(), compile=self.compile)]
        return [after - before for before, after in itertools.pairwise(times)]

    def prefill(self, ids) -> float:
        import torch

        from gemma._torch.cache import WindowedKVCache

        weight = self.model.get_input_embeddings().weight
        with torch.inference_mode():
            begin = time.perf_counter()
            cache = WindowedKVCache(self.model.config.layers, 1, ids.shape[1] + 64, dtype=weight.dtype)
            self.model(input_ids=ids, kv_cache=cache, logits_to_keep=1)
            return time.perf_counter() - begin


class Theirs:
    name = "transformers"

    def __init__(self, model):
        self.model = model

    def decode(self, ids, steps: int) -> list[float]:
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            times = [time.perf_counter()]
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.item()
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]

    def prefill(self, ids) -> float:
        import torch

        with torch.inference_mode():
            begin = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - begin


def peak(arguments, side: str) -> float:
    """GB that a fresh process needs at most."""
    command = [sys.executable, __file__, "--peak", side, "--model", arguments.model, "--dtype", arguments.dtype]
    command += ["--threads", str(arguments.threads), "--prefill", str(max(arguments.prefill))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def measure_peak(arguments) -> None:
    runner = Ours(load_ours(arguments.model, arguments.dtype))
    if arguments.peak == "theirs":
        runner = Theirs(load_theirs(runner.model))
    runner.prefill(prompt(max(arguments.prefill), runner.model))
    runner.decode(prompt(16, runner.model), 16)
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) / 1e6 for line in status if line.startswith("VmHWM")))


def bandwidth(model) -> float:
    """Bytes per second of summing the largest weight, read as it is."""
    weight = model.get_input_embeddings().weight.detach()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        weight.sum()
        seconds.append(time.perf_counter() - begin)
    return weight.numel() * weight.element_size() / min(seconds)


def rounds(sides, arguments) -> dict[str, dict]:
    """{measurement: tokens per second of both and the median ratio}."""
    found: dict[str, dict[str, list[float]]] = {}
    for index in range(arguments.rounds + 1):  # the first one warms up
        for side in sides if index % 2 else sides[::-1]:
            for length in arguments.prefill:
                rate = length / side.prefill(prompt(length, side.model))
                found.setdefault(f"prefill {length}", {}).setdefault(side.name, []).append(rate)
            for depth in arguments.depths:
                rate = 1 / statistics.median(side.decode(prompt(depth, side.model), arguments.steps))
                found.setdefault(f"decode at {depth}", {}).setdefault(side.name, []).append(rate)
    rows = {}
    for name, rates in found.items():
        ours, theirs = (rates[side.name][1:] for side in sides)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        rows[name] = {"gemmakit": max(ours), "transformers": max(theirs), "ratio": ratio}
    return rows


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=numbers, default=(64, 512), help="lengths of prompts to read")
    parser.add_argument("--depths", type=numbers, default=(16, 512), help="tokens before the decoded ones")
    parser.add_argument("--steps", type=int, default=24, help="tokens decoded at each depth and round")
    parser.add_argument("--compile", action="store_true", help="decode through torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave out the two processes that measure memory")
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        measure_peak(arguments)
        return
    ours = load_ours(arguments.model, arguments.dtype)
    sides = [Ours(ours, arguments.compile), Theirs(load_theirs(ours))]
    with torch.inference_mode():
        ids = prompt(40, ours)
        gap = float((ours(input_ids=ids)["logits"].float() - sides[1].model(input_ids=ids).logits.float()).abs().max())
    rows = rounds(sides, arguments)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    limit = bandwidth(ours) / weights
    print(f"{'tokens per second':20}{'gemmakit':>12}{'transformers':>14}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:20}{row['gemmakit']:12.1f}{row['transformers']:14.1f}{row['ratio']:8.2f}")
    print(f"{'memory limit, decode':20}{limit:12.1f}")
    about = {"model": arguments.model, "dtype": arguments.dtype, "threads": arguments.threads}
    about |= {"torch": torch.__version__, "machine": platform.machine(), "compile": arguments.compile}
    about |= {"rows": rows, "limit": limit, "largest_logit_difference": gap}
    if not arguments.no_memory:
        about["peak_gb"] = {side: peak(arguments, side) for side in ("ours", "theirs")}
        print(f"{'peak memory, GB':20}{about['peak_gb']['ours']:12.2f}{about['peak_gb']['theirs']:14.2f}")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
