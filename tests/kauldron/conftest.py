"""Where kauldron is not installed nothing of this folder can be collected; `make test-kauldron` installs it."""

import importlib.util

# A folder of this name (this one) is no package: only one with an origin counts.
_SPEC = importlib.util.find_spec("kauldron")
INSTALLED = _SPEC is not None and _SPEC.origin is not None

collect_ignore_glob = [] if INSTALLED else ["test_*.py"]
