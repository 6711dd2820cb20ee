# SPDX-License-Identifier: Apache-2.0
"""What became of the examples, as numbers and as the table that is printed before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of the whole data set, and of the batches of its first epoch.

    Attributes:
      rows: examples that were read, bad ones not included.
      bad_rows: rows of the files that were no examples.
      kept: examples that are used; `cut` of them lost tokens, `split` became several rows.
      dropped_long, no_labels: examples that are not used: too long; or with nothing (left) to learn.
      tokens: of the kept examples, one bos per row included; `label_tokens` of them are learnt.
      tokens_lost: tokens of dropped examples, and those that were cut off.
      longest, median_length: positions that a kept example needs in a row.
      positions: B * T over all batches (of a preference twice); those without a token are padding.
      batches: of the first epoch; `shapes` counts them by their T.
      packed_rows: rows that hold something; `rows_in_packed`: examples (or pieces) in them.
    """

    rows: int
    bad_rows: int
    kept: int
    cut: int
    split: int
    dropped_long: int
    no_labels: int
    tokens: int
    label_tokens: int
    tokens_lost: int
    longest: int
    median_length: float
    positions: int
    placed_tokens: int
    batches: int
    shapes: Mapping[int, int]
    packed_rows: int
    items: int
    packing: bool
    batch_size: int

    @property
    def padding_share(self) -> float:
        """Share of the positions that hold no token, 0..1."""
        return 1 - self.placed_tokens / self.positions if self.positions else 0.0

    @property
    def label_share(self) -> float:
        """Share of the tokens that are learnt, 0..1."""
        return self.label_tokens / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict:
        """Every number, for JSON."""
        return dataclasses.asdict(self) | {
            "shapes": {str(k): v for k, v in self.shapes.items()},
            "padding_share": self.padding_share,
            "label_share": self.label_share,
        }

    def __str__(self) -> str:
        all_tokens = self.tokens + self.tokens_lost
        lines = [("rows read", f"{self.rows + self.bad_rows:,}")]
        if self.bad_rows:
            lines.append(("  malformed, left out", _part(self.bad_rows, self.rows + self.bad_rows)))
        if self.dropped_long:
            lines.append(("  too long, dropped", _part(self.dropped_long, self.rows)))
        if self.no_labels:
            lines.append(("  nothing to learn, dropped", _part(self.no_labels, self.rows)))
        lines.append(("rows kept", _part(self.kept, self.rows + self.bad_rows)))
        if self.cut:
            lines.append(("  cut to fit", _part(self.cut, self.kept)))
        if self.split:
            lines.append(("  split over several rows", _part(self.split, self.kept)))
        lines += [
            ("tokens", f"{self.tokens:,}"),
            ("  lost by dropping and cutting", _part(self.tokens_lost, all_tokens)),
            ("  learnt (labels)", _part(self.label_tokens, self.tokens)),
            ("length", f"median {self.median_length:,.0f}, longest {self.longest:,}"),
            ("batches per epoch", f"{self.batches:,} of {self.batch_size} rows"),
            ("  width in tokens", ", ".join(f"{width} x {count:,}" for width, count in sorted(self.shapes.items()))),
            ("  padding", _part(self.positions - self.placed_tokens, self.positions)),
        ]
        if self.packing and self.packed_rows:
            lines.append(("  examples per packed row", f"{self.items / self.packed_rows:.1f}"))
        return "\n".join(f"{name:<32}{value}" for name, value in lines)


def _part(some: int, of: int) -> str:
    return f"{some:,} ({100 * some / of if of else 0:.1f} %)"
