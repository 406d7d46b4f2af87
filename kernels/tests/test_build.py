"""Building native libraries: the cache survives races, kills, damage and the lack of a compiler."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivetrain_kernels.native import NativeLibrary
from drivetrain_kernels.native.cache import CHECKSUM, LIBRARY, cache_root
from drivetrain_kernels.native.toolchain import explain

from drivetrain.errors import BuildError

ANSWER = 'extern "C" int answer() { return %d; }\n'
CHILD = """
import sys
from pathlib import Path
from drivetrain_kernels.native import NativeLibrary
print(NativeLibrary("answer", [Path(sys.argv[1])]).load().answer())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder / "kernels"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.cpp"
    file.write_text(ANSWER % 42)
    return file


def answer(source, **options):
    library = NativeLibrary("answer", [source], flags=["-fPIC"], **options)
    return library.load().answer(), library.origin


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_library_is_built_once_and_then_cached(source):
    assert answer(source) == (42, "built answer")
    assert answer(source) == (42, "cached answer")


def test_another_source_flag_or_header_makes_another_key(source, tmp_path):
    header = tmp_path / "answer.h"
    header.write_text("// one\n")
    library = NativeLibrary("answer", [source], headers=[header])
    keys = {library.cache_key(), NativeLibrary("answer", [source], flags=["-O1"]).cache_key()}
    header.write_text("// two\n")
    keys.add(library.cache_key())
    source.write_text(ANSWER % 43)
    keys.add(library.cache_key())
    assert len(keys) == 4


def test_another_compiler_makes_another_key(source, tmp_path, monkeypatch):
    library = NativeLibrary("answer", [source])
    before = library.cache_key(), library.source_key()
    other = tmp_path / "other-cxx"
    other.write_text('#!/bin/sh\necho "other 1.0"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert library.cache_key() != before[0]
    assert library.source_key() == before[1]


@pytest.mark.parametrize("damage", ["truncated", "no checksum", "wrong bytes", "a file"])
def test_a_damaged_entry_is_rebuilt(source, cache, damage):
    assert answer(source)[0] == 42
    (entry,) = (cache / name for name in entries(cache))
    library = entry / LIBRARY
    content = library.read_bytes()
    # Replaced, not overwritten: this process has the old file mapped.
    library.unlink()
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "wrong bytes":
        library.write_bytes(content[:-1] + b"x")
    elif damage == "no checksum":
        library.write_bytes(content)
        (entry / CHECKSUM).unlink()
    else:
        (entry / CHECKSUM).unlink()
        entry.rmdir()
        entry.write_text("in the way")
    assert answer(source) == (42, "built answer")
    assert answer(source) == (42, "cached answer")
    assert entries(cache) == [entry.name]


def test_processes_that_start_together_all_get_the_library(source, cache):
    command = [sys.executable, "-c", CHILD, str(source)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [child.communicate()[0].strip() for child in children] == ["42"] * 4
    assert len(entries(cache)) == 1


def test_a_killed_build_blocks_nobody_and_leaves_nothing(source, cache, tmp_path, monkeypatch):
    slow = tmp_path / "slow-cxx"
    compiling = tmp_path / "compiling"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) touch {compiling}; sleep 600 ;; esac\n'
        'exec c++ "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source)], start_new_session=True)
    deadline = time.monotonic() + 300
    while not compiling.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # Only the Python process: ninja and the compiler live on, as after any kill -9.
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    try:
        slow.write_text('#!/bin/sh\nexec c++ "$@"\n')
        began = time.monotonic()
        library = NativeLibrary("answer", [source])
        assert library.load().answer() == 42
        assert time.monotonic() - began < 300  # half of what the slow one takes
        assert [name for name in entries(cache) if name.startswith(".")] == []
    finally:
        os.killpg(child.pid, signal.SIGKILL)


def test_a_failed_build_names_library_command_and_first_error(source, cache):
    source.write_text("int first = ;\nint second = ;\n")
    with pytest.raises(BuildError) as caught:
        answer(source)
    message = str(caught.value)
    assert message.startswith("cannot build answer: ")
    assert "answer.cpp:1:13: error" in message
    assert "-fPIC -c" in message
    assert "second" not in message
    assert entries(cache) == []


def test_a_failure_is_not_tried_again_by_the_next_op(source, tmp_path):
    library = NativeLibrary("answer", [tmp_path / "answer.cpp"])
    source.write_text("int first = ;\n")
    with pytest.raises(BuildError):
        library.load()
    source.write_text(ANSWER % 1)
    with pytest.raises(BuildError):
        library.load()


def test_no_compiler_is_said_by_name(source, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, cla"):
        answer(source)
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(BuildError, match=r"looked for \$CXX='icpx'"):
        answer(source)


def test_a_matching_prebuilt_binary_needs_no_compiler(source, tmp_path, monkeypatch):
    shipped = tmp_path / "prebuilt"
    NativeLibrary("answer", [source], flags=["-fPIC"]).ship(shipped)
    monkeypatch.setenv("PATH", "/nowhere")
    assert answer(source, prebuilt=shipped) == (42, "prebuilt answer")


def test_a_prebuilt_binary_of_other_sources_is_not_used(source, tmp_path):
    shipped = tmp_path / "prebuilt"
    NativeLibrary("answer", [source], flags=["-fPIC"]).ship(shipped)
    source.write_text(ANSWER % 43)
    assert answer(source, prebuilt=shipped) == (43, "built answer")


def test_a_cache_that_cannot_be_written_is_said_by_name(source, tmp_path, monkeypatch):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(in_the_way))
    with pytest.raises(BuildError, match=r"kernel cache .*file/kernels cannot be written"):
        answer(source)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DRIVETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "drivetrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "drivetrain"


def test_paths_with_spaces_and_dollars_build(tmp_path, monkeypatch):
    folder = tmp_path / "a b$c:d"
    folder.mkdir()
    source = folder / "answer.cpp"
    source.write_text(ANSWER % 7)
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(folder / "cache"))
    assert answer(source)[0] == 7


def test_a_library_that_does_not_load_is_a_build_error(source):
    def refuse():
        raise OSError("libmissing.so: cannot open shared object file")

    with pytest.raises(BuildError, match=r"answer was built but cannot be loaded: libmissing"):
        answer(source, before_load=refuse)


def test_ninjas_output_is_explained_by_its_first_error():
    output = "FAILED: [code=1] 0-a.o \nc++ -c a.cpp\nIn file included\na.cpp:2: error: x\nb: error"
    assert explain(output) == "a.cpp:2: error: x (command: c++ -c a.cpp)"


def test_the_library_is_plain_c(source):
    assert isinstance(NativeLibrary("answer", [source], flags=["-fPIC"]).load(), ctypes.CDLL)
