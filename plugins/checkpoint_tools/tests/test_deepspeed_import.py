"""DeepSpeed's checkpoints come over bit by bit, and what might do harm does not."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools import import_deepspeed, verify
from torch import nn

import drivetrain
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.testing import run_distributed

FILES = Path(__file__).parent / "deepspeed_files"
TRAINED = [
    *("embed.weight", "hidden.weight", "hidden.bias", "norm.weight", "norm.bias"),
    *("back.weight", "back.bias"),
]


class Model(nn.Module):
    """The model of ``deepspeed_files/make_files.py``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("offset", torch.zeros(3))
        self.frozen = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.back = nn.Linear(3, 4)
        self.frozen.weight.requires_grad_(False)


def engine_of(dtype: str) -> Engine:
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.5},
    ]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    engine, *_ = drivetrain.initialize(model=model, model_parameters=groups, config=config)
    return engine


def theirs(name: str, what: str) -> torch.Tensor:
    """What DeepSpeed's own converter made of stages 1 and 3."""
    path = FILES / name / "global_step3" / "zero"
    value: Any = torch.load(path / what, weights_only=True)
    tensor: torch.Tensor = value["param"] if isinstance(value, dict) else value
    return tensor


def ours(folder: Path, kind: str, name: str) -> torch.Tensor | None:
    stored = Stored(LocalStorage(str(folder)), "global_step3")
    found = stored.find(kind, name)
    return None if found is None else read_whole(stored.storage, found)


def imported(folder: Path, source: str) -> Path:
    assert import_deepspeed(str(FILES / source), str(folder)) == f"{folder}/global_step3"
    assert verify(Stored(LocalStorage(str(folder)), "global_step3")) == []
    return folder


@pytest.mark.parametrize(
    ("source", "reference"), [("z1", "u1"), ("z2", "u1"), ("u1", "u1"), ("z3", "u3"), ("u3", "u3")]
)
def test_masters_and_moments_are_those_of_deepspeeds_own_converter(
    tmp_path: Path, source: str, reference: str
) -> None:
    folder = imported(tmp_path, source)
    shapes = {name: p.shape for name, p in Model().named_parameters()}
    for name in TRAINED:
        for kind, file in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq",) * 2):
            found = ours(folder, kind, name)
            expected = theirs(reference, f"{name}/{file}.pt").reshape(shapes[name])
            assert found is not None
            assert torch.equal(found, expected), (kind, name)
        assert ours(folder, "step", name) == torch.tensor(3)
    assert ours(folder, "parameter", "head.weight") is None  # it is embed.weight
    offset = ours(folder, "buffer", "offset")
    assert offset is not None
    assert offset.tolist() == [0, 1, 2]
    frozen = ours(folder, "parameter", "frozen.weight")
    if frozen is None:
        frozen = ours(folder, "master", "frozen.weight")
    expected = torch.load(FILES / "z1/global_step3/mp_rank_00_model_states.pt", weights_only=True)
    assert frozen is not None
    assert torch.equal(frozen.bfloat16(), expected["module"]["frozen.weight"])


def load_and_report(folder: str, dtype: str) -> dict[str, Any]:
    engine = engine_of(dtype)
    _, client = engine.load_checkpoint(folder)
    fragments = {(f.kind, f.name): f.read().clone() for f in engine.states.fragments()}
    assert engine.lr_scheduler is not None
    found = {
        "client": client,
        "steps": (engine.global_steps, engine.global_samples),
        "lr": engine.get_lr(),
        "decay": [group["weight_decay"] for group in engine._groups()],
        "schedule": engine.lr_scheduler.state_dict(),
        "master": fragments[("master" if dtype == "bf16" else "parameter"), "back.weight"],
        "exp_avg": fragments["exp_avg", "embed.weight"],
    }
    engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("source", ["z1", "z3"])
