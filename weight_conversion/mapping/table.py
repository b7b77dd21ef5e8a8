"""One table per family says which training tensor is which Hugging Face tensor. Both directions read it.

A row has three columns: the training tensors, those of the Hugging Face folder with the family's own code, and those of
a folder that transformers' own Llama reads. `Table.as_llama()` is the table with the third in the place of the second.

A checkpoint's Layout is one choice of each group that its family leaves open (how the embedding is split, whether q, k
and v are fused, ...). Rows that hold only under a choice name it in `only`. When a Table is built it is checked: under
no layout a training name or a Hugging Face name twice.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .rules import ModelShape, Rule

LAYER = "{layer}"

Layout = frozenset[str]
"""One choice of each group of a Table, for example {"hidden split", "wqkv", "no bias", ...}."""


@dataclass(frozen=True)
class Column:
    """Tensors of a Hugging Face folder: names, the words of their shapes, and the rule by which ranks share them."""

    hf: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    rule: Rule


@dataclass(frozen=True)
class Row:
    """`training` tensors of each rank hold, laid out by `rule`, the `hf` tensors of the shapes `dims`.

    `dims` has one tuple per Hugging Face name; its words are attributes of ModelShape. `llama` says the same of a
    Llama folder where it differs.
    """

    training: tuple[str, ...]
    hf: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    rule: Rule
    only: Layout = frozenset()
    llama: Column | None = None

    @property
    def per_layer(self) -> bool:
        return LAYER in self.hf[0]

    def as_llama(self) -> Row:
        if self.llama is None:
            return self
        return replace(self, hf=self.llama.hf, dims=self.llama.dims, rule=self.llama.rule, llama=None)


@dataclass(frozen=True)
class Entry:
    """A Row for one layer, its names and shapes filled in.

    `layer` is the layer that it stands in or, of the tensors before and behind all layers, the first or the last.
    """

    training: tuple[str, ...]
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    rule: Rule
    layer: int = 0


@dataclass(frozen=True)
class Table:
    """The rows of a family and the groups of choices that a training checkpoint makes among them.

    The rows stand in the order in which a model uses their tensors: some before all layers, some behind them.
    """

    rows: tuple[Row, ...]
    choices: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...] = ()
    """Patterns of training tensors that carry no weight (recomputed tables)."""

    def __post_init__(self) -> None:
        known = set(itertools.chain.from_iterable(self.choices))
        for row in self.rows:
            unknown = row.only - known
            if unknown:
                raise ValueError(f"row {row.hf} names unknown choices {sorted(unknown)}")
            if len(row.dims) != len(row.hf) or {LAYER in name for name in row.training + row.hf} != {row.per_layer}:
                raise ValueError(f"row {row.hf} is not whole: one shape per name, every name of a layer or none")
        asked = set(itertools.chain.from_iterable(row.only for row in self.rows))
        for group in self.choices:
            if not asked & set(group):
                raise ValueError(f"no row asks for any of {group}")
        for side in ("training", "hf"):
            for one, other in itertools.combinations(self.rows, 2):
                twice = sorted(set(getattr(one, side)) & set(getattr(other, side)))
                if twice and self._hold_together(one, other):
                    raise ValueError(f"{side} names twice under {sorted(one.only | other.only)}: {twice}")

    def _hold_together(self, one: Row, other: Row) -> bool:
        """Whether there is a layout in which both rows hold."""
        return all(len((one.only | other.only) & set(group)) <= 1 for group in self.choices)

    def as_llama(self) -> Table:
        """The table of a Llama folder; checked like this one."""
        return replace(self, rows=tuple(row.as_llama() for row in self.rows))

    def layouts(self) -> Iterator[Layout]:
        return (frozenset(combination) for combination in itertools.product(*self.choices))

    def rows_for(self, layout: Layout) -> list[Row]:
        return [row for row in self.rows if row.only <= layout]

    def entries(self, layout: Layout, shape: ModelShape) -> list[Entry]:
        """Every row of `layout`, once per layer, in the order of the table."""
        entries = []
        reached = 0
        for per_layer, run in itertools.groupby(self.rows_for(layout), key=lambda row: row.per_layer):
            group = list(run)
            layers: Sequence[int] = range(shape.num_layers) if per_layer else (reached,)
            entries += [_fill(row, layer, shape) for layer in layers for row in group]
            reached = max(0, shape.num_layers - 1)
        return entries

    def is_ignored(self, training_name: str) -> bool:
        return any(re.fullmatch(pattern, training_name) for pattern in self.ignored)


def _fill(row: Row, layer: int, shape: ModelShape) -> Entry:
    def named(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace(LAYER, str(layer)) for name in names)

    shapes = tuple(tuple(getattr(shape, dim) for dim in dims) for dims in row.dims)
    return Entry(named(row.training), named(row.hf), shapes, row.rule, layer)
