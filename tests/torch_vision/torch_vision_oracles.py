# SPDX-License-Identifier: Apache-2.0
"""From the tiny Hugging Face oracles to our models: configurations, and weights under our names."""

from __future__ import annotations

import dataclasses

import torch

from gemma.config import SiglipVisionConfig
from gemma.hf_config import read_config


def tower_config(config) -> SiglipVisionConfig:
    """The configuration of a `SiglipVisionConfig` of transformers."""
    names = [field.name for field in dataclasses.fields(SiglipVisionConfig)]
    found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return SiglipVisionConfig(**found)


def our_config(config):
    """The configuration that our reader makes of an oracle's own `config.json`."""
    return read_config(config.to_dict() | dict(model_type=config.model_type))


def load(model: torch.nn.Module, oracle: torch.nn.Module) -> torch.nn.Module:
    """The oracle's state dict in our model, as it is: the copy of a tied head and the tower's own root included."""
    model.load_state_dict(oracle.state_dict(), strict=True)
    return model.eval()
