# SPDX-License-Identifier: Apache-2.0
"""PyTorch archives: everything that torch.save writes is read as torch.load reads it, without torch in the process.

The oracle is `torch.load(weights_only=True)`. Names and axes of gemma_pytorch are `foreign_layouts`, which knows
nothing of the table under test. What must be refused is tests/hostile/test_archives_hostile.py.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tracemalloc

import foreign_layouts as layouts
import ml_dtypes
import numpy as np
import pytest
import torch

from gemma import weights
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.config import SiglipVisionConfig
from gemma.errors import CheckpointError, FormatError, UnsupportedError, WeightsMismatch
from gemma.hf_config import write_config
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors, tiny_config

BF16 = np.dtype(ml_dtypes.bfloat16)
TOWER = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
CONFIGS = {
    "gemma": tiny_config("gemma", num_hidden_layers=2),
    "gemma-mha": tiny_config("gemma", num_hidden_layers=2, num_key_value_heads=4),
    "gemma2": tiny_config("gemma2", num_hidden_layers=2),
    "gemma3": tiny_config("gemma3"),
    "gemma3-vision": tiny_config("gemma3", vision=TOWER, model_type="gemma3", mm_tokens_per_image=4),
}
NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor as numpy, bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BF16)
    return tensor.numpy()


def check_like_torch(path, mmap=True):
    """Every tensor that torch sees is there with its values, dtype and shape, and nothing else is."""
    oracle = torch.load(path, weights_only=True, map_location="cpu")
    oracle = oracle.get("model_state_dict", oracle)
    with open_checkpoint(path, mmap=mmap) as opened:
        assert opened.format == "ckpt"
        assert set(opened.tensors) == set(oracle)
        for name, tensor in oracle.items():
            info = opened.info(name)
            assert info.shape == tuple(tensor.shape), name
            if info.dtype in NAMES:
                assert NAMES[info.dtype] == tensor.dtype, name
            found, expected = opened.read(name), numbers(tensor)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            assert found.tobytes() == expected.tobytes(), name
            if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
                as_float = opened.read(name, np.float32)
                assert np.array_equal(as_float, numbers(tensor.float()), equal_nan=True), name


def hf_state(config, seed=0):
    return weights.pack(random_tensors(config, seed), config, format="hf")


def state_of(config, dtype=torch.float32, seed=0):
    return {n: torch.from_numpy(a.copy()).to(dtype) for n, a in layouts.gemma_pytorch(hf_state(config, seed)).items()}


# ---- what torch.save writes ---------------------------------------------------------------------------------------------


def _module_state():
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    state = module.state_dict()
    assert state._metadata  # an attribute of the OrderedDict: pickled through BUILD
    return state


def _shared():
    whole = torch.arange(60, dtype=torch.float32)
    return {"whole": whole, "middle": whole[10:30].view(4, 5), "last": whole[59:], "again": whole}


VIEWS = {
    "transposed": lambda m: m.T,
    "columns": lambda m: m[:, 2:5],
    "every_other": lambda m: m[::2],
    "diagonal": lambda m: torch.as_strided(m, (6,), (9,)),
    "permuted": lambda m: m.view(2, 3, 8).permute(2, 0, 1),
    "repeated": lambda m: m[0].expand(5, 8),
}


FILES = {
    "float32": lambda: {"a": torch.randn(3, 4), "b.c": torch.randn(7)},
    "float16": lambda: {"a": torch.randn(3, 4).half()},
    "bfloat16": lambda: {"a": torch.randn(3, 4).bfloat16(), "nan": torch.tensor([float("nan"), 1.0]).bfloat16()},
    "integers": lambda: {
        "i8": torch.arange(-128, 128).to(torch.int8),
        "u8": torch.arange(256).to(torch.uint8),
        "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "i64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
    },
    "float64": lambda: {"a": torch.randn(3, dtype=torch.float64)},
    "complex": lambda: {"freqs_cis": torch.polar(torch.ones(4, 3), torch.randn(4, 3)), "a": torch.randn(2)},
    "scalar": lambda: {"scalar": torch.tensor(3.5), "a": torch.randn(2)},
    "parameters": lambda: {"a": torch.nn.Parameter(torch.randn(2, 3)), "b": torch.nn.Parameter(torch.randn(2), False)},
    "a module's state dict": _module_state,
    "ordered": lambda: collections.OrderedDict(z=torch.randn(2), a=torch.randn(3)),
    "one storage, many tensors": _shared,
    "strides along an axis of one": lambda: {
        "row": torch.randn(6, 8)[:1].T,
        "a": torch.as_strided(torch.ones(9), (1, 3), (7, 1)),
    },
    "a name of many kinds": lambda: {
        "模型.weight": torch.randn(2),
        "with space/and slash": torch.randn(3),
        "": torch.ones(1),
    },
    "many": lambda: {f"layer.{i}": torch.full((2,), float(i)) for i in range(700)},  # memo ids above 255
}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "copy"])
@pytest.mark.parametrize("name", FILES)
def test_reads_what_torch_saves(name, mmap, tmp_path):
    torch.manual_seed(0)
    torch.save(FILES[name](), tmp_path / "file.bin")
    check_like_torch(tmp_path / "file.bin", mmap)


@pytest.mark.parametrize("view", VIEWS)
def test_values_that_do_not_lie_in_order_are_refused_by_name(view, tmp_path):
    """Never read as if they did; the remedy is one call."""
    torch.save({"fine": torch.ones(3), "w.odd": VIEWS[view](torch.randn(6, 8))}, tmp_path / "m.ckpt")
    with pytest.raises(UnsupportedError, match=r"m\.ckpt: w\.odd .*contiguous"):
        open_checkpoint(tmp_path / "m.ckpt")


def test_an_empty_tensor_is_refused_by_name(tmp_path):
    torch.save({"fine": torch.ones(3), "nothing": torch.zeros(0, 4)}, tmp_path / "m.ckpt")
    with pytest.raises(FormatError, match="nothing"):
        open_checkpoint(tmp_path / "m.ckpt")


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "copy"])
def test_a_flipped_bit_is_found_by_the_checksum(mmap, tmp_path):
    """The damaged tensor is refused when it is read, its neighbours are not; torch itself does not look."""
    state = {"a": torch.arange(64.0), "b": torch.arange(100.0, 164.0), "whole": torch.randn(3, 3)}
    torch.save(state, tmp_path / "m.ckpt")
    data = bytearray((tmp_path / "m.ckpt").read_bytes())
    data[data.find(numbers(state["b"]).tobytes()) + 37] ^= 4
    (tmp_path / "m.ckpt").write_bytes(data)
    with open_checkpoint(tmp_path / "m.ckpt", mmap=mmap) as opened:
        assert np.array_equal(opened.read("a"), numbers(state["a"]))
        for read in (opened.read, opened.raw, lambda name: opened.read_rows(name, 0, 2)):
            with pytest.raises(FormatError, match=r"m\.ckpt at byte .*checksum"):
                read("b")


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(4.0)}, tmp_path / "m.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_like_torch(tmp_path / "m.ckpt")


@pytest.mark.parametrize("wrapper", ["model_state_dict", "bare"])
def test_the_dictionary_gemma_pytorch_looks_for(wrapper, tmp_path):
    state = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    saved = {"model_state_dict": state, "epoch": 3, "loss": 0.25, "note": "x", "nothing": None, "on": True}
    torch.save(saved if wrapper == "model_state_dict" else state, tmp_path / "m.ckpt")
    check_like_torch(tmp_path / "m.ckpt")


def test_optimizer_state_beside_the_weights_is_left_alone(tmp_path):
    """A training script's file: only the model's tensors are the checkpoint's."""
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(2, 3)} for i in range(2)}  # as Adam keeps them
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "maximize": None, "params": [0, 1]}
    optimizer = {"state": moments, "param_groups": [group]}
    saved = {"model_state_dict": torch.nn.Linear(3, 2).state_dict(), "optimizer": optimizer, "step": 1}
    torch.save(saved, tmp_path / "m.ckpt")
    check_like_torch(tmp_path / "m.ckpt")


