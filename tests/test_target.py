"""What may be written: never over what is read, under whatever name it is reached; and named before work begins."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from umv2_export.errors import InvalidRequest
from umv2_export.system.output import atomic_directory
from umv2_export.system.target import check_file_target, check_target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder that an earlier run wrote."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


@pytest.fixture
def stale(target: Path) -> Path:
    """What a killed run left."""
    child = os.fork()
    if child == 0:
        with atomic_directory(target):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (folder,) = target.parent.glob(".umv2-partial-*")
    return folder


def test_a_folder_that_is_missing_or_empty_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=False)
    check_target(tmp_path / "missing", force=False)


def test_a_folder_that_is_not_empty_needs_force(target: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"not empty[\s\S]*--force"):
        check_target(target, force=False)
    check_target(target, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(target: Path, force: bool) -> None:
    with pytest.raises(InvalidRequest, match="is a file"):
        check_target(target / "old", force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_target_below_a_file_is_refused(target: Path, force: bool) -> None:
    with pytest.raises(InvalidRequest):
        check_target(target / "old" / "bundle", force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [".", "..", "../..", "../../bundle"])
def test_the_working_directory_and_what_holds_it_are_refused(
    target: Path, monkeypatch: pytest.MonkeyPatch, name: str, force: bool
) -> None:
    (target / "below").mkdir()
    monkeypatch.chdir(target / "below")
    with pytest.raises(InvalidRequest, match="holds the current folder"):
        check_target(Path(name), force=force)


def test_force_does_not_delete_the_home_directory(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(target / "user"))
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True)


def test_force_does_not_delete_the_input(target: Path) -> None:
    for checkpoint in (target, target / "checkpoints" / "step-1"):
        with pytest.raises(InvalidRequest, match="--force would delete"):
            check_target(target, force=True, inputs=[checkpoint])


def test_force_does_not_delete_an_input_behind_a_link(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target / "checkpoint")
    (target / "checkpoint").mkdir()
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True, inputs=[link])


def test_force_does_not_delete_a_file_that_the_input_links_to(target: Path) -> None:
    checkpoint = target.with_name("checkpoint")
    (checkpoint / "snapshot").mkdir(parents=True)
    (checkpoint / "snapshot" / "weights").symlink_to(target / "old")
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True, inputs=[checkpoint])


def test_force_does_not_delete_a_link_on_the_way_to_the_input(target: Path) -> None:
    checkpoint = target.with_name("checkpoint")
    checkpoint.mkdir()
    (target / "way").symlink_to(checkpoint)
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True, inputs=[target / "way"])


def test_force_does_not_delete_a_hard_link_of_the_input(target: Path) -> None:
    checkpoint = target.with_name("checkpoint")
    checkpoint.mkdir()
    (checkpoint / "weights").hardlink_to(target / "old")
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True, inputs=[checkpoint])


def test_force_does_not_delete_a_file_that_is_read(target: Path) -> None:
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(target, force=True, inputs=[target / "old"])


@pytest.fixture
def bound(target: Path) -> Iterator[Path]:
    """The parent of the target, mounted a second time."""
    with tempfile.TemporaryDirectory() as name:
        if subprocess.run(["mount", "--bind", target.parent, name], check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def test_an_input_is_known_under_another_mount(target: Path, bound: Path) -> None:
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(bound / "bundle", force=True, inputs=[target])
    with pytest.raises(InvalidRequest, match="which is read"):
        check_target(bound / "bundle" / "below", force=True, inputs=[target])
    with pytest.raises(InvalidRequest, match="--force would delete"):
        check_target(bound / "bundle", force=True, inputs=[target / "old"])


def test_what_a_dead_run_left_is_no_input_for_the_run_that_would_remove_it(target: Path, stale: Path) -> None:
    with pytest.raises(InvalidRequest, match="temporary folder"):
        check_target(target.with_name("other"), force=False, inputs=[stale / "new"])
    link = target.with_name("link")
    link.symlink_to(stale / "new")
    with pytest.raises(InvalidRequest, match="temporary folder"):
        check_target(target.with_name("other"), force=False, inputs=[link])


def test_a_target_in_a_temporary_folder_is_refused(stale: Path) -> None:
    with pytest.raises(InvalidRequest, match="temporary folder"):
        check_target(stale / "new", force=True)


@pytest.mark.parametrize("link", ["loop", "loop/below", "first"])
def test_a_circle_of_links_is_named(tmp_path: Path, link: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    with pytest.raises(InvalidRequest, match="circle"):
        check_target(tmp_path / link, force=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 256, "too long"),
        ("/".join(["n" * 200] * 25), "too long"),
        ("/".join(["n" * 200] * 19 + ["n" * 150]), "too long to write files in it"),
        ("nul\0", "NUL"),
        ("not-utf-8-\udcff", "not UTF-8"),
        ("not-utf-8-\udcff/below", "not UTF-8"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_name_that_no_file_or_no_library_can_have_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_target(tmp_path / name, force=False)


def test_a_folder_that_is_reached_through_one_that_is_not_utf_8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not-utf-8-\udcff"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for target in (Path("bundle"), tmp_path / "link" / "bundle"):
        with pytest.raises(InvalidRequest, match="not UTF-8"):
            check_target(target, force=False)


def test_without_a_home_force_replaces(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    check_target(target, force=True)


def test_force_replaces_a_folder_beside_the_input(target: Path) -> None:
    check_target(target, force=True, inputs=[target.with_name("bundle-2")])


def test_a_target_in_what_is_read_names_it(target: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"lies in {target}, which is read"):
        check_target(target / "new", force=False, inputs=[target])


# check_file_target


def test_a_file_is_not_written_over_what_is_read(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target / "old")
    for file in (target / "old", target / "new", target / "below" / "new", link):
        with pytest.raises(InvalidRequest, match=r"the report would be written into, or over"):
            check_file_target(file, force=True, inputs=[target], what="the report")
    with pytest.raises(InvalidRequest, match="would be written into, or over"):
        check_file_target(target / "old", force=True, inputs=[target / "old"], what="the report")


def test_a_file_beside_what_is_read_may_be_written(target: Path) -> None:
    check_file_target(target.with_name("report"), force=False, inputs=[target], what="the report")


@pytest.mark.parametrize("name", ["", "old/below"])
def test_a_file_is_to_be_a_file_in_a_folder(target: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is to be a file"):
        check_file_target(target / name, force=True, inputs=[], what="the report")


def test_a_file_that_exists_needs_force(target: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"the report exists[\s\S]*--force"):
        check_file_target(target / "old", force=False, inputs=[], what="the report")
