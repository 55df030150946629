"""Folders appear whole or not at all, and names that were read from a file stay in their folder."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from umv2_export import files
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest
from umv2_export.files import (
    HashedFile,
    atomic_directory,
    file_sha256,
    inside,
    require_free_space,
    tensor_bytes,
    write_atomically,
)
from umv2_export.target import check_target
from umv2_export.temporary import MARKER

# Writes half of a new folder, says so, and waits to be killed.
HALF_A_RUN = """
import sys, time
from pathlib import Path
from umv2_export.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("new")
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder that an earlier run wrote."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def partial_of(target: Path) -> Path:
    """The temporary sibling, of the one run that there was."""
    (folder,) = target.parent.glob(".umv2-partial-*")
    return folder


@pytest.fixture
def stale(target: Path) -> Path:
    """What a killed run of the same target left."""
    kill_half_a_run(target)
    return partial_of(target)


def kill_half_a_run(target: Path) -> None:
    child = os.fork()
    if child == 0:
        with atomic_directory(target) as folder:
            (folder / "half").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def replace(target: Path) -> None:
    """A run that succeeds."""
    with atomic_directory(target) as folder:
        (folder / "new").write_text("new")


def listing(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(entry.name for entry in folder.iterdir())


# atomic_directory


def test_a_new_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as folder:
        (folder / "new").write_text("new")
        assert not target.exists()
    assert listing(target) == ["new"]
    assert listing(tmp_path) == ["bundle"]


def test_folders_above_the_target_are_made(tmp_path: Path) -> None:
    replace(tmp_path / "a" / "b" / "bundle")
    assert listing(tmp_path / "a" / "b") == ["bundle"]


def test_the_old_folder_is_replaced_as_a_whole(target: Path) -> None:
    replace(target)
    assert listing(target) == ["new"]
    assert listing(target.parent) == ["bundle"]


def test_the_old_folder_stays_while_the_new_one_is_written(target: Path) -> None:
    with atomic_directory(target) as folder:
        (folder / "new").write_text("new")
        assert listing(target) == ["old"]


def test_an_error_keeps_the_old_folder_and_removes_the_partial_one(target: Path) -> None:
    def fail_half_way() -> None:
        with atomic_directory(target) as folder:
            (folder / "new").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert listing(target) == ["old"]
    assert listing(target.parent) == ["bundle"]


def test_an_interrupt_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "bundle"):
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_the_partial_folder_of_a_dead_run_is_removed(target: Path, stale: Path) -> None:
    (stale / "new" / "folder").mkdir(parents=True)
    (stale / "new" / "folder" / "file").write_text("stale")
    (stale / "link").symlink_to(target)
    with atomic_directory(target) as folder:
        assert listing(folder) == []
        assert not stale.exists()
    assert listing(target) == []
    assert listing(target.parent) == ["bundle"]


def test_a_run_of_another_target_removes_it_too(target: Path, stale: Path) -> None:
    replace(target.with_name("other"))
    assert not stale.exists()
    assert listing(target.parent) == ["bundle", "other"]


def test_what_a_link_of_a_dead_run_points_to_is_kept(target: Path, stale: Path) -> None:
    kept = target.parent / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (stale / "new" / "link").symlink_to(kept)
    (stale / "link").symlink_to(kept)
    replace(target)
    assert listing(kept) == ["file"]


def test_a_live_run_of_the_same_target_is_not_disturbed(target: Path) -> None:
    with atomic_directory(target) as folder:
        (folder / "first").write_text("first")
        with pytest.raises(EnvironmentUnfit, match="another run is writing this output"), atomic_directory(target):
            pass
        assert listing(folder) == ["first"]
    assert listing(target) == ["first"]


def test_a_live_run_beside_the_target_is_not_disturbed(target: Path) -> None:
    with atomic_directory(target.with_name("other")) as folder:
        (folder / "first").write_text("first")
        replace(target)
    assert listing(target.parent) == ["bundle", "other"]
    assert listing(target.with_name("other")) == ["first"]


