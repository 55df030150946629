"""`umv2-export parity`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from umv2_export.commands.options import (
    device_option,
    engine_options,
    ignore_field_option,
    json_option,
    row_topk_option,
)
from umv2_export.commands.parameter_types import FOLDER, MOST_SEED, TEXT_FILE, share, tolerance
from umv2_export.commands.printing import print_notes
from umv2_export.commands.refusals import refuse_flags
from umv2_export.errors import CheckFailed, InvalidRequest
from umv2_export.names import RUNTIMES
from umv2_export.system.exits import print_json

__all__ = ["parity"]


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--reference", type=FOLDER, help="Checkpoint to compare with. Default: the bundle's own weights in torch."
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(RUNTIMES),
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help="Runtime to check. Repeatable.",
)
@click.option("--layerwise", is_flag=True, help="Compare the residual stream layer by layer.")
@click.option(
    "--atol", type=tolerance, metavar="FLOAT", help="Absolute tolerance. Default: by dtype, see docs/parity.md."
)
@click.option("--rtol", type=tolerance, metavar="FLOAT", help="Relative tolerance.")
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Seed of the test inputs."
)
@click.option("--prompt-file", type=TEXT_FILE, help="Text whose pieces are the test inputs. Default: random tokens.")
@ignore_field_option
@row_topk_option
@click.option(
    "--sample",
    type=share,
    metavar="SHARE",
    help="Share of the rows of each table to compare with the reference, such as 10%. Default: all.",
)
@device_option
@engine_options
@json_option
def parity(
    bundle: Path,
    reference: Path | None,
    runtimes: Sequence[str],
    layerwise: bool,
    atol: float | None,
    rtol: float | None,
    seed: int,
    prompt_file: Path | None,
    ignore_fields: Sequence[str],
    row_topk: int | None,
    sample: float | None,
    device: str,
    engine: Path | None,
    trust_engine: bool,
    plugin_library: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle, or an engine of it, with PyTorch.

    The bundle runs in each runtime, the reference in PyTorch. Exit code 1: they differ.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.commands.parity_table import print_parity
    from umv2_export.parity import check_bundle
    from umv2_export.parity.reference import open_reference
    from umv2_export.progress import progress_bars
    from umv2_export.runtimes import choose_engine
    from umv2_export.tokenizer import text_ids

    if sample is not None and reference is None:
        raise InvalidRequest(
            "--sample without a checkpoint whose rows could be compared",
            fix="pass --reference CHECKPOINT, or leave out --sample",
        )
    if reference is None:
        refuse_flags(["ignore_fields", "row_topk"], "no checkpoint is read without --reference", where=bundle)
    choice = choose_engine(runtimes, engine, trust=trust_engine, plugin_library=plugin_library)
    opened = Bundle(bundle)
    text = None if prompt_file is None else text_ids(opened, prompt_file.read_bytes(), where=prompt_file)
    checkpoint = None
    if reference is not None:
        checkpoint = open_reference(reference, opened, row_topk=row_topk, ignore_fields=ignore_fields)
        print_notes(checkpoint.notes)
    with progress_bars() as track:
        report = check_bundle(
            opened,
            checkpoint,
            runtimes,
            atol=atol,
            rtol=rtol,
            seed=seed,
            text=text,
            layerwise=layerwise,
            engine=choice,
            sample=sample or 1.0,
            track=track,
            device=device,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        print_parity(report, "the bundle's own weights in torch" if reference is None else f"checkpoint {reference}")
    if not report.passed:
        sys.exit(CheckFailed.exit_code)
