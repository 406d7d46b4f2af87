"""Scripts of the kind of Transformers' examples, started by commands as users start them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_trainer_of_transformers import stage

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate", "datasets")

EXAMPLES = "DRIVETRAIN_TRANSFORMERS_EXAMPLES"
"""Names the folder ``examples`` of a checkout of Transformers."""

WORDS = [f"word{number}" for number in range(40)]

COMMON = {
    "--per_device_train_batch_size": "2",
    "--gradient_accumulation_steps": "2",
    "--max_steps": "6",
    "--logging_steps": "1",
    "--save_steps": "3",
    "--learning_rate": "0.5",
    "--optim": "sgd",
    "--seed": "0",
    "--use_cpu": "true",
    "--report_to": "none",
    "--disable_tqdm": "true",
    "--block_size": "8",
}


def write_base(folder):
    """A model without training, and a tokenizer that knows one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny.start_anew()
    numbers = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", model_max_length=32, **ends
    )
    tokenizer.save_pretrained(folder)
    tiny.language_model(vocab_size=len(numbers)).save_pretrained(folder)


@pytest.fixture
def told(tmp_path):
    """Arguments of a script: its text, model, tokenizer and config, all made here."""
    draw = random.Random(0)
    seldom = [1 / (1 + number) for number in range(len(WORDS))]
    lines = (" ".join(draw.choices(WORDS, seldom, k=draw.randint(3, 12))) for _ in range(200))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines), "utf-8")
    run_distributed(write_base, 1, str(tmp_path / "base"))
    config = tmp_path / "stage3.json"
    config.write_text(json.dumps(stage(3, stage3_param_persistence_threshold=0)), "utf-8")
    files = {"--train_file": text, "--model_name_or_path": tmp_path / "base"}
    return {**COMMON, **files, "--deepspeed": config}


def by_deepspeed(ranks):
    return [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks]


def by_torchrun(ranks):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", ranks]


def run(command, script, output, arguments):
    """Run a script and return the losses that its Trainer has logged."""
    words = [str(word) for pair in arguments.items() for word in pair]
    done = subprocess.run(
        [*map(str, command), str(script), "--output_dir", str(output), *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=output.parent,
        # torchrun leaves a folder of its logs behind.
        env={**os.environ, "HF_HOME": str(output.parent / "hf_home"), "TMPDIR": str(output.parent)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_resumes(script, output, arguments):
    """Two ranks train a script unbroken at stage 3; one goes on from its half with the same."""
    unbroken = run(by_deepspeed("2"), script, output, arguments)
    assert len(unbroken) == 6
    assert unbroken[-1] < unbroken[0]
    half = {
        "--resume_from_checkpoint": output / "checkpoint-3",
        "--per_device_train_batch_size": "4",
    }
    resumed = run(by_torchrun("1"), script, output, {**arguments, **half})
    assert resumed == pytest.approx(unbroken, rel=2e-5)
    return unbroken


def test_a_script_trains_on_two_ranks_and_resumes_on_one(told, tmp_path):
    assert_resumes(Path(__file__).with_name("language.py"), tmp_path / "run", told)


@pytest.mark.long
def test_an_example_of_transformers_trains_unmodified(told, tmp_path):
    folder = os.environ.get(EXAMPLES)
    script = Path(folder or ".", "pytorch", "language-modeling", "run_clm.py")
    if not script.is_file():
        pytest.skip(f"no {script}: {EXAMPLES} names the folder examples of Transformers' checkout")
    pytest.importorskip("evaluate", reason="the script imports evaluate, which is not installed")
    arguments = {**told, "--do_train": "true"}
    unbroken = assert_resumes(script, tmp_path / "run", arguments)
    plain = {name: value for name, value in arguments.items() if name != "--deepspeed"}
    reference = run(by_torchrun("2"), script, tmp_path / "plain", plain)
    assert unbroken == pytest.approx(reference, rel=2e-5)
