"""Where kauldron is not installed nothing of this folder can be collected; `make test-kauldron` installs it."""

import importlib.util

import pytest

# A folder of this name (this one) is no package: only one with an origin counts.
_SPEC = importlib.util.find_spec("kauldron")
INSTALLED = _SPEC is not None and _SPEC.origin is not None


def pytest_ignore_collect(collection_path, config):
    """Collecting imports kauldron and TensorFlow: only where these tests are asked for, `-m kauldron`."""
    unwanted = not INSTALLED or "not kauldron" in config.option.markexpr
    return True if unwanted and collection_path.name.startswith("test_") else None


@pytest.fixture(scope="package", autouse=True)
def quick_compiles(tmp_path_factory):
    """Many small programs, most of them more than once: what costs is to compile them."""
    import jax

    changes = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name, False) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
