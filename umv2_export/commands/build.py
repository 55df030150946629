"""`umv2-export build`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from umv2_export.commands.options import Option, json_option, output_options
from umv2_export.commands.parameter_types import FILE, FOLDER
from umv2_export.commands.printing import format_bytes, print_dry_run
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.system.exits import print_json
from umv2_export.system.target import check_target
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.engines.build import BuildResult

__all__ = ["build"]

PLUGIN_NEEDS = {
    "aot": "its kernels were compiled ahead of time and lie in the engine",
    "jit": "its kernels are compiled where it is loaded: that takes Python, Triton and this package",
}


def shape_option(bound: str) -> Option[Any]:
    """--min-shapes, --opt-shapes or --max-shapes."""
    return click.option(
        f"--{bound}-shapes",
        multiple=True,
        metavar="NAME:1x16",
        help=f"The {bound} shape of an input. It holds for every input that shares a size. Repeatable.",
    )


@click.command()
@click.argument("bundle", type=FOLDER)
@output_options
@click.option("--runtime", type=click.Choice(BUILD_RUNTIMES), required=True, help="Library that will run the engine.")
@click.option(
    "--compute-capability",
    metavar="LIST",
    help="Architectures that the engine runs on. tensorrt-rtx: some of 8.0, 8.6, 8.9, 12.0, 12.1; by default "
    "8.6,8.9,12.0. tensorrt: the one of this machine's GPU.",
)
@shape_option("min")
@shape_option("opt")
@shape_option("max")
@click.option("--timing-cache", type=FILE, help="tensorrt: keep timings in this file, with a record beside it.")
@click.option("--require-timing-cache", is_flag=True, help="tensorrt: fail if a timing is missing in the cache.")
@click.option(
    "--require-aot/--allow-jit",
    default=True,
    help="tensorrt: the engine must hold compiled kernels (default), or may need Python and Triton to run.",
)
@click.option("--plugin-library", type=FILE, help="tensorrt: take the plugins of this shared library.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: let later versions load the engine.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: let all GPUs from Ampere on run the engine.")
@click.option("--strip-weights", is_flag=True, help="tensorrt: leave out the weights; `refit` puts them in.")
@json_option
def build(
    bundle: Path,
    output: Path,
    runtime: str,
    require_aot: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    min_shapes: Sequence[str],
    opt_shapes: Sequence[str],
    max_shapes: Sequence[str],
    **options: Any,
) -> None:
    """Compile a bundle to an engine.

    The engine has profiles for prefill and decode. tensorrt-rtx needs no GPU for the build.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.engines.backend import BuildOptions
    from umv2_export.engines.build import build_engine, plan_build
    from umv2_export.engines.plan import check_target_and_resources
    from umv2_export.engines.timing_cache import check_timing_cache
    from umv2_export.progress import progress_bars

    inputs = [bundle, *filter(None, [options["plugin_library"]])]
    check_target(output, force=force, inputs=inputs)
    if options["timing_cache"] is not None:
        check_timing_cache(options["timing_cache"], inputs)
    shapes = {"min": min_shapes, "opt": opt_shapes, "max": max_shapes}
    plan = plan_build(runtime, Bundle(bundle), BuildOptions(shapes=shapes, allow_jit=not require_aot, **options))
    if dry_run:
        check_target_and_resources(plan, output)
        print_dry_run(output, plan.memory_bytes, plan.disk_bytes, as_json=as_json)
        return
    with progress_bars() as track:
        result = build_engine(plan, output, replace_target=force, track=track)
    if as_json:
        facts = {"checked_values": result.checked_values, "seconds": result.seconds}
        print_json({"engine": str(output), **result.engine.manifest.as_dict(), **facts})
    else:
        _print_build(result)


def _print_build(result: "BuildResult") -> None:
    """What was written, what was checked, and what the engine needs where it is loaded."""
    manifest = result.engine.manifest
    newer = " and newer" if manifest.hardware_compatible else ""
    echo(
        f"{result.engine.path}: {format_bytes(manifest.size)}, {manifest.runtime} {manifest.runtime_version}, "
        f"compute capabilities {', '.join(manifest.compute_capabilities)}{newer}, "
        f"profiles {', '.join(profile['name'] for profile in manifest.profiles)}, built in {result.seconds:.1f} s"
    )
    echo(
        f"the parsed network has the graph's {len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs, and "
        f"{result.checked_values} float values of it have the graph's dtypes; the engine itself was not run"
    )
    if manifest.plugins == "library":
        needed = manifest.needs_plugin_library
        echo("the plugin library must be loaded before it" if needed else "it brings its plugin library")
    elif manifest.plugins in PLUGIN_NEEDS:
        echo(PLUGIN_NEEDS[manifest.plugins])
    if manifest.weights == "stripped":
        echo("it has no weights: `umv2-export refit` puts them in")
