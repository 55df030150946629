"""Tokenizers: text as transformers would encode it, and every way in which a tokenizer fails as one named error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from tests.command import run_command
from tests.models import GOLDEN
from umv2_export.bundle import Bundle
from umv2_export.errors import InputRejected, InvalidRequest
from umv2_export.tokenizer import TextTokenizer, text_ids

# 256 tokens, one a byte.
BYTES_TOKENIZER = Path(__file__).parents[1] / "samples" / "checkpoints" / "moe" / "tokenizer.json"

Exported = Callable[..., tuple[Path, dict[str, Any]]]


def write(folder: Path, **changes: Any) -> Path:
    """A tokenizer.json with other sections."""
    folder.mkdir(exist_ok=True)
    document = json.loads(BYTES_TOKENIZER.read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder / "tokenizer.json"


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "x",
}


@pytest.mark.parametrize(
    "stored", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"truncation": {**TRUNCATION, "stride": 9}}]
)
def test_stored_truncation_and_padding_are_reset(tmp_path: Path, stored: dict[str, Any]) -> None:
    tokenizer = TextTokenizer([write(tmp_path, **stored)], 256)
    assert tokenizer.encode("a longer text") == list(b"a longer text")
    assert tokenizer.decode(list(b"a longer text")) == "a longer text"


def with_ends(folder: Path, template: str | None, **settings: Any) -> TextTokenizer:
    """The tokenizer with <s> and </s> as 256 and 257, a template, and a tokenizer_config.json."""
    tokenizer = Tokenizer.from_file(str(BYTES_TOKENIZER))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    return TextTokenizer([folder / "tokenizer.json", folder / "tokenizer_config.json"], 258)


# What transformers 4.46 and 5.24 both encode, where they agree; for `add_bos_token: true` of GPTNeoX, 4.46 alone.
@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (None, {}, [97]),
        ("<s> $A", {}, [256, 97]),
        ("<s> $A </s>", {"tokenizer_class": "PreTrainedTokenizerFast"}, [256, 97, 257]),
        ("<s> $A", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, [256, 97]),
        (None, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, [97]),
        ("<s> $A", {"tokenizer_class": "GPTNeoXTokenizer"}, [97]),
        ("<s> $A", {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": False}, [97]),
        (None, {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}, [256, 97]),
        (None, {"tokenizer_class": "GPTNeoXTokenizer", "add_eos_token": True}, [97, 257]),
    ],
)
def test_start_and_end_tokens_are_those_of_transformers(
    tmp_path: Path, template: str | None, settings: dict[str, Any], expected: list[int]
) -> None:
    assert with_ends(tmp_path, template, **settings).encode("a") == expected


@pytest.mark.parametrize(
    ("template", "settings"), [(None, {"add_bos_token": True}), ("<s> $A", {"add_bos_token": False})]
)
def test_settings_that_the_template_contradicts_are_noted(
    tmp_path: Path, template: str | None, settings: dict[str, Any]
) -> None:
    assert len(with_ends(tmp_path, template, **settings).notes) == 1
    assert not with_ends(tmp_path, "<s> $A", add_bos_token=True).notes


def test_a_start_token_that_the_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="start token '<b>' is not in the vocabulary"):
        with_ends(tmp_path, None, tokenizer_class="GPTNeoXTokenizer", add_bos_token=True, bos_token={"content": "<b>"})


# Each of the first three is a Rust panic, which is a BaseException.
BROKEN: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "pre-tokenizer": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "model": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["b", -1.0]]}},
    "section": {"model": {"type": "nothing"}},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_every_failure_of_the_package_is_a_rejected_input(
    tmp_path: Path, exported: Exported, capfd: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    file = write(tmp_path, **changes)
    bundle = exported("v2_shared_ring")[0]
    result = run_command("generate", bundle, "--prompt", "a", "--tokenizer", file)
    assert result.exit_code == 3
    assert str(file) in result.stderr
    assert "panicked" not in capfd.readouterr().err


def test_an_empty_vocabulary_is_named(tmp_path: Path) -> None:
    model = json.loads(BYTES_TOKENIZER.read_text())["model"] | {"vocab": {}, "merges": []}
    with pytest.raises(InputRejected, match="empty vocabulary"):
        TextTokenizer([write(tmp_path, model=model)], 256)


def test_a_text_for_which_there_is_no_token_is_named(tmp_path: Path) -> None:
    model = json.loads(BYTES_TOKENIZER.read_text())["model"] | {"vocab": {"b": 0}, "merges": []}
    with pytest.raises(InputRejected, match="no token for the text"):
        TextTokenizer([write(tmp_path, model=model)], 256).encode("a")


def test_an_id_that_the_model_lacks_is_named_with_both_numbers() -> None:
    with pytest.raises(InputRejected, match="the id 122, which is outside the model's vocabulary of 122"):
        TextTokenizer([BYTES_TOKENIZER], 122).encode("xyz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with 250 tokens, with a tokenizer of 256."""
    output = tmp_path_factory.mktemp("exports") / "bundle"
    options = ("--no-validate", "--tokenizer", BYTES_TOKENIZER)
    result = run_command("onnx", GOLDEN["v2_shared_ring"], "-o", output, *options)
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def test_a_bundle_of_the_authors_generates_text_with_the_tokenizer_that_was_named(bundle: Path) -> None:
    assert (bundle / "tokenizer.json").read_bytes() == BYTES_TOKENIZER.read_bytes()
    assert run_command("verify", bundle).exit_code == 0
    result = run_command("generate", bundle, "--prompt", "Hi", "--json", "--max-new-tokens", "3")
    found = json.loads(result.stdout)
    assert found["prompt_ids"] == list(b"Hi")
    assert isinstance(found["text"], str)


