"""`umv2-export generate`."""

from pathlib import Path

import click

from umv2_export.commands.options import device_option, engine_options, json_option, tokenizer_option
from umv2_export.commands.parameter_types import FOLDER, MOST_TOKENS, token_ids
from umv2_export.commands.printing import print_notes
from umv2_export.commands.refusals import refuse_flags
from umv2_export.names import RUNTIMES
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

__all__ = ["generate"]


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--prompt", help="Text. It needs a tokenizer.json in the bundle, or --tokenizer.")
@click.option("--prompt-ids", type=token_ids, metavar="IDS", help="Token ids, such as 1,2,3.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), default=32, show_default=True, help="Most tokens to add."
)
@click.option(
    "--cache-length",
    type=click.IntRange(1, MOST_TOKENS),
    help="Positions of a static cache; default: as many as prompt and new tokens need.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@tokenizer_option
@click.option(
    "--runtime", type=click.Choice(RUNTIMES), default="onnxruntime", show_default=True, help="Runtime of the bundle."
)
@click.option("--preload", is_flag=True, help="Read all tables into memory (huge pages) instead of mapping them.")
@device_option
@engine_options
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_ids: tuple[int, ...] | None,
    max_new_tokens: int,
    cache_length: int | None,
    ignore_eos: bool,
    tokenizer: Path | None,
    runtime: str,
    preload: bool,
    device: str,
    engine: Path | None,
    trust_engine: bool,
    plugin_library: Path | None,
    as_json: bool,
) -> None:
    """Continue a prompt greedily, through the KV cache."""
    from umv2_export.bundle import Bundle
    from umv2_export.generation import generate_greedily
    from umv2_export.records.tokenizer_files import chosen_tokenizer
    from umv2_export.runtimes import choose_engine, open_runtime
    from umv2_export.tokenizer import bundle_tokenizer, no_tokenizer, utf8

    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("pass either --prompt or --prompt-ids")
    if runtime != "torch":
        refuse_flags(["device"], f"the runtime {runtime} does not compute in PyTorch")
    choice = choose_engine([runtime], engine, trust=trust_engine, plugin_library=plugin_library)
    opened = Bundle(bundle)
    if opened.manifest.cache == "growing" or runtime == "torch":
        why = "the runtime torch has" if runtime == "torch" else "the bundle has"
        refuse_flags(["cache_length"], f"{why} a cache that grows", where=bundle)
    if opened.layout.rows == 0:
        refuse_flags(["preload"], "the model has no tables", where=bundle)
    words = None
    if prompt is not None or tokenizer is not None:
        words = bundle_tokenizer(opened, [] if tokenizer is None else chosen_tokenizer(tokenizer))
    if prompt is not None:
        if words is None:
            raise no_tokenizer(opened)
        print_notes(words.notes)
        prompt_ids = tuple(words.encode(utf8(prompt, where="--prompt")))
    result = generate_greedily(
        open_runtime(runtime, opened, preload=preload, engine=choice, device=device),
        opened.config,
        prompt_ids or (),
        max_new_tokens,
        stop_at_eos=not ignore_eos,
        cache_length=cache_length,
    )
    text = None if words is None else words.decode(result.token_ids)
    if as_json:
        print_json(
            {
                "runtime": runtime,
                "prompt_ids": list(prompt_ids or ()),
                "token_ids": result.token_ids,
                "text": text,
                "prefill_ms": result.prefill_ms,
                "decode_ms": result.decode_ms,
            }
        )
        return
    # Tabs, and the joiners of Persian, Hindi and emoji, are text.
    shown_text = text if text is not None else ",".join(str(token) for token in result.token_ids)
    echo(shown_text, keep="\n\t\u200c\u200d")