def test_a_list_or_a_lone_tensor_is_no_checkpoint(tmp_path):
    for value in ([torch.randn(2)], torch.randn(2), {"a": 1}, {1: torch.randn(2)}, 7):
        torch.save(value, tmp_path / "m.ckpt")
        with pytest.raises((FormatError, UnsupportedError), match="m.ckpt"):
            open_checkpoint(tmp_path / "m.ckpt")


def test_the_newer_pickle_protocols(tmp_path):
    """torch.save writes protocol 2; another one must be read rightly or refused by name."""
    state = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16()}
    for protocol in (2, 3, 4, 5):
        torch.save(state, tmp_path / "m.ckpt", pickle_protocol=protocol)
        try:
            with open_checkpoint(tmp_path / "m.ckpt") as opened:
                for name, tensor in state.items():
                    assert opened.read(name).tobytes() == numbers(tensor).tobytes()
        except CheckpointError as error:
            assert protocol > 2 and "m.ckpt" in str(error)


def test_a_storage_of_another_device_is_only_bytes(tmp_path):
    """The pickle says "cuda:0"; the values are in the file all the same."""
    state = {"a": torch.randn(2, 3)}
    torch.save(state, tmp_path / "cpu.ckpt")
    data = (tmp_path / "cpu.ckpt").read_bytes()
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    import zipfile

    with zipfile.ZipFile(tmp_path / "cpu.ckpt") as source, zipfile.ZipFile(tmp_path / "gpu.ckpt", "w") as target:
        for member in source.infolist():
            content = source.read(member).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(member.filename, content)
    check_like_torch(tmp_path / "gpu.ckpt")


