# SPDX-License-Identifier: Apache-2.0
"""What surrounds the PyTorch networks: masks, the preallocated cache, generating, loading, loss. Nothing loads here.

The networks themselves are `gemma/modeling_gemma.py` and its neighbours.
"""
