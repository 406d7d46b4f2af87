"""One pass over calibration data: the right data, one block at a time, resumed after a kill."""

from __future__ import annotations

import copy

import pytest
import torch
from drivetrain_compression import compress, compress_module, load_compressed
from drivetrain_compression.calibrated import walk as walking
from drivetrain_compression.calibrated.grids import Integers, fit_by_error, stored
from drivetrain_compression.calibrated.sources import opened
from drivetrain_compression.calibrated.walk import Walk
from drivetrain_compression.recipe.recipe import Recipe
from safetensors.torch import load_file
from test_rounding_by_error import step_by_step
from tiny_models import Chain, bert, llama, rows
from torch import nn

from drivetrain.errors import ConfigError

GPTQ = {"modifiers": [{"gptq": {"group": 16, "act_order": False, "damping": 0.01}}]}
W8A8 = {"modifiers": [{"smoothquant": {}}, {"round": {"bits": 8, "activations": "int8"}}]}


def by_hand(model, data, group):
    """GPTQ, block after block, each on what the compressed blocks before it return."""
    x = torch.cat([model.embed(ids) for ids in data]).detach()
    for block in model.layers:
        inputs = {"up": block.norm(x), "down": block.up(block.norm(x)).relu()}
        chosen = {}
        for name, seen in inputs.items():
            layer, flat = getattr(block, name), seen.detach().flatten(0, 1)
            hessian = 2 * flat.T @ flat / len(flat)
            weight, grid = layer.weight.detach(), Integers(4)
            scales = stored(fit_by_error(weight, grid, group, hessian), torch.float32)
            numbers = step_by_step(
                weight.double(), hessian.double(), grid, scales, range(weight.shape[1]), 0.01
            )
            chosen[layer] = numbers * scales.spread(weight.shape[1])[0]
        for layer, weight in chosen.items():
            layer.weight.data.copy_(weight)
        x = block(x).detach()


def test_every_block_sees_what_compressed_blocks_return():
    model, data = Chain(), rows(20)
    wanted = copy.deepcopy(model)
    by_hand(wanted, data, 16)
    found = compress_module(model, GPTQ, data)
    assert set(found) == {"layers.0", "layers.1", "layers.2", ""}
    close = total = 0
    for name, weight in wanted.named_parameters():
        mine = model.get_parameter(name)
        step = (mine - weight).abs()
        close += int((step < 1e-4).sum())
        total += step.numel()
    assert close / total > 0.995  # float32 and float64 round a few ties otherwise
    ids = data[0]
    torch.testing.assert_close(model(ids), wanted(ids), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", ["compressed-tensors", "drivetrain", "plain"])
def test_a_folder_gives_what_the_module_in_memory_does(tmp_path, layout):
    if layout == "compressed-tensors":
        pytest.importorskip(
            "compressed_tensors", reason="the package compressed-tensors is missing"
        )
    model, data = llama(), rows()
    model.save_pretrained(tmp_path / "model")
    compress(
        tmp_path / "model",
        W8A8 if layout != "plain" else GPTQ,
        data,
        tmp_path / "out",
        format=layout,
    )
    compress_module(model, W8A8 if layout != "plain" else GPTQ, data)
    loaded = load_compressed(tmp_path / "out")
    with torch.no_grad():
        found, wanted = (m(input_ids=data[0]).logits for m in (loaded, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_only_one_block_is_in_memory(tmp_path, monkeypatch):
    model = llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    seen = []
    forward = walking._Stage.forward

    def counting(stage, block, number, index):
        root = stage._walk.source.module
        there = {
            n.split(".")[2] for n, p in root.named_parameters() if "layers" in n and not p.is_meta
        }
        rest = [n for n, p in root.named_parameters() if "layers" not in n and not p.is_meta]
        seen.append((number, there, rest))
        return forward(stage, block, number, index)

    monkeypatch.setattr(walking._Stage, "forward", counting)
    compress(tmp_path / "model", GPTQ, rows(), tmp_path / "out", format="drivetrain")
    assert {number for number, _, _ in seen} == {0, 1, 2}
    assert all(there == {str(number)} and not rest for number, there, rest in seen)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 8, 12, 15])
def test_a_killed_job_goes_on_and_ends_with_the_same_files(tmp_path, at):
    llama().save_pretrained(tmp_path / "model")
    data = rows()
    compress(tmp_path / "model", GPTQ, data, tmp_path / "whole", format="drivetrain")
    blocks = []

    def dying(what, done, total):
        blocks.append(what)
        if len(blocks) == at:
            raise Killed

    with pytest.raises(Killed):
        compress(
            tmp_path / "model", GPTQ, data, tmp_path / "out", format="drivetrain", report=dying
        )
    assert not (tmp_path / "out").exists()
    again = []
    compress(
        tmp_path / "model", GPTQ, data, tmp_path / "out", format="drivetrain",
        report=lambda what, done, total: again.append(what),
    )  # fmt: skip
    finished = {b.split()[0] for b in blocks} - {blocks[-1].split()[0], "the"}
    assert not any(each.startswith(tuple(finished)) for each in again if finished)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        one, two = load_file(file), load_file(tmp_path / "out" / file.name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out.partial").exists()


def test_another_job_does_not_go_on_with_what_is_there(tmp_path):
    llama().save_pretrained(tmp_path / "model")

    def dying(what, done, total):
        raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "model", GPTQ, rows(), tmp_path / "out", report=dying)
    with pytest.raises(ConfigError, match="another job"):
        compress(tmp_path / "model", W8A8, rows(), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        compress(tmp_path / "model", GPTQ, rows(), tmp_path / "there")


@pytest.mark.parametrize("from_folder", [True, False])
def test_other_weights_do_not_go_on_with_what_is_there(tmp_path, from_folder):
    """Of the same class, in the same folder."""

    def model(seed):
        found = llama()
        torch.nn.init.normal_(found.model.layers[1].mlp.up_proj.weight, 0, 0.1 * seed)
        if not from_folder:
            return found
        found.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def dying(what, done, total):
        raise Killed

    with pytest.raises(Killed):
        compress(model(1), GPTQ, rows(), tmp_path / "out", report=dying)
    with pytest.raises(ConfigError, match="another job"):
        compress(model(2), GPTQ, rows(), tmp_path / "out")


def test_padding_does_not_count():
    ids = torch.cat(rows(4))
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 8, dtype=torch.int64)], 1)
    models = [bert(), bert()]
    compress_module(models[0], GPTQ, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    compress_module(models[1], GPTQ, [{"input_ids": padded, "attention_mask": mask}])
    first, second = (m.encoder.layer[0].attention.self.query.weight for m in models)
    torch.testing.assert_close(first, second)


def test_a_module_without_blocks_is_one_block():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    before = model(x)
    found = compress_module(
        model, {"modifiers": [{"gptq": {"bits": 6}}]}, [{"input": part} for part in x.split(16)]
    )
    assert set(found[""].rounded) == {"0", "2"}
    assert (model(x) - before).norm() < 0.05 * before.norm()


def nan():
    model = Chain()
    model.layers[1].up.weight.data[3, 2] = float("nan")
    return model


class Crossed(Chain):
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) * 2
        return self.head(x)


