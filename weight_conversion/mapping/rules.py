"""How a full tensor and the parts of it that ranks hold lie in each other.

A rule does not move anything. It pairs windows: `pairs(fulls, parts)` yields (window of a full tensor, window of a
part) that hold the same elements. Copying each pair from right to left joins a tensor, copying it from left to right
splits it, so join and split cannot disagree: they are one statement read in two directions.

    Split(0)         full [p0]      Split(1)   full [p0|p1]      Replicated   every rank holds the whole
                          [p1]                                   OnRankZero   rank 0 holds the whole, others nothing

`over` is the group whose ranks the parts belong to. Tensor-parallel ranks hold whole heads (AttentionHeads);
weight-parallel ranks (isp) hold equal runs of rows, wherever that cuts (AttentionRows, and JoinedHalves for the MLP):

    [w1; w3] of 2 ranks:  [ a b c d ]   rank 0 holds a b, rank 1 c d; saved as  rank 0: w1 = a, w3 = b
                            w1  w3                                              rank 1: w1 = c, w3 = d

Attention rows come in four layouts (g = query heads per key/value head, hd = head dimension):

    SEPARATE   wq: [q0 q1 q2 q3]   wk: [k0 k1]   wv: [v0 v1]     three tensors, heads in order
    GROUPED    wqkv: [q0 q1 k0 v0 | q2 q3 k1 v1]                 one tensor, one group per key/value head (InternLM2)
    STACKED    Wqkv: [q0 q1 q2 q3 | k0 k1 | v0 v1]               one tensor, three blocks (InternLM, per rank)

    PIECES     wq: [q0 q1 k0 v0]   wk: [q2 q3]   wv: [k1 v1]     the rows of GROUPED, cut into three (InternLM2)

and each q and k head has its hd rows either in halves (x0 x1 .. | y0 y1 ..), as Hugging Face models rotate them, or
interleaved (x0 y0 x1 y1 ..), as training with `adapt_hf=False` / `qk_interleaved=True` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from ..files.views import Pair, View, across
from ..folders.grid import Group


@dataclass(frozen=True)
class ModelShape:
    """The sizes that give every tensor of a model its shape."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_rows(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        return self.q_rows + 2 * self.kv_rows


Shapes = Sequence[tuple[int, ...]]


def divisors(number: int) -> str:
    """The sizes of a group, up to 1024, that divide `number`, for a sentence."""
    return ", ".join(str(size) for size in range(1, min(number, 1024) + 1) if number % size == 0)


class IndivisibleError(ValueError):
    """A tensor that the ranks cannot share equally; `by_rows`: it is its rows that do not divide."""

    def __init__(self, sentence: str, *, by_rows: bool) -> None:
        super().__init__(sentence)
        self.by_rows = by_rows


class Rule(Protocol):
    """Pairs windows of full tensors with windows of the parts that the ranks of a group hold."""

    @property
    def over(self) -> Group: ...

    def part_of(self, rank: int, size: int) -> int | None:
        """Which part rank `rank` of a group of `size` holds; None where it holds none."""
        ...

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        """Shapes of a rank's tensors, one per training name; ValueError where `size` does not divide."""
        ...

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        """Pairs of windows. `parts[p]` are the tensors of part p."""
        ...


@dataclass(frozen=True)
class Split:
    """Rank r holds the r-th of equal pieces along `dim`."""

    dim: int
    over: Group = Group.TENSOR

    def part_of(self, rank: int, size: int) -> int | None:
        return rank

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        (full,) = fulls
        length, rest = divmod(full[self.dim], size)
        if rest:
            raise IndivisibleError(
                f"dimension {self.dim} of {list(full)} does not divide by {size}", by_rows=self.dim == 0
            )
        return [(*full[: self.dim], length, *full[self.dim + 1 :])]

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        (full,) = fulls
        for piece, (part,) in zip(full.chunk(len(parts), self.dim), parts, strict=True):
            yield piece, part


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    over: ClassVar[Group] = Group.TENSOR

    def part_of(self, rank: int, size: int) -> int | None:
        return 0

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        return list(fulls)

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        (full,), ((part,),) = fulls, parts
        yield full, part


