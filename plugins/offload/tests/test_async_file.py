"""Every engine moves the very bytes, whatever the sizes and offsets, and says what went wrong."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import ALIGNMENT, AsyncFile, aligned_empty
from drivetrain_offload.file_io.faults import SHORT, Fault
from file_io_engines import ENGINES, content, random_bytes, without_compiler

from drivetrain.errors import BuildError, ConfigError

SIZES = (1, 511, 4095, 4096, 4097, 8192, 65536 * 3 + 17)
OFFSETS = (0, 1, 512, 4095, 4096, 12289)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_any_part_of_a_file_is_written_without_touching_its_neighbours(
    engine: str, tmp_path: Path, size: int, offset: int, aligned: bool
) -> None:
    path = tmp_path / "file"
    before = bytes(random_bytes(4 * 65536, seed=1).tolist())
    path.write_bytes(before)
    memory = aligned_empty(size + 1, torch.uint8)
    part = memory[:size] if aligned else memory[1:]
    part.copy_(random_bytes(size, seed=2))
    with AsyncFile(path, mode="r+", engine=engine, block_size=65536) as file:
        past_the_cache = file.direct
        file.write(part, offset).wait()
        assert file.direct == past_the_cache  # every piece was one that the system takes
    assert path.read_bytes() == before[:offset] + content(part) + before[offset + size :]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_any_part_of_a_file_is_read_into_nothing_but_the_tensor(
    engine: str, tmp_path: Path, size: int, offset: int, aligned: bool
) -> None:
    path = tmp_path / "file"
    stored = random_bytes(size + offset, seed=3)
    path.write_bytes(content(stored))
    memory = aligned_empty(size + 2, torch.uint8).fill_(7)
    part = memory[:size] if aligned else memory[1 : 1 + size]
    with AsyncFile(path, engine=engine, block_size=8192) as file:
        file.read(part, offset).wait()
    assert torch.equal(part, stored[offset:])
    assert int(memory[-1]) == 7
    assert aligned or int(memory[0]) == 7


def test_a_tensor_of_any_dtype_and_shape_comes_back(engine: str, tmp_path: Path) -> None:
    matrix = torch.randn(37, 53, dtype=torch.float64).to(torch.bfloat16)
    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        file.write_sync(matrix, 3)
        back = torch.empty_like(matrix)
        file.read_sync(back, 3)
    assert torch.equal(back, matrix)


def test_an_empty_tensor_needs_no_file_content(engine: str, tmp_path: Path) -> None:
    with AsyncFile(tmp_path / "file", mode="x", engine=engine) as file:
        request = file.read(torch.empty(0), offset=100)
        request.wait()
        assert request.done()


@pytest.mark.parametrize("single_submit", [False, True])
@pytest.mark.parametrize("overlap_events", [False, True])
@pytest.mark.parametrize(("depth", "threads"), [(1, 1), (3, 2), (32, 3)])
def test_settings_change_the_speed_and_not_the_bytes(
    engine: str,
    tmp_path: Path,
    single_submit: bool,
    overlap_events: bool,
    depth: int,
    threads: int,
) -> None:
    stored = random_bytes(40 * 4096 + 5)
    with AsyncFile(
        tmp_path / "file",
        mode="w",
        block_size=4096,
        queue_depth=depth,
        intra_op_parallelism=threads,
        single_submit=single_submit,
        overlap_events=overlap_events,
        engine=engine,
    ) as file:
        file.write_sync(stored)
        back = torch.zeros_like(stored)
        file.read_sync(back)
    assert torch.equal(back, stored)
    assert (tmp_path / "file").read_bytes() == content(stored)


def test_many_requests_may_be_under_way_in_any_order(engine: str, tmp_path: Path) -> None:
    parts = {at * 5000: random_bytes(5000, seed=at) for at in range(200)}
    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        shuffled = list(parts.items())
        random.Random(0).shuffle(shuffled)
        written = [file.write(part, offset) for offset, part in shuffled]
        for request in written:
            request.wait()
        back = {offset: torch.empty(5000, dtype=torch.uint8) for offset in parts}
        for offset, part in back.items():
            file.read(part, offset)
        file.wait()
    assert all(torch.equal(back[offset], part) for offset, part in parts.items())


def test_several_threads_share_a_file(engine: str, tmp_path: Path) -> None:
    numbers = range(8)
    parts = [random_bytes(9000, seed=number) for number in numbers]
    failures: list[BaseException] = []

    def write_and_read(file: AsyncFile, number: int) -> None:
        try:
            for _ in range(20):
                file.write(parts[number], number * 9000).wait()
                back = torch.zeros(9000, dtype=torch.uint8)
                file.read(back, number * 9000).wait()
                assert torch.equal(back, parts[number])
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        threads = [threading.Thread(target=write_and_read, args=(file, n)) for n in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert (tmp_path / "file").read_bytes() == b"".join(map(content, parts))


def test_a_tensor_that_the_caller_drops_lives_until_it_is_written(
    engine: str, tmp_path: Path
) -> None:
    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        for at in range(50):
            file.write(torch.full((4096,), at, dtype=torch.uint8), at * 4096)
    expected = b"".join(bytes([at]) * 4096 for at in range(50))
    assert (tmp_path / "file").read_bytes() == expected


def test_a_file_that_the_caller_drops_lives_until_its_request_is_over(
    engine: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    back = torch.zeros(200, dtype=torch.uint8)
    AsyncFile(tmp_path / "file", engine=engine).read(back).wait()
    assert back.tolist() == list(range(200))


# -- choosing an engine --------------------------------------------------------------------------


def test_auto_takes_an_engine_that_works(tmp_path: Path) -> None:
    with AsyncFile(tmp_path / "file", mode="w") as file:
        assert file.engine.name in ENGINES


def test_equal_settings_share_an_engine(tmp_path: Path) -> None:
    with (
        AsyncFile(tmp_path / "one", mode="w", queue_depth=3) as one,
        AsyncFile(tmp_path / "two", mode="w", queue_depth=3) as two,
        AsyncFile(tmp_path / "other", mode="w", queue_depth=4) as other,
    ):
        assert one.engine is two.engine
        assert one.engine is not other.engine


def threads() -> set[str]:
    """Those of this process, of Python and others."""
    return {path.name for path in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_an_engine_ends_with_its_last_file(tmp_path: Path) -> None:
    settings = {"queue_depth": 5, "intra_op_parallelism": 3, "engine": "threads"}
    before = threads()
    one, two = (AsyncFile(tmp_path / name, mode="w", **settings) for name in "ab")
    running = threads() - before
    one.write_sync(torch.zeros(10))
    one.close()
    assert running <= threads()
    two.write_sync(torch.zeros(10))
    two.close()
    assert len(running) >= 5
    deadline = time.monotonic() + 60
    while running & threads():  # the system lists a thread a little longer than it runs
        assert time.monotonic() < deadline
        time.sleep(0.001)


FORBIDDEN = """
import ctypes, struct, sys
from drivetrain_offload.file_io import AsyncFile
# A filter like a container's: io_uring_setup, system call 425, answers EPERM.
load, jump, ret = (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001)
code = b"".join(struct.pack("HBBI", *each) for each in (load, jump, ret, (0x06, 0, 0, 0x7FFF0000)))
memory = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(memory))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit(77)
with AsyncFile(sys.argv[1], mode="w") as file:
    assert file.engine.name in ("libaio", "threads"), file.engine.name
