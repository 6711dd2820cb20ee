# SPDX-License-Identifier: Apache-2.0
"""The command line, `gemma`: one module per verb; `__main__.py` puts them together and turns errors into exit codes.

Verbs parse flags and print; what they do is done by the layers below. Modules here import nothing heavy when loaded, so
that `gemma --help` is immediate; `_backend.py` is the one place that reaches a model.
"""