@dataclass(frozen=True)
class OnRankZero(Replicated):
    """Rank 0 holds the whole tensor; the other ranks have no tensor of that name."""

    def part_of(self, rank: int, size: int) -> int | None:
        return 0 if rank == 0 else None


@dataclass(frozen=True)
class JoinedHalves:
    """Rank r holds the r-th of equal chunks of [first; second] under two names, each half of the chunk."""

    over: Group = Group.WEIGHT

    def part_of(self, rank: int, size: int) -> int | None:
        return rank

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        return [Split(0).part_shapes([full], size, shape)[0] for full in fulls]

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        joined = [piece for full in fulls for piece in full.chunk(len(parts), 0)]
        yield from zip(joined, [half for part in parts for half in part], strict=True)


class HeadLayout(Protocol):
    """Finds the heads in attention tensors: q [kv, g, hd, ...], k and v [kv, 1, hd, ...]."""

    def shapes(self, rows: tuple[int, int, int], rest: tuple[int, ...]) -> list[tuple[int, ...]]: ...

    def heads(self, tensors: Sequence[View], shape: ModelShape) -> tuple[View, View, View]: ...


@dataclass(frozen=True)
class Separate:
    """Three tensors, q and k and v."""

    def shapes(self, rows: tuple[int, int, int], rest: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(count, *rest) for count in rows]

    def heads(self, tensors: Sequence[View], shape: ModelShape) -> tuple[View, View, View]:
        q, k, v = tensors
        return _by_head(q, shape.group, shape), _by_head(k, 1, shape), _by_head(v, 1, shape)


@dataclass(frozen=True)
class Stacked:
    """One tensor, [q; k; v]."""

    def shapes(self, rows: tuple[int, int, int], rest: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(sum(rows), *rest)]

    def heads(self, tensors: Sequence[View], shape: ModelShape) -> tuple[View, View, View]:
        (qkv,) = tensors
        kv_rows = qkv.shape[0] // (shape.group + 2)
        q_rows = kv_rows * shape.group
        pieces = [
            qkv.narrow(0, 0, q_rows),
            qkv.narrow(0, q_rows, kv_rows),
            qkv.narrow(0, q_rows + kv_rows, kv_rows),
        ]
        return Separate().heads(pieces, shape)


@dataclass(frozen=True)
class Grouped:
    """One tensor, (q heads of the group, k, v) for each key/value head."""

    def shapes(self, rows: tuple[int, int, int], rest: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(sum(rows), *rest)]

    def heads(self, tensors: Sequence[View], shape: ModelShape) -> tuple[View, View, View]:
        (qkv,) = tensors
        grouped = _by_head(qkv, shape.group + 2, shape)  # [kv, g + 2, hd, ...]
        g = shape.group
        return grouped.narrow(1, 0, g), grouped.narrow(1, g, 1), grouped.narrow(1, g + 1, 1)


