"""``zero.Init``: models that are constructed straight into shards."""

from __future__ import annotations

import copy
import gc
import os

import pytest
import torch
import torch.distributed as dist
from drivetrain_zero import Init
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.whole import whole
from drivetrain.testing import data, models, run_distributed
from drivetrain.testing.reference import Case, assert_trains_like_reference

ADAM = {"type": "AdamW", "params": {"lr": 3e-3}}
STAGE_3 = {
    "train_batch_size": 8,
    "optimizer": ADAM,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Initialised(nn.Module):
    """Initialises its parts after they were constructed, in all the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.linspace(0, 1, 7))
        self.norm = nn.LayerNorm(6)
        nn.init.kaiming_uniform_(self.layers[0].weight)
        with torch.no_grad():
            self.layers[1].bias.copy_(torch.arange(6.0))
            self.layers[1].weight.mul_(self.layers[0].weight)
        self.layers[2].weight.data.normal_(std=0.02)
        rows = self.layers[2].weight.data
        rows[2].zero_()
        rows[:, 1] += self.norm.weight.data * 2
        self.tokens.weight.data[self.tokens.padding_idx].fill_(0.5)
        self.apply(self._scale_biases)

    def _scale_biases(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.bias.data.mul_(1.5)


def built(kind: type[nn.Module] = Initialised) -> nn.Module:
    torch.manual_seed(5)
    return kind()


def assert_equal_whole(module: nn.Module, expected: nn.Module) -> None:
    with whole(module):
        names = [name for name, _ in module.named_parameters()]
        assert names == [name for name, _ in expected.named_parameters()]
        for (name, mine), theirs in zip(
            module.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), name


def local_elements(module: nn.Module) -> int:
    """Elements that this rank has memory for."""
    with torch._C.DisableTorchFunction():  # asking for storage touches parameters
        return sum(p.untyped_storage().nbytes() // p.element_size() for p in module.parameters())


def check_values() -> list[int]:
    rank = int(os.environ["RANK"])
    expected = built()
    with Init():
        torch.manual_seed(5)
        if rank:
            torch.manual_seed(99 + rank)  # the first rank decides
        module = Initialised()
        inside = local_elements(module)
    assert_equal_whole(module, expected)
    return [inside, local_elements(module)]


def test_parameters_have_the_values_of_the_plain_constructor_on_the_first_rank() -> None:
    sizes = run_distributed(check_values, 3)
    for inside, after in sizes:
        assert after == 10  # what is shown of ten parameters: one number each
        assert inside < 10 + 80  # besides what was touched last


def test_one_rank_keeps_its_model_as_it_is() -> None:
    run_distributed(check_one_rank, 1)


def check_one_rank() -> None:
    with Init():
        module = built()
    assert_equal_whole(module, built())
    assert not torch.isnan(module.scale).any()


def check_released_shape() -> None:
    with Init():
        module = built()
    assert module.tokens.weight.shape == (11, 6)
    assert module.tokens.weight.isnan().all()
    with pytest.raises(RuntimeError):
        module.tokens.weight.data.normal_()
    with pytest.raises(TrainingError, match=r"layers.0.weight is sharded"):
        module.layers.state_dict(prefix="layers.")["layers.0.weight"].clone()
    with whole(module):
        assert module.state_dict()["scale"].equal(torch.linspace(0, 1, 7))


def test_released_parameters_keep_their_shape_and_refuse_to_be_used() -> None:
    run_distributed(check_released_shape, 2)


def construct_and_fail(made: list[nn.Module]) -> None:
    with Init():
        made.append(nn.Linear(2, 2))
        raise KeyError("planted")


def check_constructors_are_restored() -> None:
    before = {cls: cls.__init__ for cls in (nn.Linear, nn.LayerNorm, Initialised)}
    with pytest.raises(KeyError):
        construct_and_fail([])
    with Init():
        with Init(enabled=False), Init():

            class Late(nn.Linear):
                def __init__(self) -> None:
                    super().__init__(4, 4)

            late = Late()
        middle = nn.Linear(3, 3)
    assert late.weight.isnan().all()
    assert middle.weight.isnan().all()
    assert {cls: cls.__init__ for cls in before} == before
    assert "__init_subclass__" not in vars(nn.Module)
    assert not nn.Linear(3, 3).weight.isnan().any()
    assert not Late().weight.isnan().any()


def test_constructors_are_restored_after_nested_contexts_and_errors() -> None:
    run_distributed(check_constructors_are_restored, 2)


def check_no_groups_are_left() -> None:
    with Init(config_dict_or_path=STAGE_3):
        module = built()
    assert dist.is_initialized()
    del module
    assert not dist.is_initialized()

    kept: list[nn.Module] = []
    with pytest.raises(KeyError):
        construct_and_fail(kept)
    assert kept
    assert not dist.is_initialized()

    with Init():
        model = models.tiny_gpt()
    engine, *_ = drivetrain.initialize(model=model, config=STAGE_3)
    engine.destroy()
    gc.collect()
    assert not dist.is_initialized()


def test_no_process_group_is_left_behind() -> None:
    run_distributed(check_no_groups_are_left, 2)


def check_given_group() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank)
    with Init(data_parallel_group=groups[rank // 2]):
        layer = nn.Linear(5, 3)
    torch.manual_seed(rank // 2 * 2)
    expected = nn.Linear(5, 3)
    assert_equal_whole(layer, expected)

    class Mpu:
        def get_data_parallel_group(self) -> dist.ProcessGroup:
            return groups[rank // 2]

    torch.manual_seed(rank)
    with Init(mpu=Mpu()):
        layer = nn.Linear(5, 3)
    assert_equal_whole(layer, expected)
    with pytest.raises(ConfigError, match="more than once"):
        Init(mpu=Mpu(), data_parallel_group=groups[0])


def test_a_given_group_shares_the_shards() -> None:
    run_distributed(check_given_group, 4)


def sharded_gpt() -> nn.Module:
    torch.manual_seed(2)
    with Init():
        return models.TinyGPT()


def sharded_tied_gpt() -> nn.Module:
    torch.manual_seed(3)
    with Init():
        return models.TinyGPT(tied=True)


def gpt_from_meta() -> nn.Module:
    torch.manual_seed(2)
    with torch.device("meta"):
        module = models.TinyGPT()
    Init(module=module)
    return module


@pytest.mark.parametrize(
    ("model", "stage", "ranks"),
    [
        (sharded_gpt, 3, 1),
        (sharded_gpt, 3, 3),
        (sharded_gpt, 2, 2),
        (sharded_gpt, 0, 2),
        (sharded_tied_gpt, 3, 2),
        (gpt_from_meta, 3, 2),
    ],
)
def test_a_model_constructed_in_shards_trains_like_plain_torch(model, stage, ranks) -> None:
    config = {
        **STAGE_3,
        "train_batch_size": 6 if ranks == 3 else 4,
        "zero_optimization": {"stage": stage},
    }
    assert_trains_like_reference(config, ranks, model=Case(model, data.tokens), steps=4, rtol=1e-5)


def check_meta() -> None:
    with torch.device("meta"):
        module = models.tied_gpt()
    with Init(), torch.device("meta"):
        stays = nn.Linear(3, 4)
    assert stays.weight.is_meta
    Init(module=module)
    assert module.head.weight is module.tokens.weight

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(ConfigError, match=r"layer.weight is on the meta device, and layer \(Bare"):
        Init(module=nn.ModuleDict({"layer": Bare()}))
    bare = Bare()
    Init(module=bare, initialize=lambda name, tensor, generator: tensor.fill_(7.0))
    with whole(bare):
        assert bare.weight.tolist() == [7.0] * 3


def test_meta_modules_are_made_one_by_one() -> None:
    run_distributed(check_meta, 2)


def check_existing_module() -> None:
    torch.manual_seed(int(os.environ["RANK"]))
    module = Initialised()
    Init(module=module, dtype=torch.bfloat16, remote_device="nvme")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    torch.manual_seed(0)
    assert_equal_whole(module, Initialised().bfloat16())
    Init(module=nn.Linear(2, 2), config={"zero_optimization": {"stage": 2}})


def test_an_existing_module_is_cut_in_the_dtype_that_was_asked_for() -> None:
    run_distributed(check_existing_module, 2)


def check_resize() -> None:
    with Init():
        module = models.tied_gpt()
    old = module.tokens
    with whole(old, write_rank=0):
        values = old.weight.data
        old.weight.data = torch.cat(
            [values, torch.full((6, values.shape[1]), float(dist.get_rank()))]
        )
    assert old.weight.shape == (70, 32)
    expected = models.tied_gpt().tokens.weight
    with whole(old):
        assert torch.equal(old.weight[:64], expected)
        assert torch.equal(old.weight[64:], torch.zeros(6, 32))
    bigger = nn.Embedding(80, 32)  # outside of the context, as model libraries do it
    with whole(old), torch.no_grad():
        bigger.weight[:70] = old.weight
    module.tokens, module.head.weight = bigger, bigger.weight
    engine, *_ = drivetrain.initialize(model=module, config=STAGE_3)
    inputs, targets = data.tokens(4)
    loss = engine(inputs, targets)
    engine.backward(loss)
    engine.step()
    assert torch.isfinite(loss)


def test_embeddings_are_resized_before_the_engine_exists() -> None:
    run_distributed(check_resize, 2)


def change(parameter: nn.Parameter, ranks: set[int], write_rank: int | None) -> None:
    with whole([parameter], write_rank=write_rank):
        if dist.get_rank() in ranks:
            parameter.data.zero_()


def check_wrong_writes() -> None:
    with Init():
        layer = nn.Linear(4, 4)
    with pytest.raises(TrainingError, match=r"Linear.weight was changed inside a block"):
        change(layer.weight, {0, 1}, None)
    with pytest.raises(TrainingError, match=r"changed on rank 1, but modifier_rank \(write_rank\)"):
        change(layer.bias, {1}, 0)


def test_changes_that_would_be_lost_are_errors() -> None:
    run_distributed(check_wrong_writes, 2)


def check_auto() -> None:
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
    }
    with Init(config_dict_or_path=auto):
        module = models.tiny_gpt()
    drivetrain.initialize(model=module, config=STAGE_3 | {"bf16": {"enabled": True}})


def test_auto_values_may_be_filled_in_later() -> None:
    run_distributed(check_auto, 2)


def check_disagreement(ours: dict, theirs: dict, message: str) -> None:
    with Init(config_dict_or_path=theirs):
        module = models.tiny_gpt()
    with pytest.raises(ConfigError, match=message):
        drivetrain.initialize(model=module, config=ours)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            {**STAGE_3, "zero_optimization": {"stage": 2}},
            STAGE_3,
            r"zero_optimization.stage is 2 in the engine's config, but 3 in that of zero.Init",
        ),
        (STAGE_3, STAGE_3 | {"bf16": {"enabled": True}}, r"bf16.enabled is None"),
    ],
)
def test_layouts_that_disagree_are_refused_with_both_sources(ours, theirs, message) -> None:
    run_distributed(check_disagreement, 2, ours, theirs, message)


def check_arguments() -> None:
    with pytest.raises(ConfigError, match="both given"):
        Init(config=STAGE_3, config_dict_or_path=STAGE_3)
    with pytest.raises(ConfigError, match=r"zero_optimization.stage"):
        Init(config={"zero_optimization": {"stage": 7}})


def test_wrong_arguments_are_refused() -> None:
    check_arguments()


def check_replaced() -> None:
    with Init():
        layer = nn.Linear(3, 3)
        layer.weight.data.zero_()
        layer.weight = nn.Parameter(torch.ones(3, 3))  # the one just touched is gone
        nn.Linear(2, 2)
    assert layer.weight.isnan().all()
    with whole(layer):
        assert torch.equal(layer.weight, torch.ones(3, 3))


def test_parameters_may_be_replaced_inside_the_context() -> None:
    run_distributed(check_replaced, 2)


def check_copies() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with Init():
        torch.manual_seed(1)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    torch.manual_seed(1)
    expected = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    assert_equal_whole(encoder, expected)
    assert all(p.isnan().all() for p in encoder.parameters())
    copy.deepcopy(layer)


def test_copies_of_modules_are_cut_too() -> None:
    run_distributed(check_copies, 2)


class Filled(nn.Module):
    """Fills the parameters of its parts, which are cut by then, in its own constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        for number, part in enumerate(self.parts):
            with whole(part.weight, write_rank=0), torch.no_grad():
                part.weight[:1].fill_(number)
                part.weight[1:].fill_(number + 0.5)
        with whole(self.parts):
            self.sums = [part.weight.sum().item() for part in self.parts]


def filled_on_a_rank() -> None:
    with Init():
        module = Filled()
    assert module.sums == [1.5, 7.5]
    with whole(module):
        for number, part in enumerate(module.parts):
            expected = torch.tensor([[number] * 3, [number + 0.5] * 3])
            assert torch.equal(part.weight, expected)


def test_a_constructor_may_fill_what_it_gathers() -> None:
    run_distributed(filled_on_a_rank, 2)
