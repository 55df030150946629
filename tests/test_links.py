"""Links: what lies in a download cache loads; another user's links are not followed, private files not copied out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import run_command
from tests.models import GOLDEN
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InputRejected
from umv2_export.system.files import inside
from umv2_export.system.links import require_own_links

OLMOE = Path(__file__).parent / "data" / "olmoe" / "grouped"
BYTES_TOKENIZER = Path(__file__).parents[1] / "samples" / "checkpoints" / "moe" / "tokenizer.json"

Exported = Callable[..., tuple[Path, dict[str, Any]]]


def cached(folder: Path, cache: Path) -> Path:
    """A folder as download caches keep it: names that are links to blobs beside."""
    snapshot, blobs = cache / "snapshots" / "rev", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


@pytest.fixture(scope="module")
def bundle(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a cache, with what a hub adds."""
    snapshot = cached(exported("v2_shared_ring")[0], tmp_path_factory.mktemp("cache"))
    (snapshot / ".gitattributes").write_text("*.data filter=lfs\n")
    return snapshot


@pytest.mark.parametrize(
    "command",
    [
        ("verify",),
        ("inspect",),
        ("parity", "--layerwise", "--runtime", "onnxruntime", "--runtime", "onnxruntime-native"),
        ("parity", "--reference", str(GOLDEN["v2_shared_ring"])),
    ],
    ids=" ".join,
)
def test_every_command_takes_a_bundle_from_a_cache(bundle: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    result = run_command(name, bundle, *options)
    assert result.exit_code == 0, result.stderr


def test_bench_takes_a_bundle_from_a_cache(bundle: Path) -> None:
    # In a process of its own: it gives ONNX Runtime one pool of threads for all sessions.
    options = ("--batch", "1", "--iterations", "3", "--past", "4", "--prefill", "4")
    command = [sys.executable, "-m", "umv2_export.cli", "bench", str(bundle), *options]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-native", "torch"])
def test_a_bundle_from_a_cache_computes_the_same(bundle: Path, exported: Exported, runtime: str) -> None:
    options = ("--prompt-ids", "1,2,3", "--runtime", runtime)
    found = run_command("generate", bundle, *options)
    assert found.exit_code == 0, found.stderr
    assert found.stdout == run_command("generate", exported("v2_shared_ring")[0], *options).stdout


def test_one_file_may_be_linked_from_far_away(exported: Exported, tmp_path: Path) -> None:
    # ONNX Runtime itself refuses this one: the real path lies outside the folder of the graph.
    copy = Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "a" / "bundle"))
    (tmp_path / "far").mkdir()
    (copy / "weights.data").rename(tmp_path / "far" / "blob")
    (copy / "weights.data").symlink_to(tmp_path / "far" / "blob")
    for command in (("verify",), ("generate", "--prompt-ids", "1,2,3"), ("parity",)):
        name, *options = command
        result = run_command(name, copy, *options)
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("source", [OLMOE, GOLDEN["v2_shared_ring"]], ids=lambda path: path.name)
def test_a_checkpoint_from_a_cache_loads(source: Path, tmp_path: Path) -> None:
    assert open_checkpoint(cached(source, tmp_path)).config == open_checkpoint(source).config


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Give a folder or a link to another user."""
    if os.geteuid() == 0:
        return lambda path: os.chown(path, 12345, -1, follow_symlinks=False)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    return lambda path: None


def test_a_link_in_a_folder_of_another_user_is_not_followed(tmp_path: Path, foreign: Callable[[Path], None]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (tmp_path / "private").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "private")
    foreign(folder)
    with pytest.raises(InputRejected, match="link of another user"):
        inside(folder, "config.json")


def test_a_link_of_another_user_is_not_followed(tmp_path: Path, foreign: Callable[[Path], None]) -> None:
    (tmp_path / "private").write_text("{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "private")
    foreign(tmp_path / "config.json")
    with pytest.raises(InputRejected, match="link of another user"):
        require_own_links(tmp_path, "config.json")


def test_a_link_to_a_link_in_a_folder_of_another_user_is_not_followed(
    tmp_path: Path, foreign: Callable[[Path], None]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "private").write_text("{}")
    (theirs / "step").symlink_to(tmp_path / "private")
    (tmp_path / "config.json").symlink_to(Path("theirs") / "step")
    foreign(theirs)
    with pytest.raises(InputRejected, match="link of another user"):
        require_own_links(tmp_path, "config.json")


def test_files_of_another_user_that_are_no_links_are_read(tmp_path: Path, foreign: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("{}")
    foreign(tmp_path)
    assert inside(tmp_path, "file") == tmp_path / "file"


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
@pytest.mark.parametrize("command", ["verify", "inspect", "parity"])
def test_every_command_refuses_another_users_links_alike(
    exported: Exported, tmp_path: Path, foreign: Callable[[Path], None], name: str, command: str
) -> None:
    copy = Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "bundle"))
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    foreign(copy)
    result = run_command(command, copy)
    assert result.exit_code == 3
    assert "link of another user" in result.stderr


@pytest.mark.parametrize("name", ["config.yaml", "model.pt"])
def test_a_checkpoint_of_another_users_links_is_refused(
    tmp_path: Path, foreign: Callable[[Path], None], name: str
) -> None:
    folder = Path(shutil.copytree(GOLDEN["v2_shared_ring"], tmp_path / "official"))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    foreign(folder)
    with pytest.raises(InputRejected, match="link of another user"):
        open_checkpoint(folder)


def test_a_step_behind_another_users_link_is_refused(tmp_path: Path, foreign: Callable[[Path], None]) -> None:
    shutil.copytree(GOLDEN["v2_shared_ring"], tmp_path / "private")
    run = tmp_path / "run"
    run.mkdir()
    (run / "step5-unsharded").symlink_to(tmp_path / "private")
    assert open_checkpoint(run).notes
    foreign(run)
    with pytest.raises(InputRejected, match="link of another user"):
        open_checkpoint(run)


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    with pytest.raises(InputRejected, match="in a circle"):
        inside(tmp_path, "first")
    for name in ("config.json", "manifest.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).symlink_to(name)
        assert run_command("inspect", folder).exit_code == 3


SECRETS = {
    "text": "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n",
    "json": json.dumps({"auths": {"registry": {"auth": "c2VjcmV0"}}}),
    "settings": json.dumps({"model": "large", "chat_template": "x", "api_key": "c2VjcmV0"}),
    "nested": json.dumps({"model": {"name": "large", "api_key": "c2VjcmV0"}}),
    "list": json.dumps(["c2VjcmV0"]),
    "number": "4321",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("command", ["convert", "onnx"])
def test_a_private_file_behind_a_tokenizer_name_is_not_copied_out(
    tmp_path: Path, command: str, name: str, secret: str
) -> None:
    folder = Path(shutil.copytree(OLMOE, tmp_path / "checkpoint"))
    (tmp_path / "private").write_text(secret)
    (folder / name).symlink_to(tmp_path / "private")
    result = run_command(command, folder, "-o", tmp_path / "result")
    assert result.exit_code == 3
    assert f"not a {name}" in result.stderr
    assert "c2VjcmV0" not in result.stderr + result.stdout
    assert not (tmp_path / "result").exists()


def test_tokenizer_files_behind_links_are_copied_as_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLMOE, tmp_path / "source"))
    shutil.copyfile(BYTES_TOKENIZER, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "house_field": 1}')
    (folder / "special_tokens_map.json").write_text("{}")
    assert run_command("convert", cached(folder, tmp_path / "cache"), "-o", tmp_path / "native").exit_code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert not (tmp_path / "native" / name).is_symlink()
        assert (tmp_path / "native" / name).read_bytes() == (folder / name).read_bytes()


def test_verify_still_finds_a_file_that_no_hub_adds(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle", symlinks=False))
    Bundle(copy).verify()
    (copy / "rows-extra.data").write_text("x")
    assert run_command("verify", copy).exit_code == 1
