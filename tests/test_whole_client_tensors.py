"""Client's tensors are whole on demand, of whatever parts on however many axes they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import drivetrain_zero
import pytest
import torch
from safetensors.torch import load_file
from several_axes import data, make
from toy_tensor_parallel import Model

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
RATE = 0.1

Named = dict[str, torch.Tensor]


def other() -> Named:
    """Values that the model does not start from."""
    torch.manual_seed(5)
    return {name: torch.randn_like(p) for name, p in Model().double().named_parameters()}


def start() -> Named:
    return {name: p.detach().clone() for name, p in Model().double().named_parameters()}


def shown(engine: Engine) -> Named:
    with drivetrain.whole(engine.module):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def equal(found: Named, expected: Named) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=1e-12)


def one_step(engine: Engine) -> None:
    engine.backward(engine(*data(0, engine.job.mesh.coordinate("dp"))))
    engine.step()


def after_one_step(values: Named, shards: int) -> Named:
    model = Model().double()
    model.load_state_dict(values)
    torch.stack([model(*data(0, shard)) for shard in range(shards)]).mean().backward()
    return {name: p.detach() - RATE * p.grad for name, p in model.named_parameters()}


# -- functions that run on every rank --------------------------------------------------------------


def read_and_write(stage: int, writers: tuple[int, ...], write_rank: int) -> None:
    engine = make(stage, 2)
    shapes = [p.shape for p in engine.module.parameters()]
    equal(shown(engine), start())
    values = other()
    with drivetrain.whole(engine.module, write_rank=write_rank), torch.no_grad():
        if Ranks.current().rank in writers:
            for name, parameter in engine.module.named_parameters():
                parameter.copy_(values[name])
    assert [p.shape for p in engine.module.parameters()] == shapes
    equal(shown(engine), values)
    one_step(engine)
    equal(shown(engine), after_one_step(values, engine.job.mesh.size("dp")))
    engine.destroy()


def read_inside(stage: int) -> None:
    """Blocks inside blocks, and changes that would be lost."""
    engine = make(stage, 2)
    block = engine.module.blocks[0]
    with drivetrain.whole(block.up.weight), drivetrain.whole([block.up.weight, block.down.weight]):
        assert block.up.weight.shape == (5, 4)
        with drivetrain.whole(block.up.bias):
            assert block.up.bias.shape == (5,)
        with (
            pytest.raises(TrainingError, match="inside a block that gathers it already"),
            drivetrain.whole(block.up.weight, write_rank=0),
        ):
            pass
    assert block.up.weight.shape == (3 - Ranks.current().rank, 4)
    name = "parameter blocks.0.up.weight was changed"
    with (
        pytest.raises(TrainingError, match=f"{name} inside a block that gathers it for reading"),
        drivetrain.whole(block.up.weight),
        torch.no_grad(),
    ):
        block.up.weight += 1
    equal(shown(engine), start())
    one_step(engine)
    equal(shown(engine), after_one_step(start(), 1))
    engine.destroy()


def state_dicts(stage: int, folder: str) -> None:
    engine = make(stage, 2, zero={"stage3_gather_16bit_weights_on_model_save": True})
    equal(engine.module_state_dict(), start())
    engine.load_module_state_dict(other())
    equal(engine.module_state_dict(), other())
    engine.save_16bit_model(folder)
    if engine.job.rank == 0:
        equal(load_file(Path(folder) / "model.safetensors"), other())
    one_step(engine)
    equal(engine.module_state_dict(), after_one_step(other(), 1))
    engine.destroy()


def single_states(stage: int) -> None:
    engine = make(stage, 2)
    engine.backward(engine(*data(0, engine.job.mesh.coordinate("dp"))))
    model = Model().double()
    torch.stack([model(*data(0, shard)) for shard in (0, 1)]).mean().backward()
    for (name, mine), theirs in zip(
        engine.module.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(drivetrain_zero.safe_get_full_grad(mine), theirs.grad)
        value = other()[name] * (1 + Ranks.current().rank)  # the first rank's counts
        drivetrain_zero.safe_set_full_grad(mine, value)
        torch.testing.assert_close(drivetrain_zero.safe_get_full_grad(mine), other()[name])
    engine.step()
    for name, mine in engine.module.named_parameters():
        momentum = drivetrain_zero.safe_get_full_optimizer_state(mine, "momentum_buffer")
        torch.testing.assert_close(momentum, other()[name])
        drivetrain_zero.safe_set_full_fp32_param(mine, start()[name])
    equal(shown(engine), start())
    engine.destroy()


def other_change_on_one_rank(stage: int) -> str:
    engine = make(stage, 2)
    if Ranks.current().rank == 1:
        with torch.no_grad():
            engine.module.head.weight += 1
    with pytest.raises(TrainingError) as raised:
        one_step(engine)
    return str(raised.value)


def with_a_gap() -> str:
    engine = make(0, 2)
    last = engine.module.blocks[0].up.weight
    info = engine.job.parameters.info(last)
    assert info.placement is not None
    if engine.job.rank == 1:
        info.placement = replace(info.placement, boxes=())
    before = {p: p.data_ptr() for p in engine.module.parameters()}
    with pytest.raises(TrainingError) as raised, drivetrain.whole(engine.module):
        pass
    assert before == {p: p.data_ptr() for p in engine.module.parameters()}
    engine.destroy()
    return str(raised.value)


# -- claims ----------------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize(
    ("writers", "write_rank"),
    [
        pytest.param((0,), 0, id="one rank"),
        pytest.param((1,), 0, id="one tensor-parallel copy of the first"),
        pytest.param((2, 3), 1, id="all of the second"),
    ],
)
def test_changes_of_whole_tensors_reach_all_parts(
    stage: int, writers: tuple[int, ...], write_rank: int
) -> None:
    run_distributed(read_and_write, 4, stage, writers, write_rank)


@pytest.mark.parametrize("stage", [0, 3])
def test_blocks_inside_blocks_and_lost_changes(stage: int) -> None:
    run_distributed(read_inside, 2, stage)


@pytest.mark.parametrize("stage", [0, 3])
def test_state_dicts_and_files_have_the_names_and_shapes_of_the_client(
    stage: int, tmp_path: Path
) -> None:
    run_distributed(state_dicts, 2, stage, str(tmp_path))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_single_states_are_those_of_the_client(stage: int) -> None:
    run_distributed(single_states, 4, stage)


@pytest.mark.parametrize("stage", [0, 1])
def test_copies_that_are_changed_apart_are_refused(stage: int) -> None:
    for text in run_distributed(other_change_on_one_rank, 2, stage):
        assert "parameter head.weight was changed to different values on different ranks" in text


def test_a_tensor_of_which_no_rank_has_a_part_is_refused_by_name() -> None:
    for said in run_distributed(with_a_gap, 2):
        assert "blocks.0.up.weight cannot be used whole: only" in said
        assert "of its 20 elements" in said
