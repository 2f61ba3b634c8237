"""Folders of a distributed MindSpore run, and the strategy files that describe how its tensors are sharded.

Each of rank_0, rank_1, ... contains one shard of every tensor of its stage; the strategy file specifies which one
(ShardLayout).
"""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camelid.checkpoint.containers import protobuf
from camelid.checkpoint.containers.mindspore_file import AGAIN, TRAINING, open_tensor_file, single
from camelid.checkpoint.tensors import Tensor, concatenate, same_values
from camelid.errors import UserError

MAX_STRATEGY = 2**28  # bytes


@dataclass(frozen=True)
class ShardLayout:
    """How one tensor is sharded over the ranks of a stage, which form an array `devices` with the last axis fastest.

    devices (2, 3)                 rank 0 1 2
                                        3 4 5
    axes (0, -1)    the tensor's first axis is split into 3 shards; ranks 0 and 3 have the same shard
    """

    devices: tuple[int, ...]
    axes: tuple[int, ...]
    """for each axis of the tensor, the axis of `devices` over which it is sharded, counted from the last; -1: none"""
    step: int = 0
    """distance of the ranks over which the first axis is sharded once more (parallel_optimizer)"""
    count: int = 1
    """number of these shards"""

    @classmethod
    def over(cls, ranks: int, ndim: int, axis: int | None) -> "ShardLayout":
        """Returns the sharding of a tensor over one axis, or its replication if `axis` is None."""
        return cls((ranks,), tuple(0 if i == axis else -1 for i in range(ndim)))


def ranks_in(folder: Path) -> dict[int, Path]:
    """Returns the folders of ranks in a folder, by rank."""
    folders = (path for path in folder.iterdir() if re.fullmatch(r"rank_(0|[1-9]\d{0,4})", path.name) and path.is_dir())
    return {int(path.name[5:]): path for path in folders}


