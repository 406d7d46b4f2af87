"""Code is loaded from a cache only if nobody but its user and root can have put it there."""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import stat
import subprocess
from types import SimpleNamespace

import pytest
from drivetrain_kernels import triton_kernels
from drivetrain_kernels.native import NativeLibrary, trust
from drivetrain_kernels.native.cache import CHECKSUM, LIBRARY

from drivetrain.errors import BuildError

STRANGER = 54321
SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A library that is not ours."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "evil.cpp").write_text(SOURCE % 666)
    command = ["c++", "-shared", "-fPIC", "evil.cpp", "-o", "evil.so"]
    subprocess.run(command, check=True, cwd=folder)
    return (folder / "evil.so").read_bytes()


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.cpp"
    file.write_text(SOURCE % 42)
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "above" / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "above" / "cache" / "kernels"


@pytest.fixture
def entry(cache, source, evil):
    """The cache's entry with another library in it, whose checksum is right."""
    NativeLibrary("answer", [source], flags=["-fPIC"]).ensure_built()  # loads nothing yet
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    (entry / LIBRARY).unlink()
    (entry / CHECKSUM).unlink()
    (entry / LIBRARY).write_bytes(evil)
    (entry / CHECKSUM).write_text(hashlib.sha256(evil).hexdigest())
    for name in (LIBRARY, CHECKSUM):
        (entry / name).chmod(0o600)
    return entry


def answer(source):
    library = NativeLibrary("answer", [source], flags=["-fPIC"])
    return library.load().answer(), library.origin


def give_away(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_checksum_alone_would_have_the_planted_library_run(entry, source):
    assert answer(source) == (666, "cached answer")


def becomes_a_link(path):
    elsewhere = path.with_name(f"real-{path.name}")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def becomes_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("", lambda path: path.chmod(0o777)),
        ("", lambda path: path.chmod(0o770)),
        ("", lambda path: path.chmod(0o1777)),
        ("", give_away),
        ("", becomes_a_link),
        (LIBRARY, lambda path: path.chmod(0o606)),
        (LIBRARY, lambda path: path.chmod(0o660)),
        (LIBRARY, give_away),
        (LIBRARY, becomes_a_link),
        (LIBRARY, becomes_a_pipe),
        (CHECKSUM, lambda path: path.chmod(0o666)),
        (CHECKSUM, give_away),
        (CHECKSUM, becomes_a_pipe),
    ],
)
def test_an_entry_that_others_may_have_written_is_built_again(entry, source, what, change):
    change(entry / what)
    assert answer(source) == (42, "built answer")
    assert answer(source) == (42, "cached answer")
    assert sorted(path.name for path in entry.iterdir()) == sorted([LIBRARY, CHECKSUM])
    assert (mode(entry), mode(entry / LIBRARY), mode(entry / CHECKSUM)) == (0o700, 0o600, 0o600)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "change", [lambda path: path.chmod(0o777), lambda path: path.chmod(0o770), give_away]
)
def test_a_folder_on_the_way_that_others_may_write_is_refused_by_name(
    entry, source, cache, level, change
):
    folder = [cache, *cache.parents][level]
    change(folder)
    with pytest.raises(BuildError, match=rf"{folder} (may be written by others|belongs to user)"):
        answer(source)


def test_a_strangers_link_on_the_way_is_refused_and_an_own_one_is_not(
    tmp_path, source, monkeypatch
):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real/../real")
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "link" / "cache"))
    assert answer(source) == (42, "built answer")
    assert (tmp_path / "real" / "cache" / "kernels").is_dir()
    give_away(tmp_path / "link")
    with pytest.raises(BuildError, match=r"link belongs to user 54321"):
        answer(source)


def test_links_that_go_round_are_refused(tmp_path, source, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "a"))
    with pytest.raises(BuildError, match="through more than 40 links"):
        answer(source)


def test_a_sticky_folder_above_may_be_open_to_all(cache, source):
    cache.parents[1].mkdir()
    cache.parents[1].chmod(0o1777)
    assert answer(source) == (42, "built answer")
    assert answer(source) == (42, "cached answer")
    cache.chmod(0o1777)  # but not the cache itself
    with pytest.raises(BuildError, match=r"may be written by others"):
        answer(source)


@pytest.mark.parametrize("umask", [0, 0o277])
def test_all_that_is_made_is_private_whatever_the_umask(cache, source, umask):
    before = os.umask(umask & 0o77 if os.geteuid() else umask)
    try:
        assert answer(source) == (42, "built answer")
    finally:
        os.umask(before)
    made = [cache.parents[1], cache.parents[0], *cache.parent.rglob("*")]
    assert {mode(path) & 0o77 for path in made} == {0}
    assert answer(source) == (42, "cached answer")


def test_what_a_package_ships_is_readable_by_all(tmp_path, cache, source):
    before = os.umask(0o77)
    try:
        shipped = NativeLibrary("answer", [source], flags=["-fPIC"]).ship(tmp_path / "prebuilt")
    finally:
        os.umask(before)
    assert (mode(shipped), mode(shipped / LIBRARY), mode(shipped / CHECKSUM)) == (
        0o755,
        0o644,
        0o644,
    )


@pytest.mark.parametrize(
    ("name", "members", "uid", "private"),
    [
        ("alice", [], 1000, True),
        ("alice", ["alice"], 1000, True),
        ("alice", ["bob"], 1000, False),
        ("users", [], 1000, False),
        ("alice", [], 0, False),
    ],
)
def test_a_group_is_private_only_if_it_is_there_for_one_user(
    monkeypatch, name, members, uid, private
):
    group = SimpleNamespace(gr_name=name, gr_mem=members)
    user = SimpleNamespace(pw_name="alice", pw_uid=uid, pw_gid=1000)
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    assert trust._is_private_group.__wrapped__(1000) is private


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_tritons_cache_is_held_to_the_same(tmp_path, monkeypatch, variable):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "chosen"))
    triton_kernels._check_cache()
    (cache,) = [path for path in tmp_path.rglob("*") if path.name in ("cache", "chosen")][-1:]
    assert mode(cache) == 0o700
    cache.chmod(0o777)
    with pytest.raises(BuildError, match=r"may be written by others.* TRITON_CACHE_DIR"):
        triton_kernels._check_cache()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_kernels._check_cache()