@pytest.mark.parametrize(
    ("command", "option"), [("generate", "--prompt"), ("parity", "--prompt-file"), ("bench", "--text")]
)
@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (b"", 2, "empty"),
        (b"caf\xe9", 2, "not UTF-8"),
        # The ids of its bytes are above 249.
        ("\U0010ffff".encode() * 4000 + b"\xf4\x8f\xbf\xbf", 3, None),
    ],
    ids=["empty", "latin-1", "beyond"],
)
def test_texts_that_cannot_be_end_alike_in_every_command(
    bundle: Path, tmp_path: Path, command: str, option: str, text: bytes, code: int, message: str | None
) -> None:
    document = json.loads(BYTES_TOKENIZER.read_text())
    if code == 3:
        # Give a frequent byte an id that the model lacks.
        vocabulary = document["model"]["vocab"]
        names = {number: name for name, number in vocabulary.items()}
        vocabulary[names[0xF4]], vocabulary[names[255]] = 255, 0xF4
        manifest = json.loads((bundle / "manifest.json").read_text())
        content = json.dumps(document).encode()
        (bundle / "tokenizer.json").write_bytes(content)
        manifest["files"]["tokenizer.json"]["size"] = len(content)
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    if option == "--prompt":
        value: object = text.decode("utf-8", "surrogateescape")[:50]
    else:
        value = tmp_path / "text"
        (tmp_path / "text").write_bytes(text)
    result = run_command(command, bundle, option, value)
    assert result.exit_code == code, result.stderr
    assert (message or "outside the model's vocabulary of 250") in result.stderr


def test_without_a_tokenizer_the_message_names_that_of_the_configuration(exported: Exported, tmp_path: Path) -> None:
    official = tmp_path / "official"
    official.mkdir()
    for file in GOLDEN["v2_shared_ring"].iterdir():
        (official / file.name).write_bytes(file.read_bytes())
    with (official / "config.yaml").open("a") as config:
        config.write("tokenizer:\n  identifier: tokenizers/house.json\n  truncate_direction: right\n")
    # Through the native format, which carries the name along.
    assert run_command("convert", official, "-o", tmp_path / "native").exit_code == 0
    assert run_command("onnx", tmp_path / "native", "-o", tmp_path / "bundle", "--no-validate").exit_code == 0
    result = run_command("generate", tmp_path / "bundle", "--prompt", "a")
    assert result.exit_code == 2
    assert "its configuration names 'tokenizers/house.json'" in result.stderr
    assert "--tokenizer" in result.stderr
    named = run_command("generate", tmp_path / "bundle", "--prompt", "a", "--tokenizer", BYTES_TOKENIZER)
    assert named.exit_code == 0, named.stderr


def test_convert_takes_the_tokenizer_that_was_named_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "gpt-neox-house.json").write_bytes(BYTES_TOKENIZER.read_bytes())
    options = ("-o", tmp_path / "native", "--tokenizer", tmp_path / "gpt-neox-house.json")
    assert run_command("convert", GOLDEN["v2_shared_ring"], *options).exit_code == 0
    assert (tmp_path / "native" / "tokenizer.json").read_bytes() == BYTES_TOKENIZER.read_bytes()


@pytest.mark.parametrize("content", [None, "no JSON", '{"login": "secret"}'])
def test_a_tokenizer_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "given.json").write_text(content)
    options = ("-o", tmp_path / "native", "--tokenizer", tmp_path / "given.json")
    result = run_command("convert", GOLDEN["v2_shared_ring"], *options)
    assert result.exit_code == 3
    assert not (tmp_path / "native").exists()


def test_a_text_without_a_tokenizer_is_its_bytes(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    np.testing.assert_array_equal(text_ids(bundle, b"a\xff"), [97, 255 % 250])
    with pytest.raises(InvalidRequest, match="empty"):
        text_ids(bundle, b"")
