# SPDX-License-Identifier: Apache-2.0
"""Helpers of the JAX side that are not part of its public surface: batch dimensions, attention masks."""
