"""Which file of a training checkpoint belongs to which ranks.

    tensor parallel   model_tp{t}_pp{p}.pt         every t and p
    isp               model_tp{t}_wp{w}_pp{p}.pt   in each stage p the ranks (t, w) = (r mod T, r mod W): a sparse grid.
                                                   T = 2, W = 4:   tp0_wp0   tp1_wp1   tp0_wp2   tp1_wp3
    isp of 2025       model_wp{w}_pp{p}.pt         every w and p; tensor ranks hold the same and are not named

T, W and P are the tensor-parallel, weight-parallel and pipeline sizes. The files of a stage are its members; each has
a rank in the tensor group and one in the weight group. A tensor that is cut over the group of size n is in as many
copies as there are members with the same rank in it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import ConversionError, listed


class Group(Enum):
    """Ranks over which training cuts a tensor."""

    TENSOR = "tensor-parallel"
    WEIGHT = "weight-parallel"


Member = tuple[int, int]
"""(tensor rank, weight rank) of one file of a stage; a rank that the file's name does not give is 0."""


@dataclass(frozen=True)
class FileNames:
    """How the files of a layout are called, and over which group the embedding and the head are cut in it."""

    template: str
    outer_group: Group

    @property
    def is_isp(self) -> bool:
        return "wp" in self.template

    @property
    def pattern(self) -> re.Pattern[str]:
        number = {rank: f"(?P<{rank}>0|[1-9][0-9]*)" for rank in ("tp", "wp", "pp")}
        return re.compile(self.template.replace(".", r"\.").format(**number))

    @property
    def wildcard(self) -> str:
        return self.template.format(tp="*", wp="*", pp="*")


TENSOR_PARALLEL_FILES = FileNames("model_tp{tp}_pp{pp}.pt", Group.TENSOR)
ISP_FILES = FileNames("model_tp{tp}_wp{wp}_pp{pp}.pt", Group.TENSOR)
ISP_2025_FILES = FileNames("model_wp{wp}_pp{pp}.pt", Group.WEIGHT)
KNOWN_NAMES = (TENSOR_PARALLEL_FILES, ISP_FILES, ISP_2025_FILES)

GATHER = (
    "Load it in the run that saved it, gather the whole state there (fully sharded data parallel: FULL_STATE_DICT) and "
    "save that as model_tp0_pp0.pt"
)
STEP = "the folder of one step of an InternEvo checkpoint, such as ckpt/1000"
UNSUPPORTED = {
    re.compile(r"model_tp\d+_pp\d+_(dp|zo)\d+\.pt"): ("fsdp (weights split over data-parallel ranks)", GATHER),
    re.compile(r"model_moe_.*\.pt"): (
        "MoE (mixture of experts)",
        "InternLM and InternLM2 have no experts in their Hugging Face form; only dense models can be converted",
    ),
    re.compile(r".*\.distcp"): (
        "universal checkpoint (torch.distributed.checkpoint, .distcp)",
        "Load it in InternEvo and save it again with the universal checkpoint off, as model_tp*_pp*.pt",
    ),
}


@dataclass(frozen=True)
class Grid:
    """The files of a checkpoint: those of one stage, which are the same in every stage, and the number of stages."""

    names: FileNames
    tp_size: int
    wp_size: int
    pp_size: int
    members: tuple[Member, ...]
    of_copies: bool = False
    """Whether each member holds every tensor whole: no group cuts anything."""

    def size(self, group: Group) -> int:
        if self.of_copies:
            return 1
        return self.tp_size if group is Group.TENSOR else self.wp_size

    def ranks(self, group: Group) -> list[int]:
        """The rank in `group` of each member."""
        return [0 if self.of_copies else member[group is Group.WEIGHT] for member in self.members]

    def name(self, member: Member, stage: int | str) -> str:
        return self.names.template.format(tp=member[0], wp=member[1], pp=stage)

    def places(self) -> Iterator[tuple[int, int]]:
        """(stage, number of the member in it) of every file."""
        return itertools.product(range(self.pp_size), range(len(self.members)))


def grid_of(names: FileNames, tp_size: int, wp_size: int, pp_size: int) -> Grid:
    """The files that a run of these sizes loads."""
    ranks = range(math.lcm(tp_size, wp_size))
    return Grid(names, tp_size, wp_size, pp_size, tuple((r % tp_size, r % wp_size) for r in ranks))


