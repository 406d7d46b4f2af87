"""Bits fall more slowly in blocks where the loss is curved: MoQ with eigenvalues."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_kernels.curvature import largest_eigenvalue, normalised
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.units import units
from drivetrain_compression.section import EIGENVALUE, EigenvalueSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.compression")


class Curvature:
    """Eigenvalues of the Hessian of each block, of the micro-batch at whose end bits may fall.

    They are computed from the graph of a loss right before its backward; so the graph is gone
    through twice, and its gradients have graphs of their own meanwhile.

    Args:
        section: blocks and iteration.
        model: has the blocks.

    Raises:
        ConfigError: it has no such blocks.
    """

    def __init__(self, section: EigenvalueSection, model: nn.Module) -> None:
        self._section = section
        self._blocks = _blocks(section, model)
        self._boundaries = 0
        self.values: dict[str, float] = {}
        """Path of a block -> its share of the largest eigenvalue, in [0, 1]."""
        self._inside = ExitStack()
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        self._inside.close()
        if module.training and torch.is_grad_enabled():  # fused attention has one derivative only
            self._inside.enter_context(sdpa_kernel(SDPBackend.MATH))

    def _leave(self, _module: nn.Module, _args: Any, _outputs: Any) -> None:
        self._inside.close()

    def of(self, name: str) -> float | None:
        """The value of the block that a module is in; ``None`` where none is known."""
        for block, value in self.values.items():
            if name == block or name.startswith(f"{block}."):
                return value
        return None

    def look(self, engine: Engine, tensors: Sequence[torch.Tensor]) -> None:
        """Compute eigenvalues from a loss that is about to go backward. Collective."""
        self._boundaries += 1
        if (self._boundaries - 1) % self._section.gas_boundary_resolution:
            return
        scale = 1.0 / engine.loss_scaler.scale_value
        found = {}
        for number, (name, block) in enumerate(self._blocks):
            parameters = [p for p in block.parameters() if p.requires_grad]
            try:
                gradients = torch.autograd.grad(
                    [t * scale for t in tensors],
                    parameters,
                    create_graph=True,
                    materialize_grads=True,
                )
                found[name] = largest_eigenvalue(
                    gradients,
                    parameters,
                    max_iter=self._section.max_iter,
                    tolerance=self._section.tol,
                    stability=self._section.stability,
                    seed=number,
                    reduce=_mean_over_data(engine),
                )
            except NotImplementedError as error:
                raise _second_derivative(name, error) from error
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise _second_derivative(name, error) from error
        self.values = dict(zip(found, normalised(list(found.values())), strict=True))
        if self._section.verbose and engine.job.rank == 0:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            logger.info("largest eigenvalues at step %d: %s", engine.progress.steps, shown)


def _second_derivative(name: str, error: Exception) -> TrainingError:
    return TrainingError(
        f"{EIGENVALUE}: block {name} has an operation without a second derivative ({error}); use "
        "another implementation of it, or switch eigenvalue off"
    )


def _mean_over_data(engine: Engine) -> Any:
    job = engine.job
    ranks = job.mesh.size("data")
    if ranks == 1:
        return None

    def reduce(tensor: torch.Tensor) -> None:
        job.communicator.all_reduce(tensor, "data", Tag(Purpose.CONTROL, site="curvature"))
        tensor /= ranks

    return reduce


def _blocks(section: EigenvalueSection, model: nn.Module) -> list[tuple[str, nn.Module]]:
    if section.layer_name is None:
        found = [(unit.name, unit.module) for unit in units(model) if unit.name]
        if not found:
            raise ConfigError(
                f"{EIGENVALUE}.layer_name: {type(model).__name__} has no repeated blocks; name the "
                "list of its layers"
            )
    else:
        try:
            layers = model.get_submodule(section.layer_name)
        except AttributeError:
            raise ConfigError(
                f"{EIGENVALUE}.layer_name: {type(model).__name__} has no module "
                f"{section.layer_name!r}"
            ) from None
        found = [(f"{section.layer_name}.{n}", child) for n, child in layers.named_children()]
    if section.layer_num > len(found):
        raise ConfigError(
            f"{EIGENVALUE}.layer_num is {section.layer_num}, but there are {len(found)} blocks"
        )
    return found[: section.layer_num or None]
