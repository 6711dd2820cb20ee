# SPDX-License-Identifier: Apache-2.0
"""The tiny configurations of tests/weights and the small vocabularies of tests/text serve here as well."""

import sys
from pathlib import Path

for folder in ("weights", "text"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
