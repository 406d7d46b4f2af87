"""``drivetrain bench io`` measures, chooses, prints a config that is accepted, and cleans up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from drivetrain_offload.bench.io_bench import io_bench
from drivetrain_offload.bench.io_measure import Measurement, Row, best, scratch_file
from drivetrain_offload.file_io import IOSettings
from drivetrain_offload.file_io.engine import LATENCY_BUCKETS, Latencies, bucket_start
from drivetrain_offload.section import Aio

from drivetrain.plan.plan import Plan

QUICK = ("--size", "32", "--seconds", "0.01", "--threads", "1")


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(io_bench, [str(folder), *QUICK, *options])


def row(block: int, depth: int, speed: float) -> Row:
    measured = Measurement(speed, 0.0, 0.0, 0.0)
    return Row(IOSettings(block, depth), "io_uring", measured, measured)


def test_every_combination_is_measured_in_both_directions(tmp_path: Path) -> None:
    sizes = ("--block-size", "64", "--block-size", "128", "--queue-depth", "2")
    result = run(tmp_path, *sizes, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    settings = [(r["settings"]["block_size"], r["settings"]["queue_depth"]) for r in answer["rows"]]
    assert settings == [(65536, 2), (131072, 2)]
    for each, direction in product(answer["rows"], ("read", "write")):
        measured, mean = each[direction], each[direction]["mean_latency"]
        # Little's law: so many blocks are under way on average, of two at most.
        blocks_per_second = measured["bytes_per_second"] / each["settings"]["block_size"]
        assert 0 < blocks_per_second * mean < 2.1
        # A hundredth of the blocks took as long as the bucket of the 99th percentile, or longer.
        assert 0 < measured["p99_latency"] <= 125 * mean


def test_the_printed_section_is_accepted_by_the_config(tmp_path: Path) -> None:
    result = run(tmp_path, "--block-size", "64", "--queue-depth", "2")
    assert result.exit_code == 0, result.output
    table, _, block = result.output.partition("{")
    assert "reads and writes in" in table
    config = {"train_batch_size": 1, **json.loads("{" + block)}
    assert Plan.build(config, world_size=1).section(Aio).block_size == 65536


def test_no_file_is_left_whatever_happens(tmp_path: Path) -> None:
    assert run(tmp_path, "--block-size", "64").exit_code == 0
    with scratch_file(tmp_path, 4096) as file:
        assert Path(file).stat().st_size == 4096
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_killed_measurement_leaves_no_file(tmp_path: Path) -> None:
    program = "from drivetrain_offload.bench.io_bench import io_bench; io_bench()"
    command = [sys.executable, "-c", program, str(tmp_path), "--size", "64", "--seconds", "60"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    descriptors = Path(f"/proc/{process.pid}/fd")
    while not any(_is_scratch_file(each) for each in descriptors.iterdir()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir()) == []


def _is_scratch_file(link: Path) -> bool:
    """Whether a descriptor is that of the file, whose name is gone by then."""
    try:
        target = str(link.readlink())
    except OSError:
        return False
    return "io-bench" in target and target.endswith("(deleted)")


def test_an_old_section_may_call_threads_by_their_old_name() -> None:
    old = {"block_size": 1_048_576, "thread_count": 4, "queue_depth": 16}
    assert Aio.model_validate(old) == Aio(intra_op_parallelism=4, queue_depth=16)
    assert Aio.model_validate({**old, "intra_op_parallelism": 2}).intra_op_parallelism == 2


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(io_bench, [str(tmp_path / "gone")])
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_a_block_size_that_no_disk_takes_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "--block-size", "6")
    assert result.exit_code == 2
    assert "6 is no multiple of 4" in result.output


def test_the_help_page_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from drivetrain_offload.bench.io_bench import io_bench\n"
        "try: io_bench(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "--block-size" in shown.stdout


def test_of_settings_that_are_nearly_as_fast_the_one_with_the_least_under_way_is_best() -> None:
    small, large, slow = row(1 << 18, 4, 98.0), row(1 << 22, 32, 100.0), row(1 << 12, 1, 50.0)
    assert best([large, small, slow]) is small
    assert best([large, slow]) is large


def test_the_speed_of_a_setting_is_that_of_reading_and_writing_back() -> None:
    fast, slow = Measurement(3e9, 0, 0, 0), Measurement(1.5e9, 0, 0, 0)
    assert Row(IOSettings(), "threads", fast, slow).bytes_per_second == pytest.approx(1e9)


def test_quantiles_of_latencies_are_the_ends_of_their_buckets() -> None:
    counts = [0] * LATENCY_BUCKETS
    counts[40], counts[80] = 98, 2  # from 1024 ns, and from 1048576 ns
    latencies = Latencies(100, 1.0, tuple(counts))
    assert bucket_start(40) == pytest.approx(1024e-9)
    assert latencies.quantile(0.5) == pytest.approx(1280e-9)
    assert latencies.quantile(0.99) == pytest.approx(1310720e-9)
    assert latencies.mean == pytest.approx(0.01)
