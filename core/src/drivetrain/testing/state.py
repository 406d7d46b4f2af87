"""What a plugin that keeps state of a job must hold to, as a class of tests."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain.contracts.plugin.plugin import Plugin
from drivetrain.plan.registry import Registry
from drivetrain.testing.distributed import run_distributed
from drivetrain.testing.reference import CASES

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

State = dict[str, Any]
"""Name -> what a rank would save; of tensors that are cut over ranks, position -> number."""


class StateConformance:
    """Inherit this in a test module for a plugin with ``save_state`` or ``state_fragments``.

    ::

        class TestMyPluginsState(StateConformance):
            plugin = MyPlugin
            config = {"my_section": {"every": 10}}

    Jobs of one, two and three ranks are trained for a few steps, saved, loaded and trained on. What
    the plugin would save tells whether it is in the same state, so it needs no other way to say so.

    Class attributes:
        plugin: the plugin's class, at the level of a module.
        config: the plugin's own part of a config that switches it on.
        rest: what else a job needs of a config.
        model: name of a case of ``drivetrain.testing.reference``.
        steps: after how many steps a job is saved; enough to change the plugin's state.
    """

    plugin: ClassVar[type[Plugin]]
    config: ClassVar[Mapping[str, Any]]
    rest: ClassVar[Mapping[str, Any]] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    model: ClassVar[str] = "mlp"
    steps: ClassVar[int] = 3

    def test_training_changes_the_state(self) -> None:
        """The other checks say nothing about state that stays as it began."""
        with tempfile.TemporaryDirectory() as folder:
            (found,) = self._run(1, folder, "save")
        assert found["fresh"] or found["saved"], (
            f"{self.plugin.__name__} saves nothing: implement save_state or state_fragments"
        )
        assert found["fresh"] != found["saved"], (
            f"{self.plugin.__name__} has the same state after {self.steps} steps as before; set "
            "`steps` and `config` so that it changes"
        )

    def test_a_load_brings_back_what_was_saved(self) -> None:
        """Right after a load in the same layout, every rank would save the same again."""
        with tempfile.TemporaryDirectory() as folder:
            saved = self._run(2, folder, "save")
            loaded = self._run(2, folder, "load")
        for rank, (before, after) in enumerate(zip(saved, loaded, strict=True)):
            _compare(before["saved"], after["loaded"], f"rank {rank} after a load")

    def test_a_resumed_job_goes_on_as_an_unbroken_one(self) -> None:
        """State that is loaded too late, or only looks right, shows after a few more steps."""
        with tempfile.TemporaryDirectory() as folder:
            unbroken = self._run(2, folder, "save")
            resumed = self._run(2, folder, "load")
        for rank, (straight, after) in enumerate(zip(unbroken, resumed, strict=True)):
            _compare(straight["end"], after["end"], f"rank {rank}, resumed and trained on")

    def test_another_number_of_ranks_has_the_shared_state(self) -> None:
        """What is not each rank's own comes back on any number of ranks."""
        with tempfile.TemporaryDirectory() as folder:
            before = _together([answer["saved"] for answer in self._run(2, folder, "save")])
            for world in (1, 3):
                answers = self._run(world, folder, "load")
                after = _together([answer["loaded"] for answer in answers])
                _compare(before, after, f"saved on 2 ranks and loaded on {world}")

    def test_a_checkpoint_without_the_state_loads(self) -> None:
        """A run may switch the plugin on when it resumes."""
        with tempfile.TemporaryDirectory() as folder:
            self._run(1, folder, "save without")
            self._run(1, folder, "load")

    def _run(self, world: int, folder: str, what: str) -> list[dict[str, State]]:
        config = {**self.rest, **({} if "without" in what else self.config)}
        plugin = None if "without" in what else self.plugin
        saves = what.startswith("save")
        arguments = (plugin, config, self.model, self.steps, folder, saves)
        return run_distributed(train_with_state, world, *arguments)


def train_with_state(
    plugin: type[Plugin] | None,
    config: Mapping[str, Any],
    model: str,
    steps: int,
    folder: str,
    saves: bool,
) -> dict[str, State]:
    """One rank: the plugin's state at the beginning, around a save or load, and at the end."""
    import drivetrain

    registry = Registry.installed()
    engine, *_ = drivetrain.initialize(
        model=CASES[model].model(),
        config=dict(config),
        registry=registry if plugin is None else registry.with_plugins(plugin),
    )
    name = "" if plugin is None else plugin.name
    found = {"fresh": state_of(engine, name)}
    if saves:
        _train(engine, model, range(steps))
        engine.save_checkpoint(folder)
        found["saved"] = state_of(engine, name)
    else:
        engine.load_checkpoint(folder)
        found["loaded"] = state_of(engine, name)
    _train(engine, model, range(steps, 2 * steps))
    found["end"] = state_of(engine, name)
    engine.destroy()
    engine.job.close()
    return found


def state_of(engine: Engine, plugin: str) -> State:
    """What this rank would save of a plugin's state, as plain data; each rank's own is marked."""
    from drivetrain.checkpoint.state import plugin_fragments, plugin_state

    writer = plugin_state(engine.job.hub, engine)
    found: State = {}
    for per_rank in (False, True):
        values: State = {**writer.data[per_rank], **writer.tensors[per_rank]}
        for key, value in values.items():
            plain = value.tolist() if isinstance(value, torch.Tensor) else value
            found[f"{key} (of this rank)" if per_rank else key] = plain
    for fragment in plugin_fragments(engine.job.hub, engine):
        numbers = torch.arange(torch.Size(fragment.global_shape).numel())
        places, flat = numbers.view(fragment.global_shape), fragment.read()
        part = found.setdefault(fragment.name, {})
        for box in fragment.boxes:
            held = box.of_storage(flat).flatten().tolist()
            part.update(zip(box.of(places).flatten().tolist(), held, strict=True))
    return {key: value for key, value in found.items() if key.startswith(f"{plugin}/")}


def _train(engine: Engine, model: str, steps: range) -> None:
    micro = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    shard, shards = engine.job.mesh.coordinate("dp"), engine.job.mesh.size("dp")
    inputs, targets = CASES[model].data(steps.stop * accumulation * shards * micro)
    for micro_step in range(steps.start * accumulation, steps.stop * accumulation):
        at = (micro_step * shards + shard) * micro
        rows = slice(at, at + micro)
        loss = engine(inputs[rows].to(engine.device), targets[rows].to(engine.device))
        engine.backward(loss)
        engine.step()


def _together(states: list[State]) -> State:
    """The state that all ranks share: parts put together, and no rank's own."""
    whole: State = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, dict) and isinstance(whole.get(key), dict):
                whole[key] = {**whole[key], **value}
            elif not key.endswith("(of this rank)"):
                whole[key] = value
    return whole


def _compare(expected: State, found: State, when: str) -> None:
    assert expected.keys() == found.keys(), f"{when}: expected {[*expected]}, found {[*found]}"
    for key, value in expected.items():
        assert _same(value, found[key]), f"{when}: {key} is {found[key]!r}, and was {value!r}"


def _same(one: Any, other: Any) -> bool:
    """Equal to the last bit; what is no number equals itself here."""
    return repr(one) == repr(other)
