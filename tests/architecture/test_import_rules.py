"""Imports only go down, facts load no framework, packages are lazy. The layers are those of ARCHITECTURE.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(p for top in ("gemma", "siglip", "paligemma") for p in (ROOT / top).rglob("*.py"))
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
NEVER = {"transformers", "tensorflow", "kauldron", "gguf", "xllamacpp", "peft", "trl"}
# Small libraries that layer 0 may use, beside the standard library.
LAYER0 = {"numpy", "ml_dtypes", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "PIL", "google"}
# Of an extra: layer 0 may use them inside of a function, so that a module imports without them.
LAYER0_OPTIONAL = {"yaml"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def framework(module: str) -> str:
    """The framework a module belongs to: "jax", "torch" or "" (none)."""
    parts = module.split(".")
    if "_torch" in parts[1:] or any(p.startswith("modeling_") or p.endswith("_torch") for p in parts[1:]):
        return "torch"
    if module.startswith(("gemma.gm", "gemma.peft", "gemma.research", "gemma.multimodal")) or parts[-1].endswith(
        "_jax"
    ):
        return "jax"
    return ""


def layer(module: str) -> int:
    if module.startswith("gemma.cli") or module == "gemma.serving.server":
        return 3
    if module == "gemma.serving.runner":
        return 0  # the contract itself: a Protocol over facts
    if module.startswith("gemma.serving"):
        return 2
    if framework(module) or module.startswith("gemma.kernels"):
        return 1
    return 0


def imports(path: Path):
    """Every absolute module name that a file imports, at any depth of the code."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            yield base
            # `from gemma.gm import nn` imports the module gemma.gm.nn
            yield from (f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}"))


def imported_at_once(path: Path) -> set[str]:
    """Top names of the modules that importing a file imports: those of imports outside of functions."""
    found, todo = set(), [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def violations(name: str, imported: set[str]):
    """Why a module may not import what it imports; empty if it may."""
    tops = {i.split(".")[0] for i in imported}
    own = framework(name)
    if tops & NEVER and name != "gemma.gm._kauldron":
        yield f"imports {sorted(tops & NEVER)}, which gemmakit never does at run time"
    if tops & JAX and "torch" in tops:
        yield "imports jax and torch in one module"
    if tops & JAX and own != "jax":
        yield "imports jax outside a JAX module"
    if "torch" in tops and own != "torch":
        yield "imports torch outside a PyTorch module"
    if layer(name) == 0:
        foreign = tops - LAYER0 - LAYER0_OPTIONAL - sys.stdlib_module_names - {"gemma", "siglip", "paligemma"}
        if foreign:
            yield f"is a fact (layer 0) but imports {sorted(foreign)}"
    for target in (i for i in imported if i.split(".")[0] in ("gemma", "siglip", "paligemma") and is_module(i)):
        if layer(target) > layer(name):
            yield f"imports upwards: {target}"
        if layer(name) == 1 and framework(target) not in ("", own):
            yield f"imports the other framework's {target}"


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_imports_go_down(path):
    assert not list(violations(module_name(path), set(imports(path))))
    assert not imported_at_once(path) & LAYER0_OPTIONAL or layer(module_name(path)) > 0


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("gemma.tokenizer", {"jax.numpy"}),
        ("gemma.modeling_gemma", {"torch", "jax"}),
        ("gemma.modeling_gemma", {"torch", "gemma.gm.nn._layers"}),
        ("gemma.config", {"pandas"}),
        ("gemma.hub", {"gemma.cli.generate"}),
        ("gemma.gm.nn._layers", {"transformers"}),
    ],
)
def test_the_rule_bites(name, imported):
    assert list(violations(name, imported))


def test_an_import_inside_of_a_function_comes_later(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nif 1:\n    from c import d\ndef f():\n    import yaml\nclass C:\n    import e\n")
    assert imported_at_once(path) == {"a", "c", "e"}


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_facts_load_no_framework():
    modules = [module_name(p) for p in PRODUCT if layer(module_name(p)) == 0]
    loaded = loaded_after("\n".join(f"import {m}" for m in modules))
    assert not loaded & {"jax", "torch", "flax", "transformers", "tensorflow"}


def test_gm_is_lazy():
    assert not loaded_after("from gemma import gm\ndir(gm)") & {"jax", "flax", "torch"}


def test_every_public_name_exists():
    code = "import importlib\n" + "\n".join(
        f"m = importlib.import_module({module_name(p)!r})\nfor n in getattr(m, '__all__', ()): getattr(m, n)"
        for p in PRODUCT
        if p.name == "__init__.py" and framework(module_name(p)) != "torch"
    )
    loaded_after(code)


def test_wrong_import_gets_a_sentence():
    import gemma

    with pytest.raises(AttributeError, match="from gemma import gm"):
        _ = gemma.Gemma3_1B
