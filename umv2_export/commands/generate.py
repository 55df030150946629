"""`umv2-export generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from umv2_export.commands.options import device_option, engine_options, json_option, tokenizer_option
from umv2_export.commands.parameter_types import FOLDER, MOST_SEED, MOST_TOKENS, TEXT_FILE, positive, share, token_ids
from umv2_export.commands.printing import print_notes
from umv2_export.commands.refusals import refuse_flags
from umv2_export.commands.token_stream import TEXT, TokenStream
from umv2_export.errors import InputRejected, InvalidRequest
from umv2_export.names import RUNTIMES
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.bundle import Bundle
    from umv2_export.generation import Generation
    from umv2_export.tokenizer import TextTokenizer

__all__ = ["generate"]

# Of a file of prompts: it is read whole.
MOST_PROMPT_BYTES = 2**24


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--prompt", help="Text. It needs a tokenizer.json in the bundle, or --tokenizer.")
@click.option("--prompt-ids", type=token_ids, metavar="IDS", help="Token ids, such as 1,2,3.")
@click.option("--prompt-file", type=TEXT_FILE, help="Text with a prompt a line; all are continued together.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), default=32, show_default=True, help="Most tokens to add."
)
@click.option(
    "--cache-length",
    type=click.IntRange(1, MOST_TOKENS),
    help="Positions of a static cache; default: as many as prompt and new tokens need.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option(
    "--temperature",
    type=positive,
    metavar="FLOAT",
    help="Draw tokens; below 1 the better ones more often. Default: best.",
)
@click.option("--top-k", type=click.IntRange(1, MOST_TOKENS), help="Draw from so many of the best tokens.")
@click.option("--top-p", type=share, metavar="SHARE", help="Draw from the best tokens that have this probability.")
@click.option(
    "--seed",
    type=click.IntRange(0, MOST_SEED),
    default=0,
    show_default=True,
    help="The same seed draws the same tokens.",
)
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
    prompt_file: Path | None,
    max_new_tokens: int,
    cache_length: int | None,
    ignore_eos: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    tokenizer: Path | None,
    runtime: str,
    preload: bool,
    device: str,
    engine: Path | None,
    trust_engine: bool,
    plugin_library: Path | None,
    as_json: bool,
) -> None:
    """Continue a prompt through the KV cache, or several at once."""
    from umv2_export.bundle import Bundle
    from umv2_export.generation import check_prompts
    from umv2_export.generation import generate as continue_prompts
    from umv2_export.records.tokenizer_files import chosen_tokenizer
    from umv2_export.runtimes import choose_engine, open_runtime
    from umv2_export.sampling import Sampling
    from umv2_export.tokenizer import bundle_tokenizer

    if [prompt, prompt_ids, prompt_file].count(None) != 2:
        raise click.UsageError("pass one of --prompt, --prompt-ids and --prompt-file")
    if runtime != "torch":
        refuse_flags(["device"], f"the runtime {runtime} does not compute in PyTorch")
    if temperature is None:
        refuse_flags(["top_k", "top_p", "seed"], "without --temperature nothing is drawn: the best token is taken")
    choice = choose_engine([runtime], engine, trust=trust_engine, plugin_library=plugin_library)
    opened = Bundle(bundle)
    if opened.manifest.cache == "growing" or runtime == "torch":
        why = "the runtime torch has" if runtime == "torch" else "the bundle has"
        refuse_flags(["cache_length"], f"{why} a cache that grows", where=bundle)
    if opened.layout.rows == 0:
        refuse_flags(["preload"], "the model has no tables", where=bundle)
    words = None
    if prompt_ids is None or tokenizer is not None:
        words = bundle_tokenizer(opened, [] if tokenizer is None else chosen_tokenizer(tokenizer))
    prompts = [prompt_ids] if prompt_ids is not None else _encoded(opened, words, prompt, prompt_file)
    check_prompts(prompts, opened.config, max_new_tokens, cache_length)
    streams = prompt_file is None and not as_json
    stream = TokenStream(words)
    result = continue_prompts(
        open_runtime(runtime, opened, preload=preload, engine=choice, device=device),
        opened.config,
        prompts,
        max_new_tokens,
        sampling=Sampling(temperature or 0.0, top_k, 1.0 if top_p is None else top_p, seed),
        stop_at_eos=not ignore_eos,
        cache_length=cache_length,
        show=stream.show if streams else lambda row, token: None,
    )
    if as_json:
        print_json(_as_dict(runtime, prompts, result, words, several=prompt_file is not None))
        return
    if streams:
        stream.end()
    else:
        for number, tokens in enumerate(result.token_ids, 1):
            echo(f"[{number}] {words.decode(tokens) if words else ''}", keep=TEXT)
    rate = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.1f} tokens/s"
    echo(f"first tokens after {result.prefill_ms:.1f} ms{rate}", err=True)


def _encoded(
    bundle: "Bundle", words: "TextTokenizer | None", prompt: str | None, file: Path | None
) -> list[tuple[int, ...]]:
    """Token ids of a prompt, or of the lines of a file."""
    from umv2_export.tokenizer import no_tokenizer, utf8

    if words is None:
        raise no_tokenizer(bundle)
    print_notes(words.notes)
    if file is None:
        return [tuple(words.encode(utf8(prompt or "", where="--prompt")))]
    if file.stat().st_size > MOST_PROMPT_BYTES:
        raise InputRejected(f"the prompts have more than {MOST_PROMPT_BYTES} bytes", where=file)
    lines = utf8(file.read_bytes(), where=file).removesuffix("\n").split("\n")
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise InvalidRequest(f"line {empty} is empty", where=file, fix="a prompt a line, and no other lines")
    return [tuple(words.encode(line.removesuffix("\r"))) for line in lines]


def _as_dict(
    runtime: str,
    prompts: Sequence[Sequence[int]],
    result: "Generation",
    words: "TextTokenizer | None",
    *,
    several: bool,
) -> dict[str, object]:
    sequences = [
        {
            "prompt_ids": list(prompt),
            "token_ids": tokens,
            "text": None if words is None else words.decode(tokens),
        }
        for prompt, tokens in zip(prompts, result.token_ids, strict=True)
    ]
    return {
        "runtime": runtime,
        **({"sequences": sequences} if several else sequences[0]),
        "prefill_ms": result.prefill_ms,
        "decode_ms": result.decode_ms,
        "tokens_per_second": result.tokens_per_second,
    }
