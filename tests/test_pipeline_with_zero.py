"""A model that is split between stages trains like one process at every stage of ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import Curve, TiedModel, data, train_alone
from safetensors.torch import load_file

import drivetrain
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.errors import TrainingError
from drivetrain.states.whole import of_all_ranks, whole
from drivetrain.testing import run_distributed

STEPS, MICRO_BATCHES, RATE, CLIPPING = 3, 4, 0.1, 0.05
MESSAGES = {"cpu": {"shared_memory": False}}
"""Ranks have to gather together, and in one order."""

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def train(changes: dict[str, Any]) -> tuple[Curve, dict[str, torch.Tensor], float]:
    changes = dict(changes)
    zero = {"stage": changes.pop("stage"), "stage3_param_persistence_threshold": 0}
    engine, *_ = drivetrain.initialize(
        model=TiedModel(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": changes.pop("clipping", 0.0),
            "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
            "pipeline": {"stages": 2, **changes.pop("pipeline", {})},
            "zero_optimization": {**zero, **changes.pop("zero", {})},
            **changes,
        },
    )
    engine.get_global_grad_norm()
    curve, mesh = [], engine.job.mesh
    for step in data(STEPS, MICRO_BATCHES, mesh.size("dp")):
        loss = engine.train_batch(iter([micro[mesh.coordinate("dp")] for micro in step]))
        norm = engine.get_global_grad_norm()
        curve.append((loss.item(), float("nan") if norm is None else norm))
    with whole(engine.module):
        found = {
            engine.job.parameters.info(p).name: p.detach().float().clone()
            for p in engine.module.parameters()
        }
    step_data = data(1, 1, mesh.size("dp"))[0][0]
    evaluated = engine.eval_batch(iter([step_data[mesh.coordinate("dp")]])).item()
    engine.destroy()
    engine.job.close()
    return curve, found, evaluated


CASES = [
    pytest.param(2, {"stage": 0}, id="stage 0"),
    pytest.param(4, {"stage": 1, "clipping": CLIPPING}, id="stage 1, clipped"),
    pytest.param(4, {"stage": 2, **MESSAGES}, id="stage 2, by messages"),
    pytest.param(
        4,
        {"stage": 2, "zero": OFFLOAD, "pipeline": {"schedule": "zb_h1"}},
        id="stage 2, offloaded, weights apart",
    ),
    pytest.param(2, {"stage": 3}, id="stage 3, alone in its stage"),
    pytest.param(4, {"stage": 3, **MESSAGES}, id="stage 3, by messages"),
    pytest.param(
        4, {"stage": 3, "pipeline": {"schedule": "zb_v"}, **MESSAGES}, id="stage 3, V shape"
    ),
    pytest.param(
        4,
        {"stage": 3, "zero": OFFLOAD, "pipeline": {"schedule": "interleaved"}},
        id="stage 3, offloaded, interleaved",
    ),
    pytest.param(
        4,
        {"stage": 3, "zero": {**OFFLOAD, "offload_param": {"device": "cpu"}}},
        id="stage 3, all offloaded",
        marks=pytest.mark.long,
    ),
    pytest.param(
        4,
        {"stage": 1, "zero": OFFLOAD, "bf16": {"enabled": True}},
        id="stage 1, offloaded, bf16",
        marks=pytest.mark.long,
    ),
    pytest.param(
        4, {"stage": 2, "fp16": {"enabled": True, "loss_scale": 128.0}}, id="stage 2, fp16"
    ),
    pytest.param(4, {"stage": 1, "bf16": {"enabled": True}}, id="stage 1, bf16"),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_a_split_model_trains_like_one_process(world: int, changes: dict[str, Any]) -> None:
    rtol = 3e-2 if "bf16" in changes else 3e-3 if "fp16" in changes else 1e-5
    expected, trained = train_alone(
        STEPS, MICRO_BATCHES, world // 2, RATE, changes.get("clipping", 0.0)
    )
    names: set[str] = set()
    for curve, parameters, _ in run_distributed(train, world, changes, timeout=100):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=rtol)
        for name, values in parameters.items():
            torch.testing.assert_close(values, trained[name], rtol=rtol, atol=rtol)
        names |= set(parameters)
    assert names == set(trained)


class Versioned(TiedModel):
    """One whose loader looks at the version of what it is given."""

    _version = 3
    loaded: int | None = None

    def _load_from_state_dict(self, state: Any, prefix: str, about: Any, *rest: Any) -> None:
        self.loaded = about.get("version")
        super()._load_from_state_dict(state, prefix, about, *rest)


def whole_model(
    stage: int, folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """The whole model's state, that after a larger one was loaded, and what is refused."""
    model = Versioned()
    engine, *_ = drivetrain.initialize(
        model=model,
        model_parameters=list(model.parameters()),  # also those of the other stage
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "pipeline": {"stages": 2},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
    )
    engine.save_16bit_model(folder)
    engine.save_checkpoint(folder, "t")
    state = engine.module_state_dict()
    engine.load_module_state_dict(state)
    assert model.loaded == 3
    assert vars(state)["_metadata"].keys() == vars(Versioned().state_dict())["_metadata"].keys()
    before = {name: value.clone() for name, value in state.items()}
    engine.load_module_state_dict({name: 2 * value for name, value in before.items()})
    after = {name: value.clone() for name, value in engine.module_state_dict().items()}
    refused = []
    without = {name: value for name, value in before.items() if name != "norm.weight"}
    for wrong in ({**before, "other": before["norm.weight"]}, {}, without):
        with pytest.raises(RuntimeError) as error:
            engine.load_module_state_dict(wrong)
        refused.append(str(error.value))
    engine.destroy()
    engine.job.close()
    return before, after, refused