def test_a_run_of_deepspeed_goes_on_in_any_layout(
    tmp_path: Path, source: str, dtype: str, world: int
) -> None:
    imported(tmp_path, source)
    reference = f"u{source[1]}"
    for found in run_distributed(load_and_report, world, str(tmp_path), dtype):
        assert found["client"] == {"note": "three"}
        assert found["steps"] == (3, 24)
        assert found["lr"] == pytest.approx([0.004771212547196624] * 2)
        assert found["decay"] == [0.1, 0.0]
        assert found["schedule"] == {"last_batch_iteration": 2}
        assert torch.equal(found["master"], theirs(reference, "back.weight/fp32.pt").flatten())
        assert torch.equal(found["exp_avg"], theirs(reference, "embed.weight/exp_avg.pt").flatten())


def test_stage_0_brings_weights_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = imported(tmp_path, "z0")
    stored = Stored(LocalStorage(str(folder)), "global_step3")
    weaker = stored.manifest["guarantee"]["weaker"]
    assert weaker[0].startswith("optimizer states start afresh: stage 0 does not name")
    expected = torch.load(FILES / "z0/global_step3/mp_rank_00_model_states.pt", weights_only=True)
    for name in TRAINED:
        found = ours(folder, "parameter", name)
        assert found is not None
        assert torch.equal(found, expected["module"][name])
    engine = engine_of("fp32")
    engine.load_checkpoint(folder, load_optimizer_states=False)
    assert engine.global_steps == 3
    engine.destroy()


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(FILES / "z1", tmp_path / "z1")
    return tmp_path / "z1"


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_deepspeed(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "latest").exists()
    return str(caught.value)


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_payload_in_a_file_is_refused_and_does_not_run(
    copied: Path, tmp_path: Path, name: str
) -> None:
    trace = tmp_path / "trace"
    torch.save(
        {"optimizer_state_dict": Payload(trace), "module": {}}, copied / "global_step3" / name
    )
    message = refusal(copied, tmp_path)
    assert name in message
    assert "not loaded for safety" in message
    assert not trace.exists()
    (copied / "global_step3" / name).write_bytes(pickle.dumps(Payload(trace)))
    assert "no file of torch.save" in refusal(copied, tmp_path)
    assert not trace.exists()


def test_a_file_that_grows_when_it_is_unpacked_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "global_step3" / MODEL
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert "is compressed, which torch.save never does" in refusal(copied, tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_cut_off_file_is_named(copied: Path, tmp_path: Path, keep: int) -> None:
    path = copied / "global_step3" / OPTIMIZER
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{OPTIMIZER} is damaged" in refusal(copied, tmp_path)


def test_a_missing_rank_is_named(copied: Path, tmp_path: Path) -> None:
    (copied / "global_step3" / OPTIMIZER).unlink()
    assert "optimizer states of ranks [0] only, but 2 ranks saved it" in refusal(copied, tmp_path)


def test_files_of_more_ranks_than_there_were_are_refused(copied: Path, tmp_path: Path) -> None:
    shutil.copy(
        copied / "global_step3" / MODEL, copied / "global_step3" / "mp_rank_01_model_states.pt"
    )
    message = refusal(copied, tmp_path)
    assert "2 model-parallel ranks" in message
    assert "1 ranks for each layer do not fit" in message


def test_parts_of_layers_that_are_not_known_are_refused_with_advice(
    copied: Path, tmp_path: Path
) -> None:
    content = torch.load(FILES / "z0/global_step3" / MODEL, weights_only=True)
    content.pop("checkpoint_parallel_dimensions", None)
    shutil.rmtree(copied / "global_step3")
    (copied / "global_step3").mkdir()
    for rank in range(2):
        torch.save(content, copied / f"global_step3/mp_rank_{rank:02d}_model_states.pt")
    message = refusal(copied, tmp_path)
    assert "how embed.weight is cut over tensor-parallel ranks is not known" in message
    assert "ds_to_universal.py" in message


@pytest.mark.parametrize("tag", ["../../etc", "/etc", "", "x/y"])
def test_a_latest_that_leads_elsewhere_is_refused(copied: Path, tmp_path: Path, tag: str) -> None:
    (copied / "latest").write_text(tag)
    assert "which is no folder's name" in refusal(copied, tmp_path)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    assert "has no model states of DeepSpeed" in refusal(tmp_path, tmp_path)
