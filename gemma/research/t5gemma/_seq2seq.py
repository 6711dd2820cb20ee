# SPDX-License-Identifier: Apache-2.0
"""The public names of `gemma/seq2seq.py` that belong to T5Gemma, where its users look for them. No logic."""

from gemma.seq2seq import Targets, encode_inputs, make_targets, shift_right

__all__ = ["Targets", "encode_inputs", "make_targets", "shift_right"]
