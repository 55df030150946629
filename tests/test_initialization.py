"""Random initialisation: reproducible, and of the scales that the released code and the paper state."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command import run_command
from umv2_export.checkpoint import open_checkpoint
from umv2_export.config import MemoryConfig, ModelConfig, tensor_shapes
from umv2_export.errors import Unsupported
from umv2_export.model.initialization import Scheme, random_tensors, table_std
from umv2_export.presets import PRESETS

TABLES = "transformer.full_memory_layer."

# Large enough that a measured standard deviation is within 3% of the true one; d, Dk, Dv, Dp and n all differ.
WIDE = replace(
    PRESETS["umv2-tiny"],
    hidden_size=320,
    memory=replace(PRESETS["umv2-tiny"].memory, keys_per_side=40, key_dim=96, value_dim=64, pre_value_dim=48, heads=2),
)
WIDE_V1 = replace(
    PRESETS["umv1-tiny"],
    hidden_size=320,
    memory=replace(PRESETS["umv1-tiny"].memory, keys_per_side=40, key_dim=96, value_dim=64),
)


def initial(config: ModelConfig, seed: int = 0, scheme: Scheme = "released") -> dict[str, torch.Tensor]:
    """All tensors of an initialised model."""
    return {stream.name: torch.cat(list(stream.pieces)) for stream in random_tensors(config, seed=seed, scheme=scheme)}


@pytest.fixture(scope="module")
def wide() -> dict[str, torch.Tensor]:
    """Tensors of the wide model."""
    return initial(WIDE)


@pytest.fixture(scope="module")
def wide_v1() -> dict[str, torch.Tensor]:
    """Tensors of the wide V1 model."""
    return initial(WIDE_V1)


def files(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Reproducible.


@pytest.mark.parametrize("preset", ["umv2-tiny", "umv2-tiny-shared", "umv1-tiny"])
def test_every_tensor_has_the_shape_of_the_configuration(preset: str) -> None:
    tensors = initial(PRESETS[preset])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(PRESETS[preset])
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert all(dtypes[name] == (torch.int64 if "shuffle_index" in name else torch.float32) for name in dtypes)


def test_one_seed_gives_the_same_files_twice(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run_command("init", "umv2-tiny", "-o", tmp_path / name, "--seed", 7).exit_code == 0
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_a_tensor_is_the_same_whenever_and_however_often_it_is_asked_for() -> None:
    streams = random_tensors(PRESETS["umv2-tiny"], seed=7)
    backwards = {stream.name: torch.cat(list(stream.pieces)) for stream in reversed(streams)}
    assert all(torch.equal(torch.cat(list(stream.pieces)), backwards[stream.name]) for stream in streams)


def test_the_global_random_state_does_not_matter() -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first = initial(PRESETS["umv2-tiny"])
        torch.manual_seed(2)
        second = initial(PRESETS["umv2-tiny"])
    finally:
        torch.set_rng_state(state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_values_of_everything_that_is_drawn() -> None:
    first, second = initial(PRESETS["umv2-tiny"], seed=0), initial(PRESETS["umv2-tiny"], seed=1)
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if name.endswith(("norm.weight", "ln_f.weight"))}


def test_no_two_layers_are_alike(wide: dict[str, torch.Tensor]) -> None:
    for leaf in ("keys", "query_proj.weight", "tucker_core.0", "shuffle_index"):
        layers = [wide[f"transformer.mem_blocks.{layer}.{leaf}"] for layer in range(3)]
        assert not any(torch.equal(layers[i], layers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(
        wide["transformer.mem_blocks.0.tucker_core.0"], wide["transformer.mem_blocks.0.tucker_core.1"]
    )


def test_a_written_model_is_a_checkpoint(tmp_path: Path) -> None:
    assert run_command("init", "umv2-tiny-shared", "-o", tmp_path / "out", "--seed", 3).exit_code == 0
    checkpoint, expected = open_checkpoint(tmp_path / "out"), initial(PRESETS["umv2-tiny-shared"], seed=3)
    assert checkpoint.config == PRESETS["umv2-tiny-shared"]
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


# Scales: d = 320, Dk = 96, Dv = 64, Dp = 48, and G = 4 in V1.


@pytest.mark.parametrize(
    ("leaf", "std"),
    [
        ("mem_blocks.1.query_proj.weight", 96**-0.5),
        ("mem_blocks.1.keys", 96**-0.5),
        ("mem_blocks.1.values_proj.weight", 64**-0.5),
        ("mem_blocks.1.pre_values_proj.weight", 320**-0.5),
        ("full_memory_layer.values_for_look_up", 0.02),
        ("full_memory_layer.pre_values_for_look_up", 0.02),
        ("wte.weight", math.sqrt(2 / (5 * 320))),
        ("blocks.2.att_proj.weight", math.sqrt(2 / (5 * 320))),
        ("blocks.2.attn_out.weight", math.sqrt(2 / (5 * 320))),
        ("blocks.2.ff_proj.weight", math.sqrt(2 / (5 * 320))),
        ("blocks.2.ff_out.weight", math.sqrt(2 / (5 * 320))),
    ],
)
def test_weights_are_normal_with_the_stated_standard_deviation(
    wide: dict[str, torch.Tensor], leaf: str, std: float
) -> None:
    weight = wide["transformer." + leaf]
    assert float(weight.std()) == pytest.approx(std, rel=0.03)
    assert float(weight.mean()) == pytest.approx(0, abs=0.03 * std)
    within_one = float((weight.abs() < std).float().mean())
    assert within_one == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize(
    ("leaf", "std"), [("values_proj.weight", (64 * 4) ** -0.5), ("keys", 96**-0.5), ("values_for_look_up", 0.02)]
)
def test_v1_counts_its_groups_in_the_scale_of_the_projection(
    wide_v1: dict[str, torch.Tensor], leaf: str, std: float
) -> None:
    assert float(wide_v1["transformer.mem_blocks.0." + leaf].std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("leaf", ["query_norm.weight", "keys_norm.weight"])
def test_gains_of_queries_and_keys_are_a_power_of_the_key_size(
    wide: dict[str, torch.Tensor], wide_v1: dict[str, torch.Tensor], leaf: str
) -> None:
    name = "transformer.mem_blocks.0." + leaf
    torch.testing.assert_close(wide[name], torch.full((96,), 96**-0.4))
    torch.testing.assert_close(wide_v1[name], torch.full((96,), 96**-0.33))


def test_all_other_norms_begin_at_one(wide: dict[str, torch.Tensor]) -> None:
    for name, tensor in wide.items():
        if name.endswith(("norm.weight", "ln_f.weight")) and "mem_blocks" not in name:
            assert bool((tensor == 1).all()), name


def test_tucker_cores_are_uniform_from_0_to_1() -> None:
    config = replace(PRESETS["umv2-tiny"], memory=replace(PRESETS["umv2-tiny"].memory, tucker_rank=64))
    core = initial(config)["transformer.mem_blocks.0.tucker_core.1"]
    assert 0 <= float(core.min()) < 0.01
    assert 0.99 < float(core.max()) < 1
    assert float(core.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(core.std()) == pytest.approx(12**-0.5, rel=0.03)


@pytest.mark.parametrize("rank", [2, 3])
def test_u_and_v_are_the_leading_singular_vectors_of_the_summed_cores(rank: int) -> None:
    memory = replace(PRESETS["umv2-tiny"].memory, heads=2, tucker_rank=rank)
    tensors = initial(replace(PRESETS["umv2-tiny"], memory=memory))
    for layer in range(3):
        prefix = f"transformer.mem_blocks.{layer}.tucker_core"
        cores = [tensors[f"{prefix}.{k}"].double().numpy() for k in range(2)]
        for head in range(2):
            summed = cores[0][head] + cores[1][head]
            u = tensors[prefix + "_u"][0, head, 0].double().numpy()
            v = tensors[prefix + "_v"][0, head, 0].double().numpy()
            largest = np.linalg.svd(summed, compute_uv=False)[0]
            np.testing.assert_allclose([u @ u, v @ v], 1, atol=1e-6)
            # Both at once: that the signs of u and v belong together decides which keys win.
            np.testing.assert_allclose(summed @ v, largest * u, atol=1e-6)
            np.testing.assert_allclose(summed.T @ u, largest * v, atol=1e-6)


@pytest.mark.parametrize("preset", ["umv2-tiny", "umv2-tiny-shared", "umv1-tiny"])
def test_the_shuffle_index_is_a_permutation_and_not_the_identity(preset: str) -> None:
    memory = PRESETS[preset].memory
    index = initial(PRESETS[preset])["transformer.mem_blocks.1.shuffle_index"]
    identity = torch.arange(memory.stored_side**2)
    assert torch.equal(index.sort().values, identity)
    assert not torch.equal(index, identity)


# The principled scale.


def test_the_principled_scale_is_the_papers_formula() -> None:
    # k = 80/64, d = 64, m = 8, H = 1, s2 = 0.5, Dp = 24, Dv = 32, L = 3:
    # (0.2 * 1.25 * 64 / (8 * 1.5 * 24 * 32 * 3)) ** 0.25 = (16 / 27648) ** 0.25 = 0.155101
    assert table_std(PRESETS["umv2-tiny"], 0.5) == pytest.approx(0.155101, abs=1e-6)


def test_more_heads_activate_more_rows_and_scale_them_down() -> None:
    memory: MemoryConfig = replace(PRESETS["umv2-tiny"].memory, heads=16)
    sixteen_heads = table_std(replace(PRESETS["umv2-tiny"], memory=memory), 0.5)
    assert table_std(PRESETS["umv2-tiny"], 0.5) / sixteen_heads == pytest.approx(2)


def test_the_principled_scheme_scales_the_tables_by_the_variance_of_top_scores() -> None:
    principled = initial(WIDE, scheme="principled")
    std = float(principled[TABLES + "values_for_look_up"].std())
    # s2 is a variance over a squared mean; top scores of random keys are far from zero, and they do differ.
    assert table_std(WIDE, 1.0) < std < table_std(WIDE, 0.001)
    assert float(principled[TABLES + "pre_values_for_look_up"].std()) == pytest.approx(std, rel=0.03)


def test_the_principled_scheme_changes_nothing_but_the_scale_of_the_tables(wide: dict[str, torch.Tensor]) -> None:
    principled = initial(WIDE, scheme="principled")
    differing = {name for name in wide if not torch.equal(wide[name], principled[name])}
    assert differing == {TABLES + "values_for_look_up", TABLES + "pre_values_for_look_up"}
    ratio = principled[TABLES + "values_for_look_up"] / wide[TABLES + "values_for_look_up"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-4, atol=0)


def test_the_principled_scheme_needs_pre_values() -> None:
    with pytest.raises(Unsupported, match="defined for models with pre-values"):
        random_tensors(PRESETS["umv1-tiny"], seed=0, scheme="principled")
