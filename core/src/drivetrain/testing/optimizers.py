"""What every update rule must hold to, as a class of tests."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import torch

from drivetrain.contracts.state.bucket import UpdateRule
from drivetrain.states.device_home import DeviceHome
from drivetrain.testing.rules import place
from drivetrain.testing.sharded import part_of

SHAPES = {"weight": (5, 7), "bias": (7,), "kernel": (2, 3, 4)}


class OptimizerConformance:
    """Inherit this in a test module and say how to make the rule.

    ::

        class TestMyRule(OptimizerConformance):
            def rule(self):
                return MyRule(lr=0.1, momentum=0.9)

    What the kit cannot know is the algorithm: compare some steps with it written out, in float64.

    Class attributes:
        tolerance: largest relative difference in float32 of what is computed in another order.
    """

    tolerance: ClassVar[float] = 1e-5

    def rule(self) -> UpdateRule:
        """A new rule, with hyper-parameters that are not zero."""
        raise NotImplementedError

    def test_every_group_gets_a_learning_rate(self) -> None:
        """Schedules and loops change ``lr`` of every group, so the defaults have one."""
        assert "lr" in self.rule().defaults, "defaults need a value of lr"

    def test_an_update_changes_weights_and_declared_states_only(self) -> None:
        """Padding stays 0, and nothing but what :meth:`states` declares is kept."""
        rule = self.rule()
        before = copy.deepcopy({k: v for k, v in vars(rule).items() if _is_plain(v)})
        home, flat, flatten = place(rule, _numbers(0))
        start = flat.clone()
        home.update(flatten(_numbers(1)), rule.defaults, 1.0)
        numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
        assert not torch.equal(flat, start), "the update changes no weight"
        assert torch.equal(flat[numel:], start[numel:]), "the update changes padding"
        after = {k: v for k, v in vars(rule).items() if k in before}
        assert after == before, "the rule keeps state in itself; declare it in states()"

    def test_the_scale_is_part_of_the_gradient(self) -> None:
        """Loss scale, accumulation and clipping are folded into ``scale``, a number or tensor."""
        one = self._trained()
        for scale in (0.25, torch.tensor(0.25)):
            other = self._trained(scale, factor=4.0)
            torch.testing.assert_close(other, one, rtol=self.tolerance, atol=1e-7)

    def test_a_bucket_may_be_cut_anywhere(self) -> None:
        """A rule of grain ``"element"`` updates parts of a bucket as it does the whole."""
        rule = self.rule()
        if rule.grain != "element":
            return
        whole = self._trained()
        home, flat, flatten = place(self.rule(), _numbers(0))
        spec, start = home.spec, flat.clone()
        cuts = [0, 3, spec.numel // 2, spec.numel]
        parts = []
        for begin, end in pairwise(cuts):
            part = DeviceHome(replace(part_of(spec, begin, end), rule=rule))
            part.adopt(flat[begin:end], start[begin:end])
            parts.append((part, begin, end))
        for step in range(1, 4):
            gradient = flatten(_numbers(step))
            for part, begin, end in parts:
                part.update(gradient[begin:end].clone(), rule.defaults, 1.0)
        torch.testing.assert_close(flat, whole, rtol=self.tolerance, atol=1e-7)

    def test_low_precision_parameters_are_rounded_masters(self) -> None:
        """Where parameters have masters, ``bucket.out`` is written in the same update."""
        rule = self.rule()
        home, flat, flatten = place(rule, _numbers(0), parameter_dtype=torch.bfloat16)
        for step in range(1, 4):
            home.update(flatten(_numbers(step)), rule.defaults, 1.0)
            masters = torch.cat(
                [f.read() for f in home.fragments() if f.kind == "master"]
            ).bfloat16()
            assert torch.equal(flat[: masters.numel()], masters), (
                "parameters are not the rounded masters; write bucket.out at the end of update()"
            )

    def test_states_may_be_kept_in_fewer_bits(self) -> None:
        """A rule computes in a wide dtype, whatever weights and states are stored in."""
        rule = self.rule()
        home, flat, flatten = place(rule, _numbers(0), state_dtype=torch.bfloat16)
        for step in range(1, 4):
            home.update(flatten(_numbers(step)), rule.defaults, 1.0)
        assert bool(torch.isfinite(flat).all())

    def test_states_and_the_step_are_all_that_a_rule_remembers(self) -> None:
        """A new rule with the saved states goes on to the last bit."""
        one, flat, flatten = place(self.rule(), _numbers(0))
        hyper = self.rule().defaults
        for step in range(1, 4):
            one.update(flatten(_numbers(step)), hyper, 1.0)
        other, resumed, _ = place(self.rule(), _numbers(0))
        resumed.copy_(flat)
        for source, target in zip(one.fragments(), other.fragments(), strict=True):
            target.write(source.read().clone())
        other.step = one.step
        for step in range(4, 6):
            one.update(flatten(_numbers(step)), hyper, 1.0)
            other.update(flatten(_numbers(step)), hyper, 1.0)
        assert torch.equal(resumed, flat)

    def _trained(self, scale: float | torch.Tensor = 1.0, factor: float = 1.0) -> torch.Tensor:
        """Weights after three steps of gradients times ``factor``."""
        rule = self.rule()
        home, flat, flatten = place(rule, _numbers(0))
        for step in range(1, 4):
            home.update(flatten(_numbers(step)) * factor, rule.defaults, scale)
        return flat


def _numbers(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, (int, float, str, tuple, torch.Tensor))
