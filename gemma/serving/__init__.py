# SPDX-License-Identifier: Apache-2.0
"""The engine: what drives a model of any framework. `runner.py` is the contract between engine and hardware."""