try:
    AsyncFile(sys.argv[1], engine="io_uring")
except Exception as error:
    assert "aio.engine: io_uring cannot be used here" in str(error), error
    assert "not permitted" in str(error), error
else:
    raise AssertionError("io_uring was not forbidden")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has io_uring")
def test_auto_does_without_io_uring_where_a_container_forbids_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORBIDDEN, str(tmp_path / "file")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip("system calls cannot be filtered here")
    assert run.returncode == 0, run.stderr


def test_without_a_compiler_python_serves_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiler(monkeypatch)
    for depth in (1, 2):
        with AsyncFile(tmp_path / "file", mode="w", queue_depth=depth) as file:
            assert file.engine.name == "python"
    assert [r.message for r in caplog.records if "slower: no C++" in r.message] == [
        "files are read and written by Python's threads, which is slower: no C++ compiler found"
    ]


def test_native_engines_may_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    with pytest.raises(ConfigError, match=r"aio.engine: libaio needs the native library: no C"):
        AsyncFile(tmp_path / "file", mode="w", engine="libaio")
    monkeypatch.setenv("DRIVETRAIN_REQUIRE_NATIVE", "1")
    with pytest.raises(BuildError, match="no C"):
        AsyncFile(tmp_path / "file", mode="w")


# -- processes -------------------------------------------------------------------------------------