def test_the_folder_inside_the_archive_may_have_any_name(tmp_path):
    import io

    torch.save({"a": torch.arange(4.0)}, tmp_path / "name with spaces.pt")
    check_like_torch(tmp_path / "name with spaces.pt")
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, buffer)  # its folder is called "archive"
    (tmp_path / "buffer.bin").write_bytes(buffer.getvalue())
    check_like_torch(tmp_path / "buffer.bin")


def test_big_endian_bytes_are_not_taken_for_little_ones(tmp_path):
    import zipfile

    torch.save({"a": torch.arange(4.0)}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as source, zipfile.ZipFile(tmp_path / "big.ckpt", "w") as target:
        for member in source.infolist():
            content = source.read(member)
            target.writestr(member.filename, b"big" if member.filename.endswith("byteorder") else content)
    with pytest.raises((UnsupportedError, FormatError), match="big"):
        open_checkpoint(tmp_path / "big.ckpt")


def test_reading_needs_no_torch_and_little_memory(tmp_path):
    torch.save({"large": torch.zeros(8_000_000), "small": torch.arange(4.0)}, tmp_path / "m.ckpt")
    script = (
        "import sys; from gemma.checkpoint import open_checkpoint; "
        f"print(open_checkpoint({str(tmp_path / 'm.ckpt')!r}).read('small').sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6.0", "False"]
    tracemalloc.start()
    try:
        with open_checkpoint(tmp_path / "m.ckpt", mmap=False) as opened:
            opened.read("small")
            assert tracemalloc.get_traced_memory()[1] < 4_000_000  # of 32 MB
    finally:
        tracemalloc.stop()


# ---- gemma_pytorch's names ----------------------------------------------------------------------------------------------


def canonical(opened, config, **options):
    return {tensor.name: reader(np.float32) for tensor, reader in load_tensors(opened, config, **options)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_layout_of_gemma_pytorch(family, dtype, tmp_path):
    config = CONFIGS[family]
    state = state_of(config, dtype)
    state["freqs_cis"] = torch.polar(torch.ones(8, 4), torch.randn(8, 4))
    state["local_freqs_cis"] = state["global_freqs_cis"] = state["freqs_cis"]
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    expected = {n: torch.from_numpy(a).to(dtype).float().numpy() for n, a in random_tensors(config).items()}
    with open_checkpoint(tmp_path / "model.ckpt") as opened:
        found = canonical(opened, config)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name


def test_text_only_leaves_the_tower_in_the_file(tmp_path):
    from gemma.config import text_only

    config = CONFIGS["gemma3-vision"]
    torch.save({"model_state_dict": state_of(config)}, tmp_path / "model.ckpt")
    with open_checkpoint(tmp_path / "model.ckpt") as opened:
        found = canonical(opened, text_only(config), text_only=True)
    expected = random_tensors(text_only(config))
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_int8_is_weight_times_scaler(family, tmp_path):
    """Codes [out, in] with one float per output row; the embedding has one per token. Norms stay floats."""
    config = CONFIGS[family]
    state, expected_state = {}, {}
    for name, tensor in state_of(config).items():
        if tensor.ndim == 2:
            codes, scaler = layouts.int8(tensor.numpy())
            state[name] = torch.nn.Parameter(torch.from_numpy(codes), requires_grad=False)
            state[name.replace(".weight", ".weight_scaler")] = torch.nn.Parameter(torch.from_numpy(scaler))
            expected_state[name] = codes.astype(np.float32) * scaler[:, None]
        else:
            state[name] = tensor
            expected_state[name] = tensor.numpy()
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    heads = (config.num_attention_heads, config.num_key_value_heads)
    expected = weights.unpack(layouts.from_gemma_pytorch(expected_state, *heads), config, format="hf")
    with open_checkpoint(tmp_path / "model.ckpt") as opened:
        found = canonical(opened, config)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name
        rows = opened.read_rows("embedder.weight", 5, 9)
        assert np.array_equal(rows, expected["embed"][5:9])


@pytest.mark.parametrize("fault", ["missing scaler", "short scaler", "scaler without codes", "codes of a norm"])
def test_int8_that_does_not_fit_together_is_refused(fault, tmp_path):
    config = CONFIGS["gemma"]
    state = state_of(config)
    name = "model.layers.1.mlp.up_proj"
    codes, scaler = (torch.from_numpy(a) for a in layouts.int8(state[f"{name}.weight"].numpy()))
    state[f"{name}.weight"], state[f"{name}.weight_scaler"] = codes, scaler
    if fault == "missing scaler":
        del state[f"{name}.weight_scaler"]
    elif fault == "short scaler":
        state[f"{name}.weight_scaler"] = scaler[:-1].clone()
    elif fault == "scaler without codes":
        state[f"{name}.weight"] = codes.float()
    else:
        state["model.norm.weight"] = torch.ones(config.hidden_size, dtype=torch.int8)
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    with (
        pytest.raises(CheckpointError, match=r"model\.norm|up_proj"),
        open_checkpoint(tmp_path / "model.ckpt") as opened,
    ):
        canonical(opened, config)


def test_shards_of_a_folder(tmp_path):
    config = CONFIGS["gemma3"]
    state = state_of(config)
    names, index = list(state), {}
    for n, start in enumerate(range(0, len(names), 30)):
        file = f"pytorch_model-{n:05}.bin"
        torch.save({name: state[name] for name in names[start : start + 30]}, tmp_path / file)
        index |= dict.fromkeys(names[start : start + 30], file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    expected = random_tensors(config)
    with open_checkpoint(tmp_path) as opened:
        assert opened.config() == config
        found = canonical(opened, None)
        assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize(
    "fault", ["missing file", "extra tensor", "missing tensor", "two places", "up and away", "absolute"]
)
def test_a_false_index_is_refused(fault, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    a, b = {"a": torch.randn(2)}, {"b": torch.randn(3)}
    index = {"a": "one.bin", "b": "two.bin"}
    if fault == "extra tensor":
        b["c"] = torch.randn(2)
    elif fault == "missing tensor":
        index["c"] = "two.bin"
    elif fault == "two places":
        b["a"] = torch.randn(2)
    elif fault == "up and away":
        index["b"] = "../two.bin"
        torch.save(b, tmp_path / "two.bin")
    elif fault == "absolute":
        index["b"] = str(tmp_path / "two.bin")
        torch.save(b, tmp_path / "two.bin")
    torch.save(a, folder / "one.bin")
    if fault != "missing file":
        torch.save(b, folder / "two.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="two.bin|index.json"):
        open_checkpoint(folder)


def test_names_of_another_model_are_listed(tmp_path):
    config = CONFIGS["gemma3"]
    state = state_of(config)
    state["model.layers.0.self_attn.surprise.weight"] = torch.ones(3)
    del state["model.norm.weight"], state["model.layers.3.self_attn.qkv_proj.weight"]
    state["model.layers.5.mlp.up_proj.weight"] = torch.ones(3, 4)
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(WeightsMismatch) as caught, open_checkpoint(tmp_path / "model.ckpt") as opened:
        load_tensors(opened, config)
    for name in ("surprise", "model.norm.weight", "layers.3.self_attn.qkv_proj", "layers.5.mlp.up_proj"):
        assert name in str(caught.value)


# ---- what we write ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_loads_what_we_write(family, dtype, tmp_path):
    """`weights_only` and `mmap`, every tensor, aligned for mapping, tensors that own their storage."""
    config = CONFIGS[family]
    values = random_tensors(config)
    save(tmp_path / "out", from_arrays(values, config), config, format="ckpt", dtype=dtype)
    [file] = (tmp_path / "out").glob("*.ckpt")
    loaded = torch.load(file, weights_only=True, mmap=True)["model_state_dict"]
    expected = layouts.gemma_pytorch(hf_state(config))
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        tensor = loaded[name]
        assert tensor.dtype == getattr(torch, dtype) and tensor.is_contiguous(), name
        assert torch.equal(tensor, torch.from_numpy(array.copy()).to(tensor.dtype)), name
    plain = torch.load(file, weights_only=True)["model_state_dict"]
    assert all(torch.equal(plain[name], loaded[name]) for name in plain)


def test_int8_that_we_write_dequantizes_in_torch(tmp_path):
    config = CONFIGS["gemma2"]
    values = random_tensors(config)
    report = save(tmp_path / "out", from_arrays(values, config), config, format="ckpt", quantize="int8")
    state = torch.load(tmp_path / "out/model.ckpt", weights_only=True)["model_state_dict"]
    errors = {tensor.name: tensor for tensor in report.tensors}
    for name, array in layouts.gemma_pytorch(hf_state(config)).items():
        if array.ndim == 1:
            assert torch.equal(state[name], torch.from_numpy(array)), name
            assert name.replace(".weight", ".weight_scaler") not in state
            continue
        codes, scaler = state[name], state[name.replace(".weight", ".weight_scaler")]
        assert codes.dtype == torch.int8 and scaler.shape == (array.shape[0],)
        error = np.abs((codes.float() * scaler[:, None]).numpy().astype(np.float64) - array)
        assert (error <= scaler.numpy()[:, None] * 0.5 * (1 + 1e-5)).all(), name  # half a step
        assert error.max() == pytest.approx(errors[name].max_error, rel=1e-5), name


def test_the_folder_we_write_is_a_whole_model(tmp_path):
    config = CONFIGS["gemma3"]
    save(tmp_path / "out", from_arrays(random_tensors(config), config), config, format="ckpt")
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.config() == config and opened.format == "ckpt"
        assert len(list(load_tensors(opened))) == len(weights.tensors(config))
