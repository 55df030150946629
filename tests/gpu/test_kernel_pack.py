"""The one file of kernels, as the C++ reads it: which kernel serves a node, and files that are damaged."""

import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.stand_in_kernels import entry_name, write_stand_in_kernels
from umv2_export.gpu.pack import ELEMENT_TYPES, HEADER, RECORD
from umv2_export.gpu.variants import LookupVariant, TopkVariant, Variant, lookup_variant, topk_variant

ROOT = Path(__file__).parents[2]
FP32 = str(ELEMENT_TYPES["float32"])

Choose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory) -> Choose:
    """Runs choose_kernel.cpp on a pack."""
    program = tmp_path_factory.mktemp("choose") / "choose_kernel"
    sources = (ROOT / "tests" / "gpu" / "choose_kernel.cpp", ROOT / "plugins" / "cuda" / "kernel_pack.cpp")
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "plugins" / "cuda")
    subprocess.run(["c++", *map(str, flags), *map(str, sources), "-o", str(program)], check=True)

    def run(pack: Path, capability: str, *node: object) -> subprocess.CompletedProcess[str]:
        command = [str(program), str(pack), capability, *map(str, node)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def lookup(**changes: Any) -> LookupVariant:
    """A variant for rows of 64 + 64."""
    facts = {"shards": 1, "cores": 2, "grouped": False, "pre_value_dim": 64, "value_dim": 64, "gelu": False}
    rows = changes.pop("rows", torch.float32)
    return lookup_variant(torch.float32, rows, **(facts | changes))


def topk(size: int, cores: int = 2) -> TopkVariant:
    return topk_variant(torch.float32, ranks=2, cores=cores, row_topk=size, topk=size)


def lookup_node(
    *, rows: str = "float32", shards: int = 1, cores: int = 2, grouped: int = 0, gelu: int = 0, p: int = 64, v: int = 64
) -> Sequence[object]:
    """Arguments of choose_kernel."""
    return ("lookup", FP32, ELEMENT_TYPES[rows], shards, cores, grouped, int(p > 0), gelu, p, v)


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("8.0", "8.0"),
        ("8.6", "8.6"),
        ("8.8", "8.6"),
        ("8.9", "8.9"),
        ("9.0", "9.0"),
        ("12.0", "12.0"),
        ("12.1", "12.0"),
    ],
)
def test_code_for_the_device_comes_before_code_for_older_devices_of_its_kind(
    device: str, chosen: str, choose: Choose, tmp_path: Path
) -> None:
    pack = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9", "8.0", "12.0", "8.6", "9.0"])
    assert choose(pack, device, *lookup_node()).stdout.strip() == entry_name(lookup(), chosen)


# Code of sm_80 does not run on 9.0, code of sm_89 not on 8.6; 8.7 is no desktop GPU.
@pytest.mark.parametrize(
    ("compiled", "device"), [("10.3", "10.0"), ("8.0", "9.0"), ("8.9", "8.6"), ("9.0", "8.9"), ("8.6", "8.7")]
)
def test_code_of_another_architecture_is_not_taken(compiled: str, device: str, choose: Choose, tmp_path: Path) -> None:
    result = choose(write_stand_in_kernels(tmp_path / "kernels", [lookup()], [compiled]), device, *lookup_node())
    assert result.returncode == 1
    assert f"no kernel for compute capability {device}" in result.stdout
    assert f"umv2-export kernels BUNDLE --compute-capability {device}" in result.stdout


CHOICES: dict[str, tuple[list[Variant], Sequence[object], Variant]] = {
    "fewest shards": ([lookup(shards=s) for s in (8, 3, 2)], lookup_node(shards=3), lookup(shards=3)),
    "more shards": ([lookup(shards=s) for s in (8, 2)], lookup_node(shards=3), lookup(shards=8)),
    "smallest block": (
        [lookup(value_dim=v) for v in (256, 128, 64)],
        lookup_node(v=80),
        lookup(value_dim=128),
    ),
    "smallest pre-value": (
        [lookup(pre_value_dim=p) for p in (128, 64, 16)],
        lookup_node(p=48),
        lookup(pre_value_dim=64),
    ),
    "largest divisor": (
        [lookup(value_dim=v) for v in (60, 64, 62)],
        lookup_node(v=48),
        lookup(value_dim=64),
    ),
    "a divisor that divides": ([lookup(value_dim=v) for v in (64, 60)], lookup_node(v=52), lookup(value_dim=60)),
    "not in splits": ([lookup(split=True), lookup()], lookup_node(), lookup()),
    "smallest top-k": ([topk(s) for s in (64, 16, 8)], ("topk", FP32, 2, 2, 9, 12), topk(16)),
}


