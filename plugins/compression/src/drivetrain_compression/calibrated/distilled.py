"""ZeroQuant with layer-by-layer distillation (LKD): a block learns its own outputs again.

Yao et al. 2022, "ZeroQuant", arXiv:2206.01861, section 4.3. The block as it was is the teacher; the
same block with rounded weights and inputs learns to return the same for the same hidden states.
What a rounded weight is told to change, its original is changed by (straight through).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.grids import fit, round_to, stored, weight_of
from drivetrain_compression.calibrated.modifiers import Round, RoundConfig
from drivetrain_compression.calibrated.pairs import Call
from drivetrain_compression.calibrated.results import RoundedInputs
from drivetrain_compression.quantisers.straight_through import straight_through
from drivetrain_compression.recipe.modifier import CompressionUnit


class ZeroQuantConfig(RoundConfig):
    """ZeroQuant with distillation."""

    bits: int = Field(default=8, ge=2, le=8, description="Bits of a weight.")
    steps: int = Field(default=100, ge=1, description="Of AdamW, a batch each.")
    learning_rate: float = Field(default=5e-6, gt=0, description="Of AdamW.")


class ZeroQuant(Round):
    """Rounds to the nearest, when the block has learnt to be rounded."""

    config_class = ZeroQuantConfig
    config: ZeroQuantConfig

    def __init__(self, config: ZeroQuantConfig, label: str) -> None:
        super().__init__(config, label)
        if not self.gathers:
            self.gathers = "sizes"  # type: ignore[misc]

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        super().begin(units)
        self._seen: list[tuple[Call, torch.Tensor]] = []
        self._hook = units[0].module.register_forward_hook(self._see, with_kwargs=True)

    def change(self, unit: CompressionUnit) -> None:
        self._hook.remove()
        with torch.enable_grad():
            self._learn(unit)
        self._seen.clear()
        super().change(unit)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._seen.append((Call(tuple(args), dict(kwargs)), hidden.detach().clone()))

    def _learn(self, unit: CompressionUnit) -> None:
        block, config = unit.module, self.config
        names = {id(m): n for n, m in block.named_modules()}
        layers = [names[id(target.module)] for target in unit.targets]
        prefix = [f"{name}." if name else "" for name in layers]
        quantised = {f"{each}weight" for each in prefix}
        masters = {
            name: parameter.detach().float().requires_grad_()
            for name, parameter in block.named_parameters()
        }
        optimizer = torch.optim.AdamW(list(masters.values()), lr=config.learning_rate)
        hooks = self._inputs_rounded(unit)
        try:
            for step in range(config.steps):
                call, wanted = self._seen[step % len(self._seen)]
                student = {
                    name: self._rounded(master, wanted.dtype) if name in quantised else master
                    for name, master in masters.items()
                }
                given = {name: value.to(wanted.dtype) for name, value in student.items()}
                made = torch.func.functional_call(block, given, call.args, dict(call.kwargs))
                found = made[0] if isinstance(made, tuple) else made
                loss = nn.functional.mse_loss(found.float(), wanted.float())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        finally:
            for hook in hooks:
                hook.remove()
        if not all(bool(torch.isfinite(master).all()) for master in masters.values()):
            raise ConfigError(
                f"{self.label}: {unit.name} learnt NaN; choose a smaller learning_rate than "
                f"{config.learning_rate:g}"
            )
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(masters[name])

    def _inputs_rounded(self, unit: CompressionUnit) -> list[Any]:
        kind = self.config.activations
        if not kind:
            return []
        hooks = []
        for target in unit.targets:
            module: Any = target.module
            known = self.input_scale(self.watch.of(target.name), module.weight.dtype)
            hooks.append(RoundedInputs(kind, known).before(module))
        return hooks

    def _rounded(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        grid = self.config.grid()
        scales = stored(fit(master.detach(), grid, self.config.group), dtype)
        near = weight_of(round_to(master.detach(), grid, scales), scales)
        return straight_through(master, near)
