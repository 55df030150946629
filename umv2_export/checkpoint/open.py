"""A folder of any format is recognised by its configuration file, a run's folder by its steps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umv2_export.checkpoint import official, olmoe, own_format
from umv2_export.checkpoint.checkpoint import Checkpoint, ReadOptions
from umv2_export.checkpoint.run_folder import Step, choose_step
from umv2_export.config import QueryLayout
from umv2_export.errors import EnvironmentUnfit, InputRejected
from umv2_export.records.json_files import read_json

__all__ = ["open_checkpoint"]


def open_checkpoint(
    path: Path,
    *,
    query_layout: QueryLayout | None = None,
    row_topk: int | None = None,
    allow_non_finite: bool = False,
    ignore_fields: Sequence[str] = (),
) -> Checkpoint:
    """Open a checkpoint folder of any format.

    Args:
        path: folder with config.yaml and weights in a layout of the authors' checkpointers, or with config.json and
            *.safetensors, native or of a Hugging Face OLMoE; or the folder of a training run, of which the newest
            unsharded step is read.
        query_layout: read the query projection in this layout; None: as the format says.
        row_topk: row keys, and column keys, that survive stage 1 of the retrieval; None: as the checkpoint says.
        allow_non_finite: let NaN and infinity in weights through.
        ignore_fields: unknown fields of the configuration that do not change what is computed, as the user says.

    Raises:
        InputRejected: something is missing, corrupt, unsafe or inconsistent.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    if not path.exists():
        if path.is_symlink():
            raise InputRejected("the path is a link that leads nowhere", where=path, why=f"it says {path.readlink()}")
        raise InputRejected("no such checkpoint folder", where=path)
    if not path.is_dir():
        raise InputRejected("a checkpoint is a folder, this is a file", where=path, fix=f"pass {path.parent}")
    try:
        step = choose_step(path)
    except PermissionError as error:
        raise EnvironmentUnfit("the folder may not be read", where=path, why=str(error)) from error
    options = ReadOptions(query_layout, row_topk, allow_non_finite, ignore_fields)
    if step is None:
        return _open_folder(path, options)
    try:
        checkpoint = _open_folder(step.path, options)
    except InputRejected as error:
        raise _with_others(error, step) from error
    return replace(checkpoint, notes=(*step.notes, *checkpoint.notes))


def _open_folder(path: Path, options: ReadOptions) -> Checkpoint:
    if (path / official.CONFIG_FILE).exists():
        return official.read_checkpoint(path, options)
    if (path / own_format.CONFIG_FILE).exists():
        if olmoe.is_olmoe(read_json(path / olmoe.CONFIG_FILE), path / olmoe.CONFIG_FILE):
            return olmoe.read_checkpoint(path, options)
        return own_format.read_checkpoint(path, options)
    # A folder inside of a step: rank_0, model_and_optim, model.
    step = path.resolve().parent
    raise InputRejected(
        "the folder holds no checkpoint",
        where=path,
        why=f"neither {official.CONFIG_FILE} (the authors' format) nor {own_format.CONFIG_FILE} (native, or a Hugging "
        "Face OLMoE) is there, nor a step of a run (stepN-unsharded)",
        fix=f"pass {step}, which has one" if (step / official.CONFIG_FILE).is_file() else None,
    )


def _with_others(error: InputRejected, step: Step) -> InputRejected:
    """The same refusal, which says that the run holds other steps; none of them is taken in silence."""
    if not step.others:
        return error
    others = ", ".join(str(path) for path in step.others[:3])
    advice = f"the run has other steps, which can be passed: {others}"
    return InputRejected(
        error.what, where=error.where, why=error.why, fix=f"{error.fix}; {advice}" if error.fix else advice
    )