class Unused(Chain):
    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.extra = nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("model", "recipe", "data", "message"),
    [
        (Chain, GPTQ, [], "needs calibration data"),
        (nan, GPTQ, rows(), "layers.1.up has NaN"),
        (Crossed, GPTQ, rows(), "layers.1 does not take what layers.0 returns"),
        (Unused, GPTQ, rows(), "no token .* layers.0.extra"),
        (Chain, {"modifiers": [{"gptq": {"modules": ["head"]}}]}, rows(), "outside of all blocks"),
        (Chain, {"modifiers": [{"gptq": {"modules": ["conv"]}}]}, rows(), "'conv' is found"),
        (Chain, {"modifiers": [{"gptq": {}}, {"hqq": {}}]}, rows(), "both decide"),
        (Chain, {"modifiers": [{"gptq": {"bits": 1}}]}, rows(), "bits"),
        (Chain, {"modifiers": [{"wanda": {"pattern": "3:5"}}]}, rows(), "5 neighbours do not"),
        (Chain, GPTQ, ["text"], "calibration batch 0 is a str"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(model, recipe, data, message):
    with pytest.raises(ConfigError, match=message):
        compress_module(model(), recipe, data)


def test_weights_without_a_place_in_the_layout_leave_nothing(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"round": {"group": 24}}]}
    with pytest.raises(ConfigError, match="groups of 24 do not divide its 32 inputs"):
        compress(tmp_path / "model", recipe, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def dead(model):
    model.model.embed_tokens.weight.data.zero_()


def broken(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")


@pytest.mark.parametrize(
    ("damage", "recipe", "message"),
    [
        (broken, GPTQ, r"gptq.*: the weight of model\.layers\.1\.mlp\.up_proj has NaN"),
        (dead, GPTQ, r"gptq.*model\.layers\.0\.self_attn\.q_proj: the Hessian is 0"),
        (None, {"modifiers": [{"wanda": {"pattern": "1.0"}}]}, "share of weights between 0 and 1"),
        (None, {"modifiers": [{"sparsegpt": {"pattern": "0:4"}}]}, "N:M with 0 < N < M"),
        (None, {"modifiers": [{"gptq": {"modules": ["mlq"]}}]}, "'mlq' is found"),
    ],
)
def test_a_job_that_is_refused_leaves_nothing(tmp_path, damage, recipe, message):
    model = llama()
    if damage:
        damage(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        compress(tmp_path / "model", recipe, rows(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"), opened(tmp_path):
        pass
    model = llama()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(Exception, match="safetensors"), opened(tmp_path / "model"):
        pass


def test_a_walk_needs_modifiers_for_after_training(tmp_path, monkeypatch):
    from drivetrain_compression import Modifier, ModifierConfig, Place
    from drivetrain_compression.recipe import recipe

    class Learnt(Modifier):
        config_class, place = ModifierConfig, Place.PRUNE

    monkeypatch.setattr(recipe, "modifier_classes", lambda: {"learnt": Learnt})
    made = Recipe.read({"modifiers": [{"learnt": {}}]})
    with pytest.raises(ConfigError, match="in training only"), opened(Chain()) as source:
        Walk(source, made, [], tmp_path, lambda number, found: None).run()


def test_data_that_no_method_looks_at_does_not_pass():
    said = []
    recipe = {"modifiers": [{"round": {"bits": 4}}]}
    model, other = Chain(), Chain()
    compress_module(model, recipe, rows(), report=lambda what, done, total: said.append(what))
    compress_module(other, recipe)
    assert said == []
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
