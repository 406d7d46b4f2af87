"""The tensors at the peak of a step are those that one counts by hand, and nothing stays behind."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_profiler.memory.plugin import MemorySnapshot
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.testing import PluginConformance, run_distributed

ROWS, WIDTH, LARGE = 8, 16, 50_000


class TestMemorySnapshot(PluginConformance):
    plugin = MemorySnapshot
    config = {"memory_snapshot": {"step": 2}}

    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)


class Wasteful(nn.Module):
    """Needs a lot for a moment, and keeps nothing of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            _ = torch.ones(LARGE)
        return x


class Net(nn.Module):
    def __init__(self, again: bool = False, wasteful: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.act, self.waste = nn.Tanh(), Wasteful() if wasteful else nn.Identity()
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.waste(x)
        if self.again:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def train(
    folder: Path,
    *,
    steps: int = 3,
    by_hand: bool = False,
    net: Any = Net,
    copies: int = 1,
    **section: Any,
) -> list[torch.Tensor]:
    """Two micro-batches a step."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "memory_snapshot": {"path": str(folder), **section},
    }
    engine, *_ = drivetrain.initialize(model=net(), config=config)
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(2 * steps):
        loss = engine(inputs).expand(copies, ROWS, WIDTH).exp().mean()
        if by_hand:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
    assert not [m for m in engine.module.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert _len_torch_dispatch_stack() == 0
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.job.close()
    return weights


def read(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text("utf-8"))


def by_kind(found: dict[str, Any]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for piece in found["pieces"]:
        sums[piece["kind"]] += piece["nbytes"]
    return dict(sums)


PARAMETERS = 4 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH)
HIDDEN, OUTPUT = 4 * ROWS * 4 * WIDTH, 4 * ROWS * WIDTH


def test_tensors_at_the_peak_are_those_counted_by_hand(tmp_path: Path) -> None:
    train(tmp_path)
    found = read(tmp_path)
    kinds = by_kind(found)
    assert found["step"] == 2
    for kind in ("parameters", "gradients", "optimizer: exp_avg", "optimizer: exp_avg_sq"):
        assert kinds[kind] == PARAMETERS, kind
    # Of tanh the result is saved, and not what goes into it.
    of_model = [p for p in found["pieces"] if p["kind"] == "activations"]
    assert [p["nbytes"] for p in of_model if "tanh" in p["operator"]] == [HIDDEN]
    assert [p["nbytes"] for p in of_model if p["module"] == "up"] == []
    assert sum(p["nbytes"] for p in found["pieces"]) == found["nbytes"] == max(found["curve"])
    assert found["phase"] == "backward"
    assert found["nbytes"] > found["begin"] >= 4 * PARAMETERS


def test_memory_that_one_module_needs_for_a_moment_is_found_in_it(tmp_path: Path) -> None:
    train(tmp_path, net=lambda: Net(wasteful=True))
    found = read(tmp_path)
    assert (found["phase"], found["module"]) == ("forward", "waste")
    largest = found["pieces"][0]
    assert (largest["nbytes"], largest["module"]) == (4 * LARGE, "waste")
    assert largest["operator"] == found["operator"] == "aten.ones.default"
    text = (tmp_path / "rank0.txt").read_text("utf-8")
    assert "in forward of waste (aten.ones.default)" in text
    assert f"{found['nbytes'] / (1 << 20):,.3f} MiB" in text
    assert f"{sum(by_kind(found).values()) / (1 << 20):12,.3f}   100.0%" in text


def test_what_is_computed_again_is_told_apart(tmp_path: Path) -> None:
    train(tmp_path, net=lambda: Net(again=True))
    phases = {p["phase"] for p in read(tmp_path)["pieces"] if "tanh" in p["operator"]}
    assert phases == {"recompute"}


def test_what_the_script_computes_after_the_model_counts(tmp_path: Path) -> None:
    train(tmp_path, copies=100)
    large = [p for p in read(tmp_path)["pieces"] if p["nbytes"] == 100 * OUTPUT]
    saved = [p for p in large if p["phase"] == "forward"]
    assert [p["shape"] for p in saved] == [[100, ROWS, WIDTH]]  # of exp(), for its backward
    assert {p["phase"] for p in large if p not in saved} == {"backward"}


def ranks(folder: Path) -> list[torch.Tensor]:
    return train(folder)


def test_each_rank_writes_its_own_and_training_is_the_same(tmp_path: Path) -> None:
    watched = run_distributed(ranks, 2, tmp_path)
    assert read(tmp_path, 0)["rank"] == 0
    assert read(tmp_path, 1)["rank"] == 1
    plain = train(tmp_path / "none", enabled=False)
    assert not (tmp_path / "none").exists()
    for weights in watched:
        for found, expected in zip(weights, plain, strict=True):
            torch.testing.assert_close(found, expected)


def test_all_that_is_watched_is_left_alone_afterwards(tmp_path: Path) -> None:
    from drivetrain_profiler.memory.watch import MemoryWatch

    resize = torch.UntypedStorage.resize_
    train(tmp_path, net=lambda: Net(wasteful=True))
    gc.collect()
    assert torch.UntypedStorage.resize_ is resize
    assert not [o for o in gc.get_objects() if type(o) is MemoryWatch]


def test_a_script_that_calls_backward_itself_has_forward_and_update(tmp_path: Path) -> None:
    train(tmp_path, by_hand=True)
    assert read(tmp_path)["phase"] in ("forward", "update")


@pytest.mark.parametrize(("steps", "said"), [(2, 1), (4, 0)])
def test_a_step_that_never_comes_is_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, steps: int, said: int
) -> None:
    train(tmp_path / "deep" / "er", steps=steps, step=2)
    words = "memory_snapshot.step is 2, but this run ended before its end (in its step 2)"
    assert caplog.text.count(words) == said
    assert (tmp_path / "deep" / "er" / "rank0.json").exists() is not bool(said)


def test_a_folder_that_cannot_be_written_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    train(tmp_path / "file" / "below")
    assert "the memory snapshot cannot be written" in caplog.text
