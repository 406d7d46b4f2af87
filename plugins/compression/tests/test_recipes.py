"""A recipe is read, ordered and laid over a model, and every fault in it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from drivetrain_compression import CompressionUnit, Modifier, ModifierConfig, Place, Recipe
from drivetrain_compression.recipe import recipe
from torch import nn

from drivetrain.errors import ConfigError


class BitsConfig(ModifierConfig):
    bits: int = 8


class Round(Modifier[BitsConfig]):
    config_class = BitsConfig
    place = Place.QUANTISE
    claims: ClassVar[str] = "weight bits"


class Zero(Modifier[ModifierConfig]):
    config_class = ModifierConfig
    place = Place.PRUNE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 10, bias=False)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "modifier_classes", lambda: {"round": Round, "zero": Zero})


def read(*modifiers: Any) -> Recipe:
    return Recipe.read({"modifiers": list(modifiers)})


def test_modifiers_run_by_place_and_then_as_listed() -> None:
    listed = read({"round": {"modules": ["mlp"]}}, {"zero": None}, {"round": {"modules": ["head"]}})
    assert [m.label for m in listed.modifiers] == [
        "zero (modifiers[1])",
        "round (modifiers[0])",
        "round (modifiers[2])",
    ]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_recipe_in_a_file_is_the_one_in_the_dict(tmp_path: Path, suffix: str) -> None:
    data = {"modifiers": [{"round": {"bits": 3, "modules": ["a", "b"]}}]}
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(json.dumps(data) if suffix == "json" else yaml.safe_dump(data))
    (modifier,) = Recipe.read(path).modifiers
    assert modifier.config == BitsConfig(bits=3, modules=("a", "b"))


def names(units: list[CompressionUnit]) -> dict[str, list[str]]:
    return {unit.name: [target.name for target in unit.targets] for unit in units}


def test_each_modifier_gets_units_with_the_modules_that_it_works_on() -> None:
    model = Model()
    assigned = read({"zero": {"modules": ["*"], "exclude": [r"mlp\.0"]}}).assign(model)
    ((_, units),) = assigned
    inner = [f"layers.{n}" for n in range(3)]
    expected = {name: [f"{name}.attention", f"{name}.mlp.2"] for name in inner}
    assert names(units) == {**expected, "": ["head"]}
    assert units[1].module is model.layers[1]
    assert units[-1].module is model


def test_units_without_targets_are_left_out() -> None:
    ((_, units),) = read({"round": {"modules": ["head"]}}).assign(Model())
    assert names(units) == {"": ["head"]}


NO_HED = (
    r"round \(modifiers\[0\]\): no Linear of Model has a name in which 'hed' is found; there are "
    r"layers.0.attention, .* and 4 more"
)
TWO = (
    r"round \(modifiers\[0\]\) \(layers.0.mlp.0\) and round \(modifiers\[1\]\) .* both decide the "
    "weight bits of one weight"
)


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ([{"round": {"modules": ["hed"]}}], NO_HED),
        ([{"round": {"exclude": ["embed"]}}], r"exclude: no Linear .* 'embed'"),
        ([{"round": {"modules": ["("]}}], r"'\(' is no regular expression"),
        ([{"round": {"modules": ["mlp"]}}, {"round": {"modules": [r"\.0\.mlp"]}}], TWO),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_the_model_is_refused(
    modifiers: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*modifiers).assign(Model())


def test_two_recipes_for_a_tied_weight_are_refused() -> None:
    model = Model()
    model.head = nn.Linear(4, 4)
    model.head.weight = model.layers[0].attention.weight
    with pytest.raises(ConfigError, match=r"both decide the weight bits of one weight"):
        read({"round": {"modules": ["head"]}}, {"round": {"modules": ["attention"]}}).assign(model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "a recipe is an object with the key 'modifiers'"),
        ({"modifiers": []}, "a list of at least one"),
        ({"modifiers": [{"zero": {}}], "name": 1}, "recipe: unknown key 'name'"),
        ({"modifiers": ["zero"]}, r"modifiers\[0\] is \{name: config\} with one name, got 'zero'"),
        ({"modifiers": [{"rund": {}}]}, r"no modifier 'rund' is installed; did you mean 'round'\?"),
        ({"modifiers": [{"round": {"bits": "x"}}]}, r"round .*: bits: Input should"),
        ({"modifiers": [{"round": {"bit": 1}}]}, r"round \(modifiers\[0\]\): bit: Extra inputs"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.read(data)


def test_files_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no.yaml cannot be read: No such file"):
        Recipe.read(tmp_path / "no.yaml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        Recipe.read(tmp_path / "bad.json")


def test_a_modifier_does_nothing_by_itself() -> None:
    modifier = Round(BitsConfig(), "round")
    model = Model()
    before = [p.clone() for p in model.parameters()]
    modifier.begin([])
    modifier.finish([])
    assert list(modifier.describe()) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
