"""The folder that a training run leaves: its newest whole step is read, and what is not taken is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.variants import GOLDEN, split_into_ranks
from tests.command import run_command
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InputRejected, Umv2Error

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, which holds the configuration as the trainer's script writes it, and no step yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(GOLDEN["v2_shared_ring"] / "config.yaml", folder)
    (folder / "data-indices").mkdir()
    return folder


@pytest.fixture
def add(run: Path) -> Callable[..., Path]:
    """Adds a step by its name."""

    def add_step(name: str, source: Path = GOLDEN["v2_shared_ring"]) -> Path:
        return Path(shutil.copytree(source, run / name))

    return add_step


Add = Callable[..., Path]


def test_the_newest_step_is_read_and_named(run: Path, add: Add) -> None:
    add("step900-unsharded")
    newest = add("step10000-unsharded")
    add("step2000-unsharded")
    checkpoint = open_checkpoint(run)
    assert checkpoint.path == newest
    assert checkpoint.notes[0] == f"{run} is a run; its step step10000-unsharded is read"


def test_the_step_itself_needs_no_note(add: Add) -> None:
    assert not open_checkpoint(add("step900-unsharded")).notes


def test_a_newer_sharded_step_is_named_and_not_read(run: Path, add: Add) -> None:
    unsharded = add("step10-unsharded")
    add("step20", LAYOUTS / "sharded_torch_legacy")
    checkpoint = open_checkpoint(run)
    assert checkpoint.path == unsharded
    assert any("step20 is newer and sharded" in note for note in checkpoint.notes)


def test_a_newer_sharded_step_without_its_weights_is_named_and_not_read(run: Path, add: Add) -> None:
    unsharded = add("step10-unsharded")
    (run / "step20").mkdir()
    checkpoint = open_checkpoint(run)
    assert checkpoint.path == unsharded
    assert any("step20 is newer and sharded, and its weights are not here" in note for note in checkpoint.notes)


def test_where_all_steps_are_sharded_the_newest_says_how_it_is_joined(run: Path, add: Add) -> None:
    add("step9", LAYOUTS / "sharded_torch_legacy")
    add("step10", LAYOUTS / "sharded_torch_legacy")
    with pytest.raises(Umv2Error, match=r"sharded \(torch_legacy\)") as caught:
        open_checkpoint(run)
    assert f"scripts/unshard.py {run}/step10 {run}/step10-unsharded" in str(caught.value.fix)


def test_a_sharded_step_that_can_be_read_is_read(run: Path, add: Add) -> None:
    add("step5", LAYOUTS / "distributed")
    assert open_checkpoint(run).path == run / "step5"


def test_a_step_of_ranks_is_read(run: Path, add: Add) -> None:
    split_into_ranks(add("step5-unsharded"))
    assert [file.parent.name for file in open_checkpoint(run).files[1:]] == ["rank_0", "rank_1"]


@pytest.mark.parametrize("spoiled", ["config.yaml", "model.pt", "both"])
def test_a_newest_step_that_is_incomplete_is_refused_and_an_older_one_named(run: Path, add: Add, spoiled: str) -> None:
    older, newest = add("step10-unsharded"), add("step20-unsharded")
    for name in ("config.yaml", "model.pt") if spoiled == "both" else (spoiled,):
        (newest / name).unlink()
    with pytest.raises(InputRejected, match="step20-unsharded, is incomplete") as caught:
        open_checkpoint(run)
    assert str(older) in str(caught.value.fix)


def test_a_newest_step_that_is_truncated_is_refused_and_an_older_one_named(run: Path, add: Add) -> None:
    older, newest = add("step10-unsharded"), add("step20-unsharded")
    (newest / "model.pt").write_bytes((newest / "model.pt").read_bytes()[:1000])
    with pytest.raises(InputRejected, match="truncated") as caught:
        open_checkpoint(run)
    assert str(older) in str(caught.value.fix)


def test_a_save_that_was_never_finished_is_told(run: Path, add: Add) -> None:
    add("step10-unsharded")
    (run / "step20-unsharded-tmp-20261125-120000").mkdir()
    notes = open_checkpoint(run).notes
    assert "step20-unsharded-tmp-20261125-120000 was never finished, and is not read" in notes


@pytest.mark.parametrize("content", ["step20-unsharded\n", "20", "20\n"])
def test_a_pointer_to_a_step_that_is_not_here_is_told(run: Path, add: Add, content: str) -> None:
    add("step10-unsharded")
    (run / "latest_checkpointed_iteration.txt").write_text(content)
    assert any("latest_checkpointed_iteration.txt names 'step20" in note for note in open_checkpoint(run).notes)


@pytest.mark.parametrize("content", ["step10-unsharded\n", "step10", "10", "", "../../etc\n", "\0" * 20, "9" * 5000])
def test_a_pointer_that_agrees_or_says_nothing_is_not_told(run: Path, add: Add, content: str) -> None:
    add("step10-unsharded")
    (run / "latest_checkpointed_iteration.txt").write_text(content)
    assert len(open_checkpoint(run).notes) == 1


def test_links_of_olmo_to_the_newest_step_are_no_other_step(run: Path, add: Add) -> None:
    newest = add("step10-unsharded")
    (run / "latest-unsharded").symlink_to(newest.name)
    (run / "latest").symlink_to(newest.name)
    assert len(open_checkpoint(run).notes) == 1


def test_a_link_to_an_older_step_is_told(run: Path, add: Add) -> None:
    older = add("step10-unsharded")
    add("step20-unsharded")
    (run / "latest-unsharded").symlink_to(older.name)
    checkpoint = open_checkpoint(run)
    assert checkpoint.path.name == "step20-unsharded"
    assert "latest-unsharded leads to 'step10-unsharded'" in checkpoint.notes


@pytest.mark.parametrize("target", ["latest-unsharded", "gone", "/proc/self/nothing"])
def test_a_link_that_loops_or_leads_nowhere_is_told(run: Path, add: Add, target: str) -> None:
    add("step10-unsharded")
    (run / "latest-unsharded").symlink_to(target)
    assert "latest-unsharded is a link that leads nowhere" in open_checkpoint(run).notes


@pytest.mark.parametrize("target", ["step20-unsharded", "gone"])
def test_a_newest_step_that_is_a_dangling_link_is_refused(run: Path, add: Add, target: str) -> None:
    add("step10-unsharded")
    (run / "step20-unsharded").symlink_to(target)
    with pytest.raises(InputRejected, match="it is a link that leads nowhere"):
        open_checkpoint(run)


def test_a_step_on_another_disk_is_read_through_its_link_and_told(run: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(GOLDEN["v2_shared_ring"], tmp_path / "disk" / "step10-unsharded"))
    (run / "step10-unsharded").symlink_to(elsewhere)
    assert open_checkpoint(run).notes[1].startswith("step10-unsharded is a link to '/")


def test_a_step_that_is_the_run_itself_is_refused(run: Path) -> None:
    (run / "step10-unsharded").symlink_to(".")
    with pytest.raises(InputRejected, match="it has no weights"):
        open_checkpoint(run)


@pytest.mark.parametrize("name", ["latest-unsharded", "latest"])
def test_a_run_of_which_only_the_latest_was_copied_is_read(run: Path, add: Add, name: str) -> None:
    assert open_checkpoint(add(name).parent).path == run / name


def test_a_latest_that_is_a_folder_of_its_own_beside_steps_is_told(run: Path, add: Add) -> None:
    add("latest-unsharded")
    add("step10-unsharded")
    assert any("latest-unsharded is a folder of its own" in note for note in open_checkpoint(run).notes)


def test_two_whole_folders_of_one_step_are_refused(run: Path, add: Add) -> None:
    add("step10-unsharded")
    add("step10")
    with pytest.raises(InputRejected, match="stands here 2 times: step10, step10-unsharded"):
        open_checkpoint(run)


@pytest.mark.parametrize("name", ["step10", "step010"])
def test_an_empty_folder_of_the_same_step_is_no_choice(run: Path, add: Add, name: str) -> None:
    add("step10-unsharded")
    (run / name).mkdir()
    assert open_checkpoint(run).path.name == "step10-unsharded"


def test_a_run_without_steps_says_what_its_pointer_names(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("step70-unsharded\n")
    with pytest.raises(InputRejected, match="holds no step") as caught:
        open_checkpoint(run)
    assert "step70-unsharded" in str(caught.value.why)


def test_a_run_that_died_in_its_first_save_says_so(run: Path) -> None:
    (run / "step70-unsharded-tmp-20261125-120000").mkdir()
    with pytest.raises(InputRejected, match="holds no step") as caught:
        open_checkpoint(run)
    assert "never finished" in str(caught.value.why)


@pytest.mark.parametrize("inner", ["rank_0", "."])
def test_a_folder_inside_of_a_step_names_the_step(run: Path, add: Add, inner: str) -> None:
    step = add("step10-unsharded")
    split_into_ranks(step)
    if inner == ".":
        assert open_checkpoint(step).path == step
        return
    with pytest.raises(InputRejected, match="holds no checkpoint") as caught:
        open_checkpoint(step / inner)
    assert str(step) in str(caught.value.fix)


def test_every_command_says_on_stderr_which_step_it_reads(run: Path, add: Add, tmp_path: Path) -> None:
    add("step10-unsharded")
    for command in (
        ("inspect", run),
        ("convert", run, "-o", tmp_path / "out"),
        ("onnx", run, "-o", tmp_path / "bundle", "--dry-run"),
    ):
        result = run_command(*command)
        assert result.exit_code == 0, result.stderr
        assert "note: " in result.stderr
        assert "its step step10-unsharded is read" in result.stderr


def test_inspect_has_the_step_as_a_field(run: Path, add: Add) -> None:
    step = add("step10-unsharded")
    facts = json.loads(run_command("inspect", run, "--json").stdout)
    assert facts["path"] == str(step)
    assert "step10-unsharded" in facts["notes"][0]


def test_parity_takes_a_run_as_its_reference(run: Path, add: Add, exported: Callable[..., tuple[Path, object]]) -> None:
    add("step10-unsharded")
    bundle, _ = exported("v2_shared_ring")
    result = run_command("parity", bundle, "--reference", run)
    assert result.exit_code == 0, result.stderr
    assert "its step step10-unsharded is read" in result.stderr


def test_an_output_inside_of_the_run_is_refused(run: Path, add: Add) -> None:
    step = add("step10-unsharded")
    result = run_command("convert", run, "-o", step, "--force")
    assert result.exit_code == 2
    assert (step / "model.pt").exists()
