# SPDX-License-Identifier: Apache-2.0
"""Bounded readers, one file per on-disk format: bytes and their rules, no tensor names and no configuration values.

`gemma.checkpoint` chooses the reader by a file's content and puts one interface over all of them.
"""
