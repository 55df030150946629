"""Where memory layers are inserted, as the authors' code runs `mem_insert_way`.

Its forward holds one output that waits to be added. A layer that reads while another's output waits replaces it, and
that one is never added. The trained weights know it; such layers are left out of our models.
Source: the released training code, the loop over blocks of its `forward`.
"""

import re
from typing import NamedTuple

from umv2_export.config import MOST_REPEATS
from umv2_export.errors import InputRejected, Unsupported

__all__ = ["Insertion", "read_insertion"]


class Insertion(NamedTuple):
    """The memory layers of a checkpoint.

    Attributes:
        layers: that the checkpoint holds.
        added: positions of those whose output is added, in ascending order.
        placements: (read block, add block) of those.
        notes: why the others are never added, a sentence each.
    """

    layers: int
    added: tuple[int, ...]
    placements: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def read_insertion(insert_way: str, blocks: int) -> Insertion:
    """Read `full`, `no_mem`, or `read:add` pairs separated by `/`.

    Args:
        insert_way: the field `mem_insert_way`.
        blocks: of the model.

    Raises:
        InputRejected: it is none of these.
        Unsupported: too many blocks, or two layers read at one block.
    """
    if blocks > MOST_REPEATS:
        raise Unsupported(f"n_layers is {blocks}, at most {MOST_REPEATS} are supported")
    if insert_way == "no_mem":
        return Insertion(0, (), (), ())
    if insert_way == "full":
        return Insertion(blocks, tuple(range(blocks)), tuple((i, i) for i in range(blocks)), ())
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(/\d{1,6}:\d{1,6})*", insert_way):
        raise InputRejected(
            f"mem_insert_way is {insert_way!r}", fix="expected 'full', 'no_mem', or pairs such as '0:1/2:2'"
        )
    pairs = [(int(read), int(add)) for read, add in (pair.split(":") for pair in insert_way.split("/"))]
    if len(pairs) > MOST_REPEATS:
        raise Unsupported(f"mem_insert_way holds {len(pairs)} memory layers, at most {MOST_REPEATS} are supported")
    by_block = {read: position for position, (read, _) in enumerate(pairs)}
    if len(by_block) < len(pairs):
        raise Unsupported(
            f"mem_insert_way is {insert_way!r}: two memory layers read at one block",
            why="the authors' code keeps one layer a block, and fails on the position of the others",
        )
    reasons = {j: _never_added(j, pairs, by_block, blocks) for j in range(len(pairs))}
    added = tuple(j for j, reason in reasons.items() if reason is None)
    notes = tuple(f"memory layer {j} is never added: {reason}" for j, reason in reasons.items() if reason)
    return Insertion(len(pairs), added, tuple(pairs[j] for j in added), notes)


def _never_added(j: int, pairs: list[tuple[int, int]], by_block: dict[int, int], blocks: int) -> str | None:
    read, add = pairs[j]
    if read >= blocks:
        return f"it reads at block {read} of {blocks}"
    if not read <= add < blocks:
        return f"it reads at block {read}, and is to be added after block {add} of {blocks}"
    for block in range(read + 1, add + 1):
        if block in by_block:
            return (
                f"it reads at block {read} and waits for block {add}, but memory layer {by_block[block]} reads at "
                f"block {block}, and the authors' code holds one waiting output"
            )
    return None