def test_a_lock_of_another_process_refuses_with_exit_code_4(target: Path, stale: Path) -> None:
    lock = os.open(stale / MARKER, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(EnvironmentUnfit) as caught:
            replace(target)
    finally:
        os.close(lock)
    assert caught.value.exit_code == 4
    assert listing(target) == ["old"]
    assert listing(stale / "new") == ["half"]


def test_a_killed_run_leaves_the_old_folder_and_the_next_run_succeeds(target: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HALF_A_RUN, str(target)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"written\n"
        with pytest.raises(EnvironmentUnfit, match="another run"):
            replace(target)
        run.send_signal(signal.SIGKILL)
    assert listing(target) == ["old"]
    assert listing(partial_of(target) / "new") == ["half"]
    replace(target)
    assert listing(target) == ["new"]
    assert listing(target.parent) == ["bundle"]


def test_of_runs_that_start_at_once_one_writes(target: Path) -> None:
    gate = threading.Barrier(8)

    def run(number: int) -> bool:
        gate.wait()
        try:
            with atomic_directory(target) as folder:
                (folder / str(number)).write_text("")
                gate.wait()
        except EnvironmentUnfit:
            gate.wait()
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(run, range(8))) == 1
    assert listing(target.parent) == ["bundle"]


# Folders of the user that look like ours.


def strangers(parent: Path, target: Path, stale: Path) -> dict[str, Path]:
    """Names and contents from which a careless tool would conclude that they are its own."""
    folders = {
        name: parent / name
        for name in (f".{target.name}.partial", f".{target.name}.old", ".umv2-partial-", ".umv2-partial-abcdefgh")
    }
    for folder in folders.values():
        folder.mkdir()
    folders["a copy of a stale one"] = Path(shutil.copytree(stale, parent / ".umv2-partial-copied00"))
    renamed = folders["a stale one under another name"] = Path(
        shutil.copytree(stale, parent / ".umv2-partial-renamed0")
    )
    marker = json.loads((renamed / MARKER).read_text())
    (renamed / MARKER).write_text(json.dumps(marker | {"inode": renamed.stat().st_ino}))
    broken = folders["a broken marker"] = parent / ".umv2-partial-broken00"
    broken.mkdir()
    (broken / MARKER).write_text("[" * 10_000)
    linked = folders["a marker that is a link"] = parent / ".umv2-partial-linked00"
    linked.mkdir()
    marker = {**marker, "folder": linked.name, "inode": linked.stat().st_ino}
    (parent / "marker").write_text(json.dumps(marker))
    (linked / MARKER).symlink_to(parent / "marker")
    return folders


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_of_the_user_is_never_touched_whatever_its_name(
    target: Path, stale: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_rename_exchange", lambda first, second: False)
    folders = strangers(target.parent, target, stale)
    for folder in folders.values():
        (folder / "thesis").write_text("kept")
    replace(target)
    assert {name: (folder / "thesis").read_text() for name, folder in folders.items()} == dict.fromkeys(folders, "kept")
    assert not stale.exists()


def test_a_link_to_a_stale_folder_is_not_ours(target: Path, stale: Path) -> None:
    elsewhere = target.parent / "elsewhere"
    elsewhere.mkdir()
    moved = stale.rename(elsewhere / stale.name)
    (target.parent / stale.name).symlink_to(moved)
    replace(target)
    assert listing(moved / "new") == ["half"]


def test_the_mode_of_a_new_folder_is_that_of_the_umask(target: Path) -> None:
    (target.parent / "plain").mkdir()
    replace(target)
    assert target.stat().st_mode == (target.parent / "plain").stat().st_mode


def test_a_kill_between_two_renames_is_made_good_by_the_next_run(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = HALF_A_RUN.replace(
        "with atomic",
        """
from umv2_export import files
files._rename_exchange = lambda first, second: False
rename = Path.rename
def killed(path, to):
    if path.name == "new":
        import os
        os.kill(os.getpid(), 9)
    rename(path, to)
Path.rename = killed
with atomic""",
    ).replace("time.sleep(60)", "pass")
    subprocess.run([sys.executable, "-c", code, str(target)], check=False, stdout=subprocess.DEVNULL)
    assert not target.exists()
    replace(target.with_name("other"))
    assert listing(target) == ["old"]
    assert listing(target.parent) == ["bundle", "other"]


def test_a_second_rename_that_fails_puts_the_old_folder_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_rename_exchange", lambda first, second: False)
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        replace(target)
    assert listing(target) == ["old"]
    assert listing(target.parent) == ["bundle"]


def test_a_target_has_all_255_bytes_of_a_name(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    check_target(target, force=False)
    replace(target)
    replace(target)
    assert listing(tmp_path) == [target.name]


# write_atomically


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(target: Path) -> None:
    write_atomically(target / "old", b"new")
    write_atomically(target / ("n" * 255), b"new")
    assert (target / "old").read_bytes() == b"new"
    assert listing(target) == ["n" * 255, "old"]


def test_a_file_of_the_user_beside_it_is_kept(target: Path) -> None:
    mine = target / f".old.{os.getpid()}.partial"
    mine.write_text("kept")
    write_atomically(target / "old", b"new")
    assert mine.read_text() == "kept"


def test_a_link_stays_a_link_to_the_new_content(target: Path) -> None:
    (target / "link").symlink_to("old")
    write_atomically(target / "link", b"new")
    assert (target / "link").is_symlink()
    assert (target / "old").read_bytes() == b"new"


# atomic_directory, again


def test_folders_are_replaced_where_the_file_system_cannot_exchange_names(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_rename_exchange", lambda first, second: False)
    replace(target)
    assert listing(target) == ["new"]
    assert listing(target.parent) == ["bundle"]


def test_a_target_that_is_a_link_stays_a_link_to_the_new_folder(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    replace(link)
    assert link.is_symlink()
    assert listing(target) == ["new"]
    assert listing(target.parent) == ["bundle", "link"]


def test_an_error_keeps_what_a_link_points_to(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), atomic_directory(link):
            raise ZeroDivisionError
        assert listing(target) == ["old"]


def test_two_runs_through_a_link_and_past_it_do_not_disturb_each_other(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    with (
        atomic_directory(link),
        pytest.raises(EnvironmentUnfit, match="another run is writing this output"),
        atomic_directory(target),
    ):
        pass


def test_a_link_to_nothing_leads_to_the_new_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("bundle")
    check_target(tmp_path / "link", force=False)
    replace(tmp_path / "link")
    assert listing(tmp_path / "bundle") == ["new"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_is_an_unfit_environment(target: Path, code: int) -> None:
    with pytest.raises(EnvironmentUnfit, match="the disk is full"), atomic_directory(target):
        raise OSError(code, os.strerror(code))
    assert listing(target) == ["old"]
    assert listing(target.parent) == ["bundle"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_may_not_be_written_is_an_unfit_environment(target: Path, code: int) -> None:
    with pytest.raises(EnvironmentUnfit, match="the output may not be written"), atomic_directory(target):
        raise OSError(code, os.strerror(code))


def test_a_file_that_reaches_the_limit_of_its_size_is_an_unfit_environment(target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(EnvironmentUnfit, match="the disk is full"),
            atomic_directory(target) as folder,
            HashedFile(folder / "rows") as out,
        ):
            out.write(bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(target) == ["old"]
    assert listing(target.parent) == ["bundle"]


# require_free_space


def test_what_fits_on_the_disk_is_allowed(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", 1)


def test_what_the_disk_cannot_hold_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfit, match=r"has \d+\.\d+ GB free, the output needs 1000000000\.000 GB") as caught:
        require_free_space(tmp_path / "not" / "yet" / "there", 10**18)
    assert caught.value.where == str(tmp_path)


# inside


def test_a_name_in_the_folder_is_found(target: Path) -> None:
    (target / "below").mkdir()
    (target / "below" / "file").write_text("x")
    assert inside(target, "old") == target / "old"
    assert inside(target, "below/file") == target / "below" / "file"


@pytest.mark.parametrize("name", ["../bundle/old", "/etc/passwd", "a/../old", "..", "", ".", "old\0", "..\\old"])
def test_a_name_that_leads_out_of_the_folder_is_rejected(target: Path, name: str) -> None:
    with pytest.raises(InputRejected, match="leads out of its folder"):
        inside(target, name)


@pytest.mark.parametrize("name", ["new", "old/file", "x" * 300, "/".join(["x"] * 3000)], ids=lambda name: name[:10])
def test_a_name_of_no_file_is_rejected(target: Path, name: str) -> None:
    with pytest.raises(InputRejected, match="is missing"):
        inside(target, name)


def test_a_folder_is_no_file(target: Path) -> None:
    (target / "below").mkdir()
    with pytest.raises(InputRejected, match="is missing"):
        inside(target, "below")


# HashedFile and bytes


def test_a_hashed_file_knows_size_and_sha256_of_what_it_wrote(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as out:
        out.write(b"abc")
        assert out.align(8) == 8
        out.write(memoryview(b"defg"))
    content = b"abc\0\0\0\0\0defg"
    assert (tmp_path / "file").read_bytes() == content
    assert (out.size, out.sha256) == (12, hashlib.sha256(content).hexdigest())
    assert file_sha256(tmp_path / "file") == out.sha256


def test_aligning_what_is_aligned_writes_nothing(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as out:
        assert out.align(4096) == 0
        out.write(bytes(4096))
        assert out.align(4096) == 4096


def test_a_hashed_file_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_tensor_bytes_are_the_elements_in_row_major_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    expected = b"".join(bytes(element.reshape(1).view(torch.uint8).tolist()) for element in tensor.reshape(-1))
    assert bytes(tensor_bytes(tensor)) == expected
    assert bytes(tensor_bytes(tensor.t().contiguous().t())) == expected


def test_without_replace_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    late = tmp_path / "late"

    def write() -> None:
        with atomic_directory(late, replace=False) as folder:
            (folder / "new").write_text("new")
            late.mkdir()
            (late / "thesis").write_text("kept")

    with pytest.raises(InvalidRequest, match="not empty any more"):
        write()
    assert [entry.name for entry in late.iterdir()] == ["thesis"]
    assert listing(tmp_path) == ["late"]