@pytest.mark.parametrize("label", sorted(CHOICES))
def test_the_kernel_that_fits_a_node_closest_serves_it(label: str, choose: Choose, tmp_path: Path) -> None:
    variants, node, expected = CHOICES[label]
    pack = write_stand_in_kernels(tmp_path / "kernels", variants, ["8.9"])
    assert choose(pack, "8.9", *node).stdout.strip() == entry_name(expected, "8.9")


OTHERS: dict[str, Sequence[object]] = {
    "fp32 rows of 64 + 64 in 1 shards, 1 cores": lookup_node(cores=1),
    "fp16 rows": lookup_node(rows="float16"),
    "int8 rows": lookup_node(rows="int8"),
    "groups": lookup_node(grouped=1),
    "gelu": lookup_node(gelu=1),
    "rows of 0 + 64": lookup_node(p=0),
    "rows of 64 + 65": lookup_node(v=65),
    "rows of 64 + 72": lookup_node(v=72),
    "in 2 shards": lookup_node(shards=2),
    "3 ranks": ("topk", FP32, 3, 2, 8, 8),
    "top 9 of a side": ("topk", FP32, 2, 2, 9, 8),
    "9 in all": ("topk", FP32, 2, 2, 8, 9),
}


@pytest.mark.parametrize("facts", sorted(OTHERS))
def test_a_node_that_no_kernel_serves_is_named(facts: str, choose: Choose, tmp_path: Path) -> None:
    pack = write_stand_in_kernels(tmp_path / "kernels", [lookup(), topk(8)], ["8.9"])
    assert choose(pack, "8.9", *lookup_node()).returncode == 0
    result = choose(pack, "8.9", *OTHERS[facts])
    assert result.returncode == 1
    assert facts in result.stdout


def with_record(pack: bytes, field: int, value: object) -> bytes:
    """The pack with another value in a field of its first record."""
    record = list(RECORD.unpack_from(pack, HEADER.size))
    record[field] = value
    return pack[: HEADER.size] + RECORD.pack(*record) + pack[HEADER.size + RECORD.size :]


THREADS, SHARED, SHARDS, DIVISOR, BLOCK_K, ENTRY, OFFSET, SIZE = 4, 5, 8, 13, 15, 20, 21, 22

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda pack: b"",
    "half a header": lambda pack: pack[: HEADER.size - 1],
    "another magic": lambda pack: b"UMV2KERM" + pack[8:],
    "more records than bytes": lambda pack: pack[:12] + struct.pack("<I", 2**31) + pack[16:],
    "records cut off": lambda pack: pack[: HEADER.size + RECORD.size - 1],
    "code cut off": lambda pack: pack[:-1],
    "offset beyond the end": lambda pack: with_record(pack, OFFSET, len(pack) + 16),
    "code that is not aligned": lambda pack: with_record(pack, OFFSET, 4),
    "offset that wraps around": lambda pack: with_record(pack, OFFSET, 2**64 - 8),
    "size beyond the end": lambda pack: with_record(pack, SIZE, 2**63),
    "entry without an end": lambda pack: with_record(pack, ENTRY, b"x" * 64),
    "no threads": lambda pack: with_record(pack, THREADS, 0),
    "too many threads": lambda pack: with_record(pack, THREADS, 2048),
    "negative shared memory": lambda pack: with_record(pack, SHARED, -1),
    "no shards": lambda pack: with_record(pack, SHARDS, 0),
    "more shards than an export makes": lambda pack: with_record(pack, SHARDS, 1025),
    "division by zero": lambda pack: with_record(pack, DIVISOR, 0),
    "no hits at once": lambda pack: with_record(pack, BLOCK_K, 0),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_is_refused(damage: str, choose: Choose, tmp_path: Path) -> None:
    pack = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9"])
    assert choose(pack, "8.9", *lookup_node()).returncode == 0
    pack.write_bytes(DAMAGES[damage](pack.read_bytes()))
    result = choose(pack, "8.9", *lookup_node())
    assert result.returncode == 1
    assert "is no whole file of kernels: write it again with `umv2-export kernels`" in result.stdout


def test_a_file_of_another_version_is_named(choose: Choose, tmp_path: Path) -> None:
    pack = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9"])
    pack.write_bytes(pack.read_bytes().replace(struct.pack("<I", 2), struct.pack("<I", 1), 1))
    result = choose(pack, "8.9", *lookup_node())
    assert result.returncode == 1
    assert "has format version 1, this library reads 2" in result.stdout
