"""A flag that has nothing to act on is refused: none is ignored without a word."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from umv2_export.errors import InvalidRequest

if TYPE_CHECKING:
    from umv2_export.config import ModelConfig

__all__ = ["RETRIEVAL_FLAGS", "refuse_flags", "refuse_flags_of_absent_parts"]

# Parameters that only some memory layers have a use for.
RETRIEVAL_FLAGS: Mapping[str, Sequence[str]] = {
    "queries": ["query_layout", "row_topk"],
    "query layouts": ["query_layout"],
}


def refuse_flags(flags: Iterable[str], why: str, *, where: Path | None = None) -> None:
    """Refuse those of these parameters that were given."""
    context = click.get_current_context()
    for name in flags:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise InvalidRequest(f"{option} has no effect here", where=where, why=why, fix=f"leave out {option}")


def refuse_flags_of_absent_parts(config: "ModelConfig", parts: Mapping[str, Sequence[str]], *, where: Path) -> None:
    """Refuse flags for memory layers or experts of a checkpoint that has none.

    Args:
        config: of the checkpoint.
        parts: `queries`, `query layouts`, `tables` or `experts`, and the parameters that are about them.
        where: the checkpoint.
    """
    absent = {
        "queries": (config.memory.layers == 0, "the model has no memory layers"),
        "query layouts": (not config.memory.query_per_rank, "its layers have one query, whatever the Tucker rank"),
        "tables": (config.memory.layers == 0, "the model has no memory layers, hence no keys and no tables"),
        "experts": (config.experts is None, "the model has no experts"),
    }
    for part, flags in parts.items():
        is_absent, why = absent[part]
        if is_absent:
            refuse_flags(flags, why, where=where)