def holds_shards(folder: Path) -> bool:
    """Whether there are files of training in the folder: whole grid or not, of a layout that can be read or not."""
    patterns = [*(known.pattern for known in KNOWN_NAMES), *UNSUPPORTED]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(pattern.fullmatch(name) for pattern in patterns for name in names)


def where_shards_are(folder: Path) -> str:
    """A sentence, after a space, that names the folders in `folder` that hold shards; "" where there is none."""
    below = [path for path in folder.iterdir() if path.is_dir() and os.access(path, os.R_OK | os.X_OK)]
    steps = sorted((path for path in below if holds_shards(path)), key=_by_step, reverse=True)
    return f" Shards are in {listed([str(path) for path in steps])}." if steps else ""


def _by_step(path: Path) -> tuple[int, str]:
    return int(path.name) if path.name.isdecimal() else -1, path.name


def found_grid(folder: Path) -> tuple[Grid, dict[tuple[int, int], Path]]:
    """The files in `folder`, by (stage, number of the member); ConversionError where they are not a whole grid."""
    names = sorted(path.name for path in folder.iterdir())
    _refuse_unsupported(folder, names)
    found = {known: [m for name in names if (m := known.pattern.fullmatch(name))] for known in KNOWN_NAMES}
    layouts = [known for known in KNOWN_NAMES if found[known]]
    if not layouts:
        raise ConversionError(
            f"{folder} holds no shard model_tp*_pp*.pt, and none of isp (model_tp*_wp*_pp*.pt, model_wp*_pp*.pt). "
            f"--src takes {STEP}.{where_shards_are(folder)}"
        )
    if len(layouts) > 1:
        raise ConversionError(
            f"{folder} holds shards of two layouts, {layouts[0].wildcard} and {layouts[1].wildcard}. Remove those of "
            "the other run."
        )
    (layout,) = layouts
    places: dict[tuple[int, Member], Path] = {}
    for match in found[layout]:
        ranks = {rank: int(number) for rank, number in match.groupdict().items()}
        places[ranks["pp"], (ranks.get("tp", 0), ranks.get("wp", 0))] = folder / match[0]
    return _whole_grid(folder, layout, places)


def _refuse_unsupported(folder: Path, names: list[str]) -> None:
    for name in names:
        for pattern, (layout, advice) in UNSUPPORTED.items():
            if pattern.fullmatch(name):
                raise ConversionError(
                    f"{folder / name} belongs to a checkpoint of layout {layout}, which is not supported. {advice}."
                )


def _whole_grid(
    folder: Path, names: FileNames, places: dict[tuple[int, Member], Path]
) -> tuple[Grid, dict[tuple[int, int], Path]]:
    tp_size, wp_size, pp_size = (
        1 + max(numbers) for numbers in zip(*((tp, wp, pp) for pp, (tp, wp) in places), strict=True)
    )
    first = Grid(names, tp_size, wp_size, pp_size, ())
    ranks = range(max(tp_size, wp_size))
    wanted = ((p, (r % tp_size, r % wp_size)) for p in range(pp_size) for r in ranks)  # millions, if a name says so
    absent = (first.name(member, stage) for stage, member in wanted if (stage, member) not in places)
    holes = list(itertools.islice(absent, 5))
    if not holes:
        whole = grid_of(names, tp_size, wp_size, pp_size)
        members = tuple(member for member in whole.members if any((p, member) in places for p in range(pp_size)))
        grid = Grid(names, tp_size, wp_size, pp_size, members)
        files = {(p, n): places.pop((p, members[n]), None) for p, n in grid.places()}
        if places:
            raise ConversionError(
                f"{min(places.values())} is of no rank of {tp_size} tensor-parallel and {wp_size} weight-parallel "
                "ones. Shards of different runs seem to be mixed."
            )
        holes = [grid.name(members[n], p) for (p, n), path in files.items() if path is None]
        if not holes:
            return grid, {place: path for place, path in files.items() if path is not None}
    last = first.name((tp_size - 1, wp_size - 1), pp_size - 1)
    raise ConversionError(
        f"{folder} has shards up to {last} but lacks {', '.join(holes[:4])}"
        f"{' and more' if len(holes) > 4 else ''}. Copy the missing shards, or remove shards of another run."
    )