def open_ranks(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the unsharded tensors of a folder of ranks, and the names of training values that are not read."""
    found = ranks_in(folder)
    if missing := [i for i in range(max(found) + 1) if i not in found]:
        raise UserError(f"{folder} has no rank_{missing[0]}", "Copy the folders of all ranks.")
    ranks = [open_tensor_file(single(found[i])) for i in range(len(found))]
    aside = sorted({name for rank in ranks for name in rank if re.fullmatch(TRAINING, name)})
    ranks = [{name: tensor for name, tensor in rank.items() if name not in aside} for rank in ranks]
    if len(ranks) == 1:
        return ranks[0], aside
    splits: dict[str, ShardLayout] = {}
    for file in _strategies(folder):
        for name, split in open_strategy(file).items():
            if splits.setdefault(name, split) != split:
                raise UserError(f"{file} and another strategy file shard {name} differently", "Keep those of one run.")
    return merged(ranks, splits), aside


def _strategies(folder: Path) -> list[Path]:
    """Returns the strategy files of a folder of ranks, from the nearest folder that has any."""
    folder = folder.resolve()
    for place in (folder / "strategy", folder.parent / "strategy", folder, folder.parent):
        if files := sorted(file for file in place.glob("*strategy*.ckpt") if file.is_file()):
            return files
    raise UserError(
        f"{folder} contains shards of a model, but no strategy file that describes how to merge them",
        "Put ckpt_strategy_rank_0.ckpt (of each stage) into a subfolder named strategy.",
    )


def open_strategy(path: Path) -> dict[str, ShardLayout]:
    """Returns the sharding of each tensor in a strategy file (MindSpore's node_strategy.proto)."""
    splits: dict[str, ShardLayout] = {}
    with path.open("rb") as file:
        try:
            if (size := os.fstat(file.fileno()).st_size) > MAX_STRATEGY:
                raise ValueError(f"{size:,} bytes")
            for number, value in protobuf.fields(file, range(size)):
                if number == 3 and isinstance(value, range):
                    name, split = _layout(file, value)
                    if splits.setdefault(name, split) != split:
                        raise ValueError(f"{name} has two different layouts")
                elif number not in (1, 2):  # the stage, and the strategies of operators
                    raise ValueError(f"an unexpected field {number}")
        except ValueError as error:
            raise UserError(f"{path} is damaged, or no strategy file ({error})", AGAIN) from error
    return splits


def _layout(file: io.BufferedReader, span: range) -> tuple[str, ShardLayout]:
    item = protobuf.once(file, span, ("name", "layouts"))
    # In a file that was merged from several stages, names start with the stage.
    name = re.sub(r"^\d+-", "", protobuf.text(file, item.get("name")))
    if not isinstance(layouts := item.get("layouts"), range):
        raise ValueError(f"{name} has no layout")
    words = ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset", "field", "step", "ways")
    held = protobuf.once(file, layouts, words)
    devices, axes, *uneven = (protobuf.numbers(file, held.get(word, range(0))) for word in words[:4])
    field, step, count = (held.get(word, 0) for word in words[4:])
    if any(uneven) or field:
        raise ValueError(f"{name} is sharded unevenly")
    if not isinstance(step, int) or not isinstance(count, int) or max(step, count) >= 2**31:
        raise ValueError(f"{name} is split for the optimizer in an unknown way")
    if min(devices, default=0) < 1 or not all(-1 <= axis < len(devices) for axis in axes):
        raise ValueError(f"{name} has the device array {devices} and the axes {axes}")
    return name, ShardLayout(devices, axes, step, count) if step and count > 1 else ShardLayout(devices, axes)


def strategy_bytes(stage: int, splits: Mapping[str, ShardLayout]) -> bytes:
    """Returns the content of the strategy file of a stage."""
    field = protobuf.field_bytes
    content = field(1, stage)
    for name, split in splits.items():
        devices, axes = (b"".join(field(1, n) for n in numbers) for numbers in (split.devices, split.axes))
        once_more = field(6, split.step) + field(7, split.count if split.count > 1 else 0)
        layouts = field(1, devices) + field(2, axes) + field(3, b"") + field(4, b"") + field(5, 0) + once_more
        content += field(3, field(1, name.encode()) + field(2, layouts))
    return content


def merged(ranks: Sequence[Mapping[str, Tensor]], splits: Mapping[str, ShardLayout]) -> dict[str, Tensor]:
    """Returns the unsharded tensors of a run, by name, from the shards of its ranks; nothing is read."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    if missing := [name for name in names if name not in splits]:
        raise UserError(f"the strategy files do not specify the layout of {missing[0]}", "Give those of the same run.")
    return {name: _merged(name, ranks, splits[name]) for name in names}


def _merged(name: str, ranks: Sequence[Mapping[str, Tensor]], split: ShardLayout) -> Tensor:
    count = math.prod(split.devices)
    if len(ranks) % count:
        raise UserError(
            f"{name} was split over {count} ranks, and there are {len(ranks)}", "Give the strategy files of this run."
        )
    first = next(i for i, rank in enumerate(ranks) if name in rank) // count * count  # of a stage of the pipeline
    parts: dict[tuple[int, ...], Tensor] = {}
    for local, rank in enumerate(ranks[first : first + count]):
        if name not in rank:
            raise UserError(f"rank_{first + local} lacks {name}, which other ranks hold", "Copy the folder again.")
        tensor, at = rank[name], np.unravel_index(local, split.devices)[::-1]
        if len(tensor.shape) != len(split.axes) or (split.count > 1 and not split.axes):
            raise UserError(f"{name} in {tensor.file} has shape {tensor.shape}, split as {split}", AGAIN)
        place = [0 if axis < 0 else int(at[axis]) for axis in split.axes]
        if split.count > 1:
            place.insert(1, local // split.step % split.count)
        held = parts.setdefault(tuple(place), tensor)
        if (tensor.shape, tensor.dtype) != ((one := next(iter(parts.values()))).shape, one.dtype):
            raise UserError(
                f"{name} is {one.shape} {one.dtype} in {one.file}, and {tensor.shape} {tensor.dtype} in {tensor.file}",
                "The files belong to different runs.",
            )
        # Replicated norms distinguish different runs, and are quick to read.
        if held is not tensor and len(tensor.shape) == 1 and not same_values(tensor, held):
            raise UserError(
                f"{name} in {tensor.file} differs from that in {held.file}", "The files belong to different runs."
            )
    axes = [*range(len(split.axes))]
    counts = [1 if axis < 0 else split.devices[-1 - axis] for axis in split.axes]
    if split.count > 1:
        axes.insert(1, 0)
        counts.insert(1, split.count)
    if len(parts) != math.prod(counts):
        raise UserError(
            f"the ranks do not hold all parts of {name}, split as {split}", "Give the strategy files of it."
        )
    return _concatenated(parts, (), axes, counts)


def _concatenated(
    parts: Mapping[tuple[int, ...], Tensor], place: tuple[int, ...], axes: Sequence[int], counts: Sequence[int]
) -> Tensor:
    if len(place) == len(counts):
        return parts[place]
    along = axes[len(place)]
    return concatenate([_concatenated(parts, (*place, i), axes, counts) for i in range(counts[len(place)])], along)
