"""Every example runs as a user runs it: through the command line, with small flags."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import DrivetrainError

DRIVETRAIN = [sys.executable, "-m", "drivetrain.cli"]
SMALL = shlex.split("--layers 1 --width 32 --context 64 --validation 8 --sample 40")
PATIENCE = 300.0

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an example on two ranks, from the root of the repository."""
    started: list[subprocess.Popen[str]] = []

    def start(example: str, *arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
        logs = tmp_path_factory.mktemp("logs")
        run = ["run", "--nproc", str(ranks), "--log-dir", str(logs), f"examples/{example}"]
        process = subprocess.Popen(
            [*DRIVETRAIN, *run, *map(str, arguments)],
            cwd=root,
            env={**os.environ, "COLUMNS": "80"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def run(start: Start) -> Callable[..., str]:
    """Runs an example to its end and answers what it printed."""

    def run(example: str, *arguments: object, ranks: int = 2) -> str:
        process = start(example, *arguments, ranks=ranks)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        crowd = f"warning: {ranks} ranks share {len(os.sched_getaffinity(0))} cores"
        assert errors == "" or (errors.startswith(crowd) and errors.count("\n") == 1)
        return output

    return run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> tuple[str, Path]:
    """Output and folder of a short run on the standard library."""
    folder = tmp_path_factory.mktemp("trained")
    return run("train_gpt.py", *SMALL, "--steps", 60, "--save-every", 25, "--out", folder), folder


def bits(output: str, when: str) -> float:
    """The bits per byte that a run measured on held-out text."""
    found = re.search(rf"held-out text {when} training: ([\d.]+) bits per byte", output)
    assert found, output
    return float(found[1])


def losses(output: str) -> dict[int, str]:
    """Step -> training loss, of the steps that a run has shown."""
    found = re.findall(r"step (\d+) of \d+: loss ([\d.]+) bits/byte, [\d,]+ tokens/s", output)
    return {int(step): loss for step, loss in found}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- long sequences ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt", pytest.param("llama", marks=pytest.mark.long)])
def test_two_ranks_that_share_sequences_have_the_curve_of_one(run, model) -> None:
    small = ["--model", model, "--context", 64, "--steps", 4]
    alone = run("long_sequence.py", *small, ranks=1)
    assert "step 4: loss" in alone
    assert run("long_sequence.py", *small, "--share", 2) == alone


@pytest.mark.parametrize("mode", ["bigbird", "topk"])
def test_models_learn_with_sparse_attention(run, mode) -> None:
    output = run("sparse_attention.py", "--mode", mode, "--context", 128, "--steps", 4, ranks=1)
    found = [float(line.split()[-1]) for line in output.splitlines() if "loss" in line]
    assert len(found) == 4
    assert found[-1] < found[0] - 0.2


# -- the quickstart ----------------------------------------------------------------------------


def test_the_gpt_learns_the_standard_library(trained) -> None:
    output, _ = trained
    assert bits(output, "before") == pytest.approx(8, abs=0.001)
    assert bits(output, "after") < 6


def test_the_gpt_leaves_checkpoints_a_sample_and_a_picture(trained) -> None:
    output, folder = trained
    tags = {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()}
    assert tags == {"global_step25", "global_step50", "global_step60"}
    sample = (folder / "sample.txt").read_text("utf-8")
    assert sample.startswith("import os\n\n\ndef ")
    assert sample in output
    picture = (folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_every_config_of_the_gpt_learns_alike(run, root, tmp_path) -> None:
    configs = ["gpt.json", *sorted(path.name for path in (root / "examples").glob("gpt_*.json"))]
    assert len(configs) == 5
    curves = [
        losses(
            run(
                "train_gpt.py",
                *[*SMALL, "--config", f"examples/{config}"],
                *["--steps", 6, "--out", tmp_path / config],
            )
        )
        for config in configs
    ]
    assert len(curves[0]) == 6
    assert all(curve == curves[0] for curve in curves)


@pytest.fixture(scope="module")
def curve_alone(run, tmp_path_factory) -> dict[int, str]:
    """Losses of a pipeline's config in one process, with one stage."""
    folder = tmp_path_factory.mktemp("alone")
    config = ["--config", "examples/pipeline_gpt.json", "--set", "pipeline.stages=1"]
    return losses(run("train_gpt.py", *LAYOUTS, *config, "--out", folder, ranks=1))


LAYOUTS = [*SMALL, "--layers", 2, "--heads", 2, "--steps", 6]


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ("pipeline_tensor_gpt.json", 4),
        pytest.param("pipeline_gpt.json", 4, marks=pytest.mark.long),
        pytest.param("tensor_gpt.json", 2, marks=pytest.mark.long),
    ],
)
def test_stages_and_shared_layers_have_the_curve_of_one_process(
    run, tmp_path, curve_alone, config, ranks
) -> None:
    config = f"examples/{config}"
    output = run("train_gpt.py", *LAYOUTS, "--config", config, "--out", tmp_path, ranks=ranks)
    found, alone = ([float(x) for x in curve.values()] for curve in (losses(output), curve_alone))
    assert len(found) == 6
    assert found == pytest.approx(alone, abs=0.002)
    assert found[-1] < found[0] - 0.1


def test_replicas_that_meet_rarely_learn_and_end_alike(root, tmp_path) -> None:
    """README of drivetrain-communication: `drivetrain replicas run` with diloco_gpt.json."""
    folder = tmp_path / "replica{replica}"
    script = ["examples/train_gpt.py", "--config", "examples/diloco_gpt.json", *SMALL]
    given = ["--steps", "60", "--out", str(folder)]
    logs = str(tmp_path / "logs{replica}")
    command = ["replicas", "run", "--replicas", "2", "--nproc", "1", "--log-dir", logs]
    done = subprocess.run(
        [*DRIVETRAIN, *command, *script, *given],
        cwd=root,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"held-out text (\w+) training: ([\d.]+) bits per byte", done.stdout)
    before = {float(value) for when, value in found if when == "before"}
    after = [float(value) for when, value in found if when == "after"]
    assert len(after) == 2
    assert len(set(after)) == 1  # 60 steps are three rounds of 20
    assert after[0] < 0.75 * max(before)
    assert all((tmp_path / f"replica{number}").is_dir() for number in range(2))


def test_progress_is_shown_while_it_is_made(trained) -> None:
    output, _ = trained
    assert list(losses(output)) == list(range(6, 61, 6))
    assert re.search(r"tokens/s, \d+ s left", output)


def test_a_resumed_run_repeats_the_uninterrupted_one(run, tmp_path) -> None:
    flags = [*SMALL, "--steps", 8, "--save-every", 4, "--out", tmp_path]
    whole = losses(run("train_gpt.py", *flags))
    assert list(whole) == list(range(1, 9))
    shutil.rmtree(tmp_path / "checkpoints" / "global_step8")
    (tmp_path / "checkpoints" / "latest").write_text("global_step4")
    output = run("train_gpt.py", *flags, "--resume")
    assert f"resumed from {tmp_path / 'checkpoints' / 'global_step4'}" in output
    assert losses(output) == {step: whole[step] for step in range(5, 9)}


def test_a_finished_run_is_not_trained_again(trained, run) -> None:
    output, folder = trained
    again = run("train_gpt.py", *SMALL, "--steps", 60, "--out", folder, "--resume")
    assert losses(again) == {}
    assert bits(again, "after") == bits(output, "after")


def test_any_text_will_do_on_any_number_of_ranks(run, tmp_path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("one.txt", "two.txt"):
        (tmp_path / "text" / name).write_text("the cat sat on the mat. ü\n" * 2000, "utf-8")
    files = [tmp_path / "text", tmp_path / "text" / "one.txt"]
    out = tmp_path / "out"
    output = run("train_gpt.py", *SMALL, "--steps", 4, "--out", out, "--data", *files, ranks=1)
    assert "162,002 bytes of text, 1 ranks" in output


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_an_interrupted_run_ends_cleanly_and_can_go_on(start, root, tmp_path, number) -> None:
    flags = [*SMALL, "--steps", 100_000, "--save-every", 10, "--out", tmp_path]
    process = start("train_gpt.py", *flags)
    wait_until((tmp_path / "checkpoints" / "latest").exists)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert errors.startswith(f"interrupted by {number.name}")
    stopped = re.search(rf"stopped by {number.name} after step (\d+), which is saved", output)
    assert stopped, output
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"global_step{stopped[1]}"

    step = int(stopped[1])
    advice = re.search(r"go on with: drivetrain (run .*)", output)
    assert advice, output
    # the last of two --steps counts
    command = [*DRIVETRAIN, *shlex.split(advice[1]), "--steps", str(step + 2)]
    done = subprocess.run(
        [*command[:4], "--log-dir", str(tmp_path / "logs"), *command[4:]],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(losses(done.stdout)) == [step + 1, step + 2]


def saved(folder: Path) -> bool:
    """Whether a checkpoint is whole: its manifest comes last."""
    return (folder / "manifest.json").exists()


def test_a_run_interrupted_while_saving_leaves_whole_checkpoints_only(start, run, tmp_path) -> None:
    flags = [*SMALL, "--save-every", 1, "--width", 256, "--out", tmp_path]
    process = start("train_gpt.py", *flags, "--steps", 100_000)
    checkpoints = tmp_path / "checkpoints"
    wait_until((checkpoints / "latest").exists)
    wait_until(lambda: any(not saved(folder) for folder in checkpoints.glob("global_step*")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGINT
    assert "which is saved" in output
    assert all(saved(folder) for folder in checkpoints.glob("global_step*"))
    step = int((checkpoints / "latest").read_text().removeprefix("global_step"))
    assert f"resumed from {checkpoints}/global_step{step}" in run(
        "train_gpt.py", *flags, "--steps", step + 2, "--resume"
    )


# -- bad input ---------------------------------------------------------------------------------


def refusal(start: Start, *arguments: object) -> str:
    """The one message about a run that cannot begin."""
    process = start("train_gpt.py", *SMALL, "--steps", 4, *arguments)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert output == ""
    assert "Traceback" not in errors
    message, *rest = errors.splitlines()
    assert message.startswith("error: rank ")
    assert re.fullmatch(
        r"  raised at \S*examples/\w+\.py:\d+\nlogs of all 2 ranks: \S+", "\n".join(rest)
    )
    return message


def test_a_file_that_is_not_text_is_one_message(start, tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" * 500)
    message = refusal(start, "--data", file, "--out", tmp_path / "out")
    assert f"--data: {file} is not UTF-8 text; leave it out or convert it" in message


def test_an_output_folder_that_cannot_be_made_is_one_message(start, tmp_path) -> None:
    (tmp_path / "file").touch()
    message = refusal(start, "--out", tmp_path / "file" / "out")
    assert f"--out: cannot create {tmp_path / 'file' / 'out' / 'checkpoints'}: Not a dir" in message


def test_resuming_without_a_checkpoint_is_one_message(start, tmp_path) -> None:
    message = refusal(start, "--resume", "--out", tmp_path)
    assert f"--resume: there is no checkpoint in {tmp_path / 'checkpoints'}; leave --re" in message


@pytest.fixture
def main(root, monkeypatch) -> Callable[..., None]:
    """The example in this process: what goes wrong before any rank meets another."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root / "examples"))

    def main(*arguments: object) -> None:
        words = [*SMALL, "--steps", 4, *arguments]
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, words)])
        runpy.run_path("examples/train_gpt.py", run_name="__main__")

    return main


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "text.txt does not exist"),
        (b"", "the text has 0 bytes, but windows of 64 bytes need 1,300; give more files"),
        (b"abc\0" * 500, "text.txt is not UTF-8 text; leave it out or convert it"),
    ],
    ids=["missing", "empty", "zeros"],
)
def test_a_file_without_text_is_refused(main, tmp_path, content, expected) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DrivetrainError, match=expected):
        main("--data", file, "--out", tmp_path / "out")


def test_an_empty_folder_is_refused(main, tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DrivetrainError, match=f"--data: no files in {tmp_path / 'texts'}"):
        main("--data", tmp_path / "texts", "--out", tmp_path / "out")


def test_a_standard_library_without_sources_is_refused(main, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DrivetrainError, match=r"no Python sources in .* your own with --data"):
        main("--out", tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_refused(main, tmp_path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints").chmod(0o500)
    with pytest.raises(DrivetrainError, match="cannot be written: permission denied"):
        main("--out", tmp_path / "out")


def test_too_few_steps_are_refused(main, tmp_path) -> None:
    with pytest.raises(DrivetrainError, match="--steps: expected at least 2, got 1"):
        main("--steps", 1, "--out", tmp_path)


# -- digits ------------------------------------------------------------------------------------


def test_the_network_recognises_digits(run) -> None:
    output = run("digits.py", "--epochs", 6)
    assert float(re.findall(r"([\d.]+)% of the test images right", output)[-1]) > 85


# -- before and after --------------------------------------------------------------------------


def test_moving_a_loop_to_drivetrain_changes_five_lines(root) -> None:
    before, after = (
        (root / "examples" / "before_after" / name).read_text().splitlines()
        for name in ("before.py", "after.py")
    )
    changed = 0
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        if kind != "equal":
            gone = sum(bool(line) for line in before[start:end])
            new = sum(bool(line) for line in after[new_start:new_end])
            changed += max(gone, new)
    assert changed == 5


def test_the_moved_loop_trains_as_before(root, monkeypatch, capsys) -> None:
    def same_order(data: object, batch_size: int, shuffle: bool) -> DataLoader:
        assert shuffle
        return DataLoader(LoaderRequest(data, batch_size, seed=1234))

    monkeypatch.chdir(root)
    runpy.run_path("examples/before_after/after.py")
    after = capsys.readouterr().out
    monkeypatch.setattr(torch.utils.data, "DataLoader", same_order)
    runpy.run_path("examples/before_after/before.py")
    before = capsys.readouterr().out
    assert len(before.splitlines()) == 5
    assert after == before


def test_the_moved_loop_trains_on_two_ranks(run) -> None:
    assert float(run("before_after/after.py").split()[-1]) > 0.93
