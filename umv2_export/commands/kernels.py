"""`umv2-export kernels`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from umv2_export.commands.options import json_option, output_options
from umv2_export.commands.parameter_types import FOLDER
from umv2_export.commands.printing import print_dry_run
from umv2_export.presets import PRESETS
from umv2_export.system.exits import print_json
from umv2_export.system.target import check_target
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from umv2_export.gpu.index import CompiledKernel

__all__ = ["kernels"]


@click.command()
@click.argument("bundle", type=FOLDER, required=False)
@output_options
@click.option(
    "--compute-capability",
    metavar="LIST",
    default="8.0,8.6,8.9,9.0,10.0,12.0",
    show_default=True,
    help="Architectures to compile for.",
)
@json_option
def kernels(
    bundle: Path | None, output: Path, compute_capability: str, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Compile the GPU kernels ahead of time.

    The output is PTX, cubin, and an index of how to call them. The kernels are those that BUNDLE calls, in every
    dtype. Without BUNDLE they are those of the published 227M/1.2B model.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.compute_capability import parse_compute_capabilities
    from umv2_export.gpu.ahead_of_time import (
        ARCHITECTURES,
        COMPILER_MEMORY,
        KERNEL_BYTES,
        build_kernels,
        compiler_processes,
        require_triton,
    )
    from umv2_export.gpu.variants import model_variants
    from umv2_export.progress import progress_bars
    from umv2_export.system.output import require_free_space

    check_target(output, force=force, inputs=[] if bundle is None else [bundle])
    require_triton()
    architectures = parse_compute_capabilities(compute_capability, ARCHITECTURES, "triton")
    opened = None if bundle is None else Bundle(bundle)
    config, shards = (PRESETS["umv2-227m-1.2b"], 1) if opened is None else (opened.config, opened.layout.shards)
    variants = model_variants(config, shards)
    count = len(variants) * len(architectures)
    size = KERNEL_BYTES * count
    require_free_space(output, size)
    if dry_run:
        print_dry_run(output, COMPILER_MEMORY * compiler_processes(count), size, as_json=as_json)
        return
    with progress_bars() as track:
        compiled = build_kernels(output, variants, architectures, track, replace_target=force)
    for kernel in compiled:
        if kernel.spill_bytes:  # it computes the same, only slower
            echo(
                f"warning: {kernel.name} for {kernel.compute_capability} spills {kernel.spill_bytes} bytes of "
                "registers a thread: it may be slow",
                err=True,
            )
    if as_json:
        print_json({"output": str(output), "kernels": [kernel.as_dict() for kernel in compiled]})
    else:
        _print_kernels(output, compiled)


def _print_kernels(folder: Path, kernels: "Sequence[CompiledKernel]") -> None:
    """What each kernel takes of a GPU."""
    from rich.table import Table

    from umv2_export.console import print_table

    table = Table()
    table.add_column("kernel", no_wrap=True)
    for heading in ("for", "registers", "spilled bytes", "shared bytes", "16-byte loads"):
        table.add_column(heading, justify="right")
    for kernel in kernels:
        numbers = (kernel.registers, kernel.spill_bytes, kernel.shared_bytes, kernel.vector_loads)
        table.add_row(kernel.name, kernel.compute_capability, *map(str, numbers))
    print_table(table)
    echo(f"{folder}: {len(kernels)} kernels")