def _by_head(rows: View, per_kv_head: int, shape: ModelShape) -> View:
    """Rows [kv * per_kv_head * hd, ...] as [kv, per_kv_head, hd, ...]; kv may be a rank's share of the heads."""
    unit = per_kv_head * shape.head_dim
    return rows.unflatten(0, (rows.shape[0] // unit, per_kv_head, shape.head_dim))


@dataclass(frozen=True)
class AttentionHeads:
    """Rank r holds the r-th share of whole key/value groups, in the layout `training`; the full tensors in `hf`."""

    training: HeadLayout
    hf: HeadLayout
    interleaved: bool = False
    over: ClassVar[Group] = Group.TENSOR

    def part_of(self, rank: int, size: int) -> int | None:
        return rank

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        if shape.num_kv_heads % size:
            raise ValueError(
                f"{shape.num_kv_heads} key/value heads do not divide by {size}, but by {divisors(shape.num_kv_heads)}"
            )
        kv_rows = shape.kv_rows // size
        return self.training.shapes((kv_rows * shape.group, kv_rows, kv_rows), fulls[0][1:])

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        if self.training == self.hf and not self.interleaved:  # a rank's share lies in one piece
            for rank, part in enumerate(parts):
                yield from ((full.chunk(len(parts), 0)[rank], own) for full, own in zip(fulls, part, strict=True))
            return
        full_heads = self.hf.heads(fulls, shape)
        for rank, part in enumerate(parts):
            pieces = [full.chunk(len(parts), 0)[rank] for full in full_heads]
            yield from _by_kind(pieces, self.training.heads(part, shape), self.interleaved)


@dataclass(frozen=True)
class AttentionRows:
    """Rank r holds the r-th of equal chunks of the rows of each tensor in the layout `training`, through any head."""

    training: HeadLayout
    hf: HeadLayout
    interleaved: bool = False
    over: ClassVar[Group] = Group.WEIGHT

    def part_of(self, rank: int, size: int) -> int | None:
        return rank

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        whole = self.training.shapes((shape.q_rows, shape.kv_rows, shape.kv_rows), fulls[0][1:])
        return [Split(0).part_shapes([joined], size, shape)[0] for joined in whole]

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        chunks = list(zip(*parts, strict=True))  # of each training tensor
        joined = [_laid_end_to_end(pieces) for pieces in chunks]
        whole = AttentionHeads(self.training, self.hf, self.interleaved).pairs(fulls, [joined], shape)
        for full, window in whole:
            number = next(n for n, view in enumerate(joined) if view.tensor is window.tensor)
            yield from across((full, window), chunks[number])


@dataclass(frozen=True)
class InPieces:
    """The one tensor that a rank holds by the rule `whole` is saved as three, laid end to end: so many rows as q has,
    as k has and as v has, whatever is in them."""

    whole: AttentionHeads | AttentionRows

    @property
    def over(self) -> Group:
        return self.whole.over

    def part_of(self, rank: int, size: int) -> int | None:
        return self.whole.part_of(rank, size)

    def part_shapes(self, fulls: Shapes, size: int, shape: ModelShape) -> list[tuple[int, ...]]:
        self.whole.part_shapes(fulls, size, shape)
        rows = (shape.q_rows, shape.kv_rows, shape.kv_rows)
        return [Split(0).part_shapes([(count, *fulls[0][1:])], size, shape)[0] for count in rows]

    def pairs(self, fulls: Sequence[View], parts: Sequence[Sequence[View]], shape: ModelShape) -> Iterator[Pair]:
        joined = [_laid_end_to_end(part) for part in parts]
        for full, window in self.whole.pairs(fulls, [[view] for view in joined], shape):
            rank = next(rank for rank, view in enumerate(joined) if view.tensor is window.tensor)
            yield from across((full, window), parts[rank])


def _laid_end_to_end(pieces: Sequence[View]) -> View:
    """A tensor that is stored nowhere: the rows of all pieces."""
    first, rows = pieces[0].tensor, sum(piece.shape[0] for piece in pieces)
    return replace(first, shape=(rows, *first.shape[1:])).view()


def _by_kind(fulls: Sequence[View], parts: Sequence[View], interleaved: bool) -> Iterator[Pair]:
    """Pairs q, k and v; q and k, which are rotated, by halves where training has them interleaved."""
    for index, (full, part) in enumerate(zip(fulls, parts, strict=True)):
        yield _by_halves(full, part) if interleaved and index < 2 else (full, part)


def _by_halves(full: View, part: View) -> Pair:
    """Pairs row (half, i) of each full head with row (i, half) of the rank's head."""
    half = full.shape[2] // 2
    return full.unflatten(2, (2, half)), part.unflatten(2, (half, 2)).transpose(2, 3)
