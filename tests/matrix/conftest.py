# SPDX-License-Identifier: Apache-2.0
"""The layouts of other projects, as tests/formats describes them, serve here as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
