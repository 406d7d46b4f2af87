"""What scripts call at stage 3: gathering, external parameters, generation, leaves, export."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from unittest.mock import patch

import drivetrain_zero as zero
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from drivetrain_zero.scripts import export
from safetensors.torch import load_file, save_file
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import data, models, run_distributed
from drivetrain.testing.reference import Case, assert_trains_like_reference

CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def engine_of(module: nn.Module, **zero_keys: object) -> Engine:
    section = {**CONFIG["zero_optimization"], **zero_keys}
    return drivetrain.initialize(model=module, config=CONFIG | {"zero_optimization": section})[0]


class Inner(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.returns = returns

    def forward(self, x: torch.Tensor) -> object:
        y = torch.tanh(self.norm(self.linear(x)))
        if self.returns == "parameter":
            return y, self.linear.bias
        return (y, self.linear.weight.t()[2:5]) if self.returns == "view" else y


class Outside(nn.Module):
    """Uses parameters of its blocks outside of their forward, before and after it."""

    def __init__(self, returns: str = "", keep: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner(returns) for _ in range(3))
        self.kept = [self.blocks[1].linear.weight] if keep else None
        self.returns = returns
        if keep:
            zero.register_external_parameter(self, self.blocks[1].linear.weight)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.linear(inputs, self.blocks[2].linear.weight, self.blocks[2].linear.bias)
        for block in self.blocks:
            x = block(x)
            if self.returns:
                x, own = x
                x = x + own.sum(0) * own.mean()
        weight = self.kept[0] if self.kept else self.blocks[0].linear.weight
        return F.mse_loss(F.linear(x, weight), targets)


def outside() -> nn.Module:
    torch.manual_seed(1)
    return Outside()


def returning_parameters() -> nn.Module:
    torch.manual_seed(1)
    return Outside("parameter")


def returning_views() -> nn.Module:
    torch.manual_seed(1)
    return Outside("view")


def keeping() -> nn.Module:
    torch.manual_seed(1)
    return Outside(keep=True)


@pytest.mark.parametrize("model", [outside, returning_parameters, returning_views, keeping])
def test_parameters_used_outside_of_their_block_train_like_plain_torch(model) -> None:
    case = Case(model, data.vectors)
    assert_trains_like_reference(CONFIG, 2, model=case, steps=4, rtol=1e-5)


def check_not_registered() -> None:
    module = keeping()
    weight = module.kept[0]
    zero.unregister_external_parameter(module, weight)
    with pytest.raises(TrainingError, match="is not registered with this Outside"):
        zero.unregister_external_parameter(module, weight)
    with pytest.raises(TrainingError, match="got Outside and Tensor"):
        zero.register_external_parameter(module, torch.ones(1))
    engine = engine_of(module)
    loss = engine(*data.vectors(2))
    assert loss.isnan()  # nothing but NaN can come of it
    with zero.GatheredParameters(weight, fwd_module=module):
        pass
    assert engine(*data.vectors(2)).isfinite()


def test_a_parameter_kept_in_a_list_needs_to_be_registered() -> None:
    run_distributed(check_not_registered, 2)


def check_outside_forward() -> None:
    engine = engine_of(outside())
    block = engine.module.blocks[0]
    assert block.linear.weight.shape == (8, 8)
    assert block.linear.weight.isnan().all()  # looking at it is no collective
    with torch.no_grad():
        loss = engine(*data.vectors(2))
    assert loss.isfinite()
    assert all(p.isnan().all() for p in engine.module.parameters())  # all released again
    names = [name for name, _ in engine.module.named_parameters()]
    assert names == [name for name, _ in outside().named_parameters()]
    engine.destroy()
    assert type(vars(block.linear)["_parameters"]) is dict


def test_looking_at_released_parameters_gathers_nothing() -> None:
    run_distributed(check_outside_forward, 2)


def check_gathered() -> None:
    engine, plain = engine_of(models.tiny_gpt()), models.tiny_gpt()
    head, rank = engine.module.head.weight, dist.get_rank()
    with zero.GatheredParameters([head, nn.Parameter(torch.ones(2))]):
        assert torch.equal(head, plain.head.weight)
    with zero.GatheredParameters(head, enabled=False):
        assert head.isnan().all()
    with zero.GatheredParameters(engine.module.blocks, modifier_rank=1), torch.no_grad():
        for parameter in engine.module.blocks.parameters():
            parameter.fill_(rank + 1.0)
    with zero.GatheredParameters(engine.module.parameters()):
        assert all(bool((p == 2).all()) for p in engine.module.blocks.parameters())
    context = zero.GatheredParameters(head)
    context.__enter__()
    with torch.no_grad():
        head.zero_()
    with pytest.raises(TrainingError, match=r"head.weight was changed inside a block that gathers"):
        context.__exit__(None, None, None)
    with zero.GatheredParameters(head):
        assert torch.equal(head, plain.head.weight)
        with pytest.raises(TrainingError, match="inside a block that gathers it already"):
            zero.GatheredParameters(head, modifier_rank=0).__enter__()


def test_gathered_parameters_keep_the_changes_of_one_rank() -> None:
    run_distributed(check_gathered, 2)


def check_generation() -> list[int]:
    engine = engine_of(models.tiny_gpt())
    plain = models.tiny_gpt()
    inputs, targets = data.tokens(2)
    expected = plain(inputs, targets)
    with zero.unwrap_model_for_generation(engine) as module, torch.no_grad():
        for _ in range(1 + 2 * dist.get_rank()):  # ranks need not run equally often
            assert torch.allclose(module(inputs, targets), expected)
    loss = engine(inputs, targets)
    engine.backward(loss)
    engine.step()
    return [int(p.isnan().all()) for p in engine.module.parameters()]


def test_generation_may_differ_between_ranks() -> None:
    assert all(all(released) for released in run_distributed(check_generation, 2))


def check_arrays() -> None:
    engine = engine_of(models.tiny_gpt())
    weight = engine.module.blocks[0].up.weight
    plain = models.tiny_gpt().blocks[0].up.weight.detach()
    with drivetrain.whole(weight):  # one parameter need not be in a list
        kept = weight.detach().numpy()  # torch gives memory with an array on it no new size
    with drivetrain.whole(engine.module):
        assert torch.equal(weight, plain)
    assert torch.equal(torch.from_numpy(kept), plain)
    engine.job.close()


def test_an_array_of_a_gathered_parameter_may_be_kept() -> None:
    run_distributed(check_arrays, 2)


def check_state_dict() -> None:
    engine = engine_of(models.tiny_gpt())
    expected = models.tiny_gpt().state_dict()
    elsewhere = engine.module.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in elsewhere.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    name = "blocks.0.attention_norm.weight"
    value, found = elsewhere[name], torch.zeros_like(expected[name])
    uses = (
        lambda: value + 1,
        value.clone,
        value.untyped_storage,
        value.numpy,
        value.tolist,
        lambda: found.copy_(value),
        lambda: copy.deepcopy({name: value}),
        lambda: torch.save({name: value}, io.BytesIO()),
        lambda: save_file({name: value}, "/dev/null"),
    )
    for use in uses:
        with pytest.raises(TrainingError, match=rf"parameter {name} is sharded"):
            use()
    assert not found.any()
    assert name in repr(value)
    state = engine.module_state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    with zero.GatheredParameters(engine.module):
        assert torch.equal(engine.module.state_dict()["head.weight"], expected["head.weight"])


def test_state_dict_of_released_parameters_has_their_shapes_and_refuses_values() -> None:
    run_distributed(check_state_dict, 2)


class Tagged(models.TinyGPT):
    """With buffers and frozen parameters."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.norm.requires_grad_(False)
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def tagged() -> nn.Module:
    torch.manual_seed(1)
    return Tagged()


