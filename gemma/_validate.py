# SPDX-License-Identifier: Apache-2.0
"""Range and name checks shared by the configuration classes; each failure is one ConfigError that names the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma.errors import ConfigError


def check_number(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{type(config).__name__}.{name}: expected a number in {low:g}..{high:g}, got {value!r}")


def check_int(config: Any, low: int, high: int, *names: str) -> None:
    check_number(config, low, high, *names)
    for name in names:
        if isinstance(getattr(config, name), float):
            raise ConfigError(f"{type(config).__name__}.{name}: expected a whole number, got {getattr(config, name)!r}")


def from_mapping(cls: type, values: Mapping[str, Any]):
    valid = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown field {', '.join(unknown)}; the fields are: {', '.join(valid)}")
    return cls(**values)