@pytest.mark.parametrize("stage", [0, 3])
def test_a_state_dict_and_a_file_are_those_of_all_stages(stage: int, tmp_path: Path) -> None:
    expected = TiedModel().state_dict()
    ranks = run_distributed(whole_model, 2, stage, str(tmp_path))
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(expected)
    stored = Stored(LocalStorage(str(tmp_path)), "t")
    assert stored.aliases == {"head.weight": "embedding.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value)
    for before, after, (unknown, missing, on_one) in ranks:
        assert set(before) == set(after) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(before[name], value)
            torch.testing.assert_close(after[name], 2 * value)
        assert 'Unexpected key(s) in state_dict: "other"' in unknown
        assert "Missing key(s)" in missing
        assert 'Missing key(s) in state_dict: "norm.weight"' in on_one


def entries_of_stages(extra: object) -> dict[str, Any]:
    """What the first stage finds of another's entry, and where tensors are."""
    model = TiedModel()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "pipeline": {"stages": 2},
    }
    engine, *_ = drivetrain.initialize(model=model, config=config)
    job = engine.job
    own = {"both": torch.full((2,), float(job.rank)), f"of {job.rank}": torch.ones(1)}
    if job.rank == 1:
        own["extra"] = extra
    try:
        return {
            "kept": of_all_ranks(job, engine.module, own),
            "left": list(of_all_ranks(job, engine.module, own, keep=False)),
            "own": list(own),
        }
    except TrainingError as error:
        return {"error": str(error)}
    finally:
        engine.destroy()
        job.close()


@pytest.mark.long
def test_entries_that_are_no_tensors_are_carried_or_refused_by_name() -> None:
    for found in run_distributed(entries_of_stages, 2, {"steps": [1, 2.5, "three"]}):
        assert found["kept"]["extra"] == {"steps": [1, 2.5, "three"]}
        assert found["kept"]["both"].tolist()[0] in (0.0, 1.0)
        assert set(found["kept"]) == {"both", "of 0", "of 1", "extra"}
        assert set(found["own"]) <= set(found["left"]) <= {*found["own"], "extra"}
    for found in run_distributed(entries_of_stages, 2, {1, 2}):
        assert "extra of rank 1 along pp (set) is neither a tensor nor plain data" in found["error"]
