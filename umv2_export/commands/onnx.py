"""`umv2-export onnx`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from umv2_export.commands.options import checkpoint_options, json_option, output_options, tokenizer_option
from umv2_export.commands.parameter_types import FOLDER, byte_size, tolerance
from umv2_export.commands.printing import format_bytes, format_count, print_dry_run
from umv2_export.commands.refusals import RETRIEVAL_FLAGS, refuse_flags, refuse_flags_of_absent_parts
from umv2_export.commands.source import open_source
from umv2_export.errors import CheckFailed
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.bundle import Bundle
    from umv2_export.onnx.export import ExportResult
    from umv2_export.parity import ParityReport

__all__ = ["onnx", "print_export"]

DTYPES = ("fp32", "fp16", "bf16")


@click.command()
@click.argument("checkpoint", type=FOLDER)
@output_options
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Dense weights and cache.")
@click.option(
    "--key-dtype",
    type=click.Choice(("same", "fp16", "bf16")),
    default="same",
    show_default=True,
    help="Keys of the memory layers. same: as --dtype. 16 bits halve what a token reads of them.",
)
@click.option(
    "--table-dtype",
    type=click.Choice(("same", *DTYPES, "int8")),
    default="same",
    show_default=True,
    help="Values and pre-values. same: as the checkpoint.",
)
@click.option(
    "--moe-form",
    type=click.Choice(("standard", "contrib")),
    default="standard",
    show_default=True,
    help="Experts in standard ops, or as com.microsoft::MoE, which ONNX Runtime alone runs.",
)
@click.option(
    "--cache",
    type=click.Choice(("growing", "static")),
    default="growing",
    show_default=True,
    help="static: keys and values of fixed length, written in place. ONNX Runtime on a CPU alone runs it.",
)
@click.option(
    "--target",
    type=click.Choice(("any", "gpu")),
    default="any",
    show_default=True,
    help="gpu: allow what stock ONNX Runtime cannot run on a CPU. Such a bundle is not validated here.",
)
@click.option(
    "--opset", type=int, default=18, show_default=True, help="Version of the standard ONNX ops, from 18 to 24."
)
@click.option(
    "--shard-size",
    type=byte_size,
    metavar="SIZE",
    default="2GB",
    show_default=True,
    help="Largest size of a table file.",
)
@click.option("--inline-functions", is_flag=True, help="Write standard ops only, for runtimes without functions.")
@click.option("--no-validate", is_flag=True, help="Skip the parity check after the export.")
@click.option("--atol", type=tolerance, metavar="FLOAT", help="Absolute tolerance of the validation.")
@click.option("--rtol", type=tolerance, metavar="FLOAT", help="Relative tolerance of the validation.")
@tokenizer_option
@checkpoint_options
@json_option
def onnx(
    checkpoint: Path,
    output: Path,
    dtype: str,
    key_dtype: str,
    table_dtype: str,
    moe_form: str,
    cache: str,
    target: str,
    opset: int,
    shard_size: int,
    inline_functions: bool,
    no_validate: bool,
    atol: float | None,
    rtol: float | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **source_options: Any,
) -> None:
    """Export a checkpoint to a bundle, and compare the two.

    A bundle is a folder: model.onnx, weights, tables in shards, manifest.
    """
    from umv2_export.commands.parity_table import print_parity
    from umv2_export.onnx.export import ExportOptions, export_bundle, plan_export
    from umv2_export.parity import check_bundle
    from umv2_export.progress import progress_bars
    from umv2_export.runtimes import require_runtime
    from umv2_export.system.output import require_free_space

    source = open_source(checkpoint, output, force=force, **source_options)
    parts = {**RETRIEVAL_FLAGS, "tables": ["key_dtype", "table_dtype", "shard_size"], "experts": ["moe_form"]}
    refuse_flags_of_absent_parts(source.config, parts, where=source.path)
    validates = not no_validate and dtype != "bf16"
    if not validates:
        why = (
            "--no-validate skips the check" if no_validate else "a bf16 bundle runs on GPUs, and is not validated here"
        )
        refuse_flags(["atol", "rtol"], why)
    options = ExportOptions(dtype, key_dtype, table_dtype, moe_form, cache, opset, shard_size, inline_functions, target)
    plan = plan_export(source, options)
    if dry_run:
        require_free_space(output, plan.disk_bytes)
        validation = plan.validation_memory_bytes if validates else 0
        print_dry_run(output, max(plan.memory_bytes, validation), plan.disk_bytes, validation, as_json=as_json)
        return
    # No runtime on a CPU computes bf16: of such a bundle only what is stored is checked.
    runtimes = ["onnxruntime"] if validates else []
    for runtime in runtimes:
        require_runtime(runtime, plan.min_onnxruntime)
    reports: list[ParityReport] = []

    with progress_bars() as track:

        def validate(bundle: "Bundle") -> None:
            report = check_bundle(bundle, source, runtimes, atol=atol, rtol=rtol, track=track)
            reports.append(report)
            if report.stored is None or not report.stored.passed or (runtimes and not report.passed):
                print_parity(report, "the checkpoint", stderr=True)
                raise CheckFailed(
                    "the exported model is not that of the checkpoint, or does not compute the same; no bundle was "
                    "written",
                    where=output,
                    fix="--no-validate writes it anyway, for `umv2-export parity --layerwise` to look into",
                )

        result = export_bundle(
            plan, output, validate=None if no_validate else validate, track=track, replace_target=force
        )
    parity = reports[0] if reports else None
    print_json(_as_dict(result, parity)) if as_json else print_export(result.bundle, parity)


def _as_dict(result: "ExportResult", parity: "ParityReport | None") -> dict[str, object]:
    manifest = result.bundle.manifest
    return {
        "bundle": str(result.bundle.path),
        "files": manifest.files,
        "parameters": manifest.parameters,
        "bytes": manifest.bytes,
        "parity": parity.as_dict() if parity is not None and parity.checks else None,
        "stored": parity.stored.as_dict() if parity is not None and parity.stored is not None else None,
        "seconds": result.seconds,
    }


def print_export(bundle: "Bundle", parity: "ParityReport | None") -> None:
    """Files, parameters, and what the validation found."""
    from umv2_export.commands.parity_table import print_parity, print_stored

    manifest = bundle.manifest
    counts = manifest.parameters
    size = sum(facts["size"] for facts in manifest.files.values())
    echo(f"{bundle.path}: {len(manifest.files)} files, {format_bytes(size)}")
    echo(
        f"parameters: {format_count(counts['total'])} in all, {format_count(counts['activated'])} activated a token "
        f"(dense {format_count(counts['dense'])}, keys {format_count(counts['keys'])}, "
        f"rows {format_count(counts['rows'])})"
    )
    stored = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in manifest.bytes.items() if size)
    retrieval = [f"keys {manifest.key_dtype}", f"tables {manifest.table_dtype}"] if bundle.config.memory.layers else []
    facts = [f"dense {manifest.dtype}", *retrieval, f"opset {manifest.opset}"]
    if manifest.cache == "static":
        facts.append("static cache")
    facts.append(f"for ONNX Runtime {manifest.min_onnxruntime} or later")
    if bundle.config.memory.query_per_rank and bundle.config.memory.layers:
        facts.append(f"query layout {manifest.query_layout}")
    echo(f"stored: {stored}; {', '.join(facts)}")
    if parity is None:
        echo("not validated")
    elif not parity.checks and parity.stored is not None:
        print_stored(parity.stored)
        echo("not run: no runtime on a CPU computes bf16")
    else:
        print_parity(parity, "the checkpoint")