FORKED = """
import os, sys, torch
from drivetrain_offload.file_io import AsyncFile, FileIOError
path = sys.argv[1]
file = AsyncFile(path, mode="w")
request = file.write(torch.arange(1000))
child = os.fork()
if child == 0:
    for forbidden in (request.wait, lambda: file.write(torch.zeros(1))):
        try:
            forbidden()
        except (FileIOError, ValueError) as error:
            assert "fork" in str(error), error
        else:
            os._exit(1)
    with AsyncFile(path + ".child", mode="w") as own:
        own.write_sync(torch.arange(5))
    file.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
request.wait()
back = torch.zeros(1000, dtype=torch.int64)
file.read_sync(back)
assert torch.equal(back, torch.arange(1000))
"""


def test_a_forked_process_has_engines_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path / "file")]
    subprocess.run(command, check=True)
    child = torch.frombuffer(bytearray((tmp_path / "file.child").read_bytes()), dtype=torch.int64)
    assert child.tolist() == [0, 1, 2, 3, 4]


def test_a_process_that_ends_lets_its_transfers_end(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from drivetrain_offload.file_io import AsyncFile\n"
        "file = AsyncFile(sys.argv[1], mode='w', block_size=4096)\n"
        "for at in range(64): file.write(torch.full((4096,), at, dtype=torch.uint8), at * 4096)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=True)
    written = (tmp_path / "file").read_bytes()
    assert written == b"".join(bytes([at]) * 4096 for at in range(64))


def cached_pages(path: Path) -> list[bool]:
    """Of each page of a file, whether it is in the page cache; asks without reading it."""
    with path.open("rb") as opened:
        view = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    found = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    call = ctypes.CDLL(None, use_errno=True).mincore
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert call(start, len(view), found) == 0, os.strerror(ctypes.get_errno())
    return [bool(each & 1) for each in found]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its page cache")
def test_the_edges_of_a_read_bring_nothing_else_to_the_page_cache(tmp_path: Path) -> None:
    """Else a write of an edge could keep old bytes there of what is written past the cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    with AsyncFile(path) as file:
        if not file.direct:
            pytest.skip("this file system has no way past the page cache")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(cached_pages(path)):
            pytest.skip("this file system is the page cache")
        file.read(torch.empty(3 * mmap.PAGESIZE, dtype=torch.uint8), offset=1).wait()
        assert cached_pages(path) == [True, False, False, True, *[False] * 60]


def test_faults_are_planned_through_the_environment() -> None:
    fault = Fault.parse("write:2:EIO")
    struck = [fault.strike(writes) for writes in (True, False, True, True)]
    assert struck == [0, 0, errno.EIO, 0]
    assert Fault.parse("read:1:short").strike(False) == SHORT
    with pytest.raises(ConfigError, match=r"expected e.g. write:5:EIO, got 'write:x'"):
        Fault.parse("write:x")


def test_aligned_memory_is_aligned_for_every_dtype() -> None:
    for dtype in (torch.uint8, torch.bfloat16, torch.float64):
        tensor = aligned_empty(1001, dtype)
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert (tensor.shape, tensor.dtype) == ((1001,), dtype)