def check_export(folder: str, stage: int) -> int:
    """Largest number of elements that was whole when any parameter was read."""
    engine = engine_of(tagged(), stage=stage, stage3_gather_16bit_weights_on_model_save=True)
    read, counts = export._Held.read, []

    def counting(self, unit, parameter):
        values = read(self, unit, parameter)
        counts.append(sum(p.numel() for p in engine.module.parameters() if not p.isnan().all()))
        return values

    with patch.object(export._Held, "read", counting):
        assert engine.save_16bit_model(folder)  # as scripts for DeepSpeed call it
    zero.save_16bit_model(engine, folder, "trained.safetensors", exclude_frozen_parameters=True)
    return max(counts)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_16_bit_model_loads_strictly_and_is_never_whole(stage, tmp_path: Path) -> None:
    expected = tagged()
    largest = run_distributed(check_export, 2, str(tmp_path), stage)
    if stage == 3:
        assert max(largest) < 0.6 * sum(p.numel() for p in expected.parameters())
    loaded = load_file(tmp_path / "model.safetensors")
    fresh = models.TinyGPT(tied=True)
    fresh.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
    fresh.load_state_dict(loaded, strict=True)
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded[key], value), key
    names = set(load_file(tmp_path / "trained.safetensors"))
    assert names == set(loaded) - {"norm.weight", "norm.bias"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"model.safetensors", "trained.safetensors"}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_tells_its_stage(stage: int) -> None:
    engine = engine_of(models.MLP(), stage=stage)
    assert engine.zero_optimization_stage() == stage
    engine.destroy()


