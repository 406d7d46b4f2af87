"""How much memory there is, going by what systems say."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivetrain_offload.host import memory as host_memory

from drivetrain.errors import ConfigError

MIB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch) -> Path:
    """A host with 1000 MiB, of which 600 are available, and a process in two control groups."""
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "meminfo").write_text(
        f"MemTotal:       {1000 * 1024} kB\nMemFree: 1 kB\nMemAvailable:   {600 * 1024} kB\n"
    )
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/outer/inner\n")
    (tmp_path / "cgroup" / "outer" / "inner").mkdir(parents=True)
    return tmp_path


def limit(folder: Path, most: int | str, used: int, droppable: int) -> None:
    (folder / "memory.max").write_text(f"{most * MIB if isinstance(most, int) else most}\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable * MIB}\n")


def test_without_limits_it_is_what_the_host_has(system: Path) -> None:
    assert host_memory.available_bytes() == 600 * MIB
    assert host_memory.total_bytes() == 1000 * MIB


def test_the_limit_of_a_group_counts_with_files_that_can_be_dropped(system: Path) -> None:
    limit(system / "cgroup" / "outer" / "inner", 300, 250, 40)
    assert host_memory.available_bytes() == 90 * MIB
    assert host_memory.total_bytes() == 300 * MIB


def test_so_does_the_limit_of_a_group_around_it(system: Path) -> None:
    limit(system / "cgroup" / "outer", 500, 480, 0)
    limit(system / "cgroup" / "outer" / "inner", "max", 250, 40)
    assert host_memory.available_bytes() == 20 * MIB
    assert host_memory.total_bytes() == 500 * MIB


def test_a_system_that_says_nothing_is_believed(system: Path) -> None:
    (system / "meminfo").unlink()
    (system / "own").unlink()
    assert host_memory.available_bytes() is None
    assert host_memory.total_bytes() is None
    host_memory.refuse_too_little(2**60, 8, what="states")


def test_one_rank_may_need_what_is_available(monkeypatch) -> None:
    has(monkeypatch, 100, 1000)
    host_memory.refuse_too_little(100 * MIB, 1, what="states")
    with pytest.raises(ConfigError, match=r"states = 101 MiB .* only 100 MiB are available"):
        host_memory.refuse_too_little(101 * MIB, 1, what="states")


def test_all_ranks_together_may_need_what_there_is(monkeypatch) -> None:
    has(monkeypatch, 900, 1000)
    host_memory.refuse_too_little(250 * MIB, 4, what="states")
    with pytest.raises(ConfigError, match=r"4 ranks on this host need 1,004 MiB, but it has 1,000"):
        host_memory.refuse_too_little(251 * MIB, 4, what="states")


def has(monkeypatch, available: int, total: int) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: available * MIB)
    monkeypatch.setattr(host_memory, "total_bytes", lambda: total * MIB)
