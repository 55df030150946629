"""`umv2-export refit`."""

from pathlib import Path

import click

from umv2_export.commands.options import json_option, output_options
from umv2_export.commands.parameter_types import FILE, FOLDER
from umv2_export.commands.printing import format_bytes, print_dry_run
from umv2_export.system.exits import print_json
from umv2_export.system.target import check_target
from umv2_export.terminal import echo

__all__ = ["refit"]


@click.command()
@click.argument("engine", type=FOLDER)
@click.argument("bundle", type=FOLDER)
@output_options
@click.option("--trust-engine", is_flag=True, help="Load the engine though it differs from its manifest.")
@click.option("--plugin-library", type=FILE, help="Library of the plugins, if the engine was built with one.")
@json_option
def refit(
    engine: Path,
    bundle: Path,
    output: Path,
    trust_engine: bool,
    plugin_library: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put the weights of a bundle into an engine without any.

    ENGINE was built with --strip-weights. A new engine is written.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.engines.refit import plan_refit, refit_engine, require_resources
    from umv2_export.progress import progress_bars

    check_target(output, force=force, inputs=[engine, bundle, *filter(None, [plugin_library])])
    plan = plan_refit(engine, Bundle(bundle), trust=trust_engine, plugin_library=plugin_library)
    if dry_run:
        require_resources(plan, output)
        print_dry_run(output, plan.memory_bytes, plan.disk_bytes, as_json=as_json)
        return
    with progress_bars() as track:
        result = refit_engine(plan, output, replace_target=force, track=track)
    manifest = result.engine.manifest
    if as_json:
        print_json({"engine": str(output), **manifest.as_dict(), "seconds": result.seconds})
    else:
        echo(f"{output}: {format_bytes(manifest.size)} with the weights of {bundle}; the engine was not run")