def test_a_compiled_model_is_written_under_its_own_names(tmp_path: Path) -> None:
    engine = engine_of(torch.compile(tagged(), backend="eager"), stage=2)
    engine.save_16bit_model(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tagged().state_dict())
    engine.destroy()


def check_forbidden(folder: str) -> None:
    engine = engine_of(models.tiny_gpt())
    with pytest.raises(
        ConfigError, match="stage3_gather_16bit_weights_on_model_save: must be true"
    ):
        zero.save_16bit_model(engine, folder)


def test_gathering_for_the_16_bit_model_must_be_allowed(tmp_path: Path) -> None:
    run_distributed(check_forbidden, 2, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_leaf_modules_are_found_marked_and_unmarked() -> None:
    model = models.tiny_gpt()
    assert zero.set_z3_leaf_modules(model, [models.Block]) == list(model.blocks)
    assert zero.get_z3_leaf_modules(model) == list(model.blocks)
    assert zero.z3_leaf_module(model.blocks[0])
    assert zero.z3_leaf_parameter(model, model.blocks[1].up.weight)
    assert not zero.z3_leaf_parameter(model, model.head.weight)
    assert zero.unset_z3_leaf_modules(model, ["Block"]) == list(model.blocks)
    assert zero.get_z3_leaf_modules(model) == []
    assert zero.set_z3_leaf_modules_by_name(model, ["norm", "x"]) == ([model.norm], ["x"])
    found = zero.set_z3_leaf_modules_by_suffix(model, [".up", ".x"])
    assert found == ([b.up for b in model.blocks], [".x"])
    zero.set_z3_leaf_module(model.norm, False)
    assert not zero.z3_leaf_module(model.norm)


def test_leaf_modules_that_a_config_names_are_marked() -> None:
    model = models.tiny_gpt()
    names = {"classes": ["Block"], "names": ["norm"], "name_suffixes": ["nothing"]}
    engine_of(model, leaf_module=names).destroy()
    assert set(zero.get_z3_leaf_modules(model)) == {*model.blocks, model.norm}


def test_leaf_modules_that_are_not_there_are_an_error() -> None:
    model = models.tiny_gpt()
    with pytest.raises(ConfigError, match=r"TinyGPT has no module of class \['Experts'\]"):
        zero.set_z3_leaf_modules(model, ["Experts"])
    assert zero.set_z3_leaf_modules(model, ["Experts"], raise_if_not_found=False) == []
