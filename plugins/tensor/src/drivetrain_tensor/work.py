"""One engine's model: cut before training, and compared with what it was."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from drivetrain.checkpoint.agreement import any_rank, same_everywhere, worst
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.modules.materialize import has_meta
from drivetrain_tensor.analysis import Analysis, analyse
from drivetrain_tensor.comparing import difference
from drivetrain_tensor.megatron import is_parallel
from drivetrain_tensor.probing import evaluating, tensors_of
from drivetrain_tensor.rules import Rules
from drivetrain_tensor.scripts import claim
from drivetrain_tensor.section import TensorParallelSection
from drivetrain_tensor.sharding import AXIS, Sharding
from drivetrain_tensor.visiting import visiting

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_tensor.products import Product

logger = logging.getLogger("drivetrain.tensor")


class Work:
    """Cuts the model of one engine, and compares it with what it was.

    Args:
        job: whose axis ``tp`` shares layers out.
        section: the config's.
        module: of the client.
    """

    def __init__(self, job: Job, section: TensorParallelSection, module: nn.Module) -> None:
        claim(module, section)
        self._job, self._section = job, section
        self._analysis: Analysis | None = None
        self._rows = 0
        self._before: dict[str, list[torch.Tensor]] = {}

    def cut(self, module: nn.Module) -> nn.Module:
        """Keep this rank's part of ``module``, unless its own layers are such parts already.

        Raises:
            ConfigError: it cannot be cut; on every rank.
        """
        problem: str | None = None
        if any_rank(self._job, [is_parallel(module)])[0]:  # a stage may have none of these layers
            return module
        if (complete := getattr(module, "drivetrain_whole", None)) is not None:
            complete()  # this rank has built its stage alone
            self._job.parameters.register(module, reduction="data")
        rules = Rules(self._section.partition_config, module)
        try:
            self._analysis = analyse(
                module, self._job.mesh.size(AXIS), rules, vocabulary=self._section.vocabulary
            )
            if not self._analysis.decisions and not self._analysis.vocabularies:
                problem = f"no layer of {type(module).__name__} can be cut: " + (
                    self._analysis.describe()
                )
        except ConfigError as error:
            problem = str(error)
        if (found := worst(self._job, problem)) is not None:
            raise ConfigError(f"tensor_parallel: {found}")
        assert self._analysis is not None
        logger.info("tensor parallelism: %s", self._analysis.describe())
        if others := rules.differences(
            self._analysis.probe.products, *self._analysis.columns_and_rows()
        ):
            logger.info("the model's tp_plan also cuts %s, which stay whole", ", ".join(others))
        if self._section.check and self._job.device.type != "meta" and not has_meta(module):
            self._before = self._outputs(module)
        Sharding(
            self._job,
            module,
            overlap=self._section.tp_overlap_comm,
            lazy=self._section.vocabulary_loss,
            in_parts=self._section.sequence_parallel,
            halved=self._section.domino,
        ).apply(self._analysis)
        return module

    def compare(self, module: nn.Module) -> nn.Module:
        """Refuse a model that computes something else than it did. Collective.

        Raises:
            ConfigError: on every rank; names the first layer whose output differs.
        """
        if self._before:
            problem = None
            after = self._outputs(module)
            for name, expected in self._before.items():
                for whole, found in zip(expected, after.get(name, []), strict=True):
                    problem = problem or difference(name, whole, found)
            self._before = {}
            if (text := worst(self._job, problem)) is not None:
                raise ConfigError(f"tensor_parallel: the cut model differs from the whole: {text}")
        self._analysis = None
        return module

    @torch.no_grad()
    def _outputs(self, module: nn.Module) -> dict[str, list[torch.Tensor]]:
        """What rows return and the model returns for the sample, in host memory."""
        assert self._analysis is not None
        probe, found = self._analysis.probe, dict[str, list[torch.Tensor]]()
        hooks = [
            product.module.register_forward_hook(_keeper(product, found))
            for product in self._analysis.columns_and_rows()[1]
        ]
        # Where stages keep parts of the model, it is compared before these are told apart.
        early = self._job.mesh.size("pp") > 1
        device = self._job.device if early else next(module.parameters()).device
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        rows = min((v.tables[0].inputs for v in self._analysis.vocabularies), default=0)
        rows = self._rows = self._rows or rows  # of the whole tables
        sample = (probe.args, probe.kwargs)
        args, kwargs = tree_map(lambda leaf: _moved(_spread(leaf, rows), device, dtype), sample)
        try:
            with evaluating(module), visiting(module, device):
                output = module(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        whole = [t.detach().to("cpu", copy=True) for t in tensors_of(output)]
        return {**found, "the model": whole}


def _keeper(product: Product, found: dict[str, list[torch.Tensor]]) -> Any:
    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.setdefault(product.path, []).append(output.detach().to("cpu", copy=True))

    return keep


def _spread(leaf: Any, rows: int) -> Any:
    """Tokens from all over the vocabulary, so that the parts of all ranks are compared."""
    is_tokens = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64 and leaf.dim() > 1
    if not is_tokens or not rows or leaf.numel() < 2 or leaf.max() < 2:
        return leaf
    steps = torch.arange(leaf.numel(), dtype=torch.int64).view(leaf.shape)
    return (steps * (rows - 1)).div(leaf.numel() - 1, rounding_mode="floor")


def _moved(leaf: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)


def check_inputs(job: Job, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a batch that differs between tensor-parallel ranks. Collective.

    Raises:
        TrainingError: on every rank.
    """
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    text = " ".join(_digest(tensor) for tensor in tensors)
    if not same_everywhere(job, text, axes=(AXIS,))[0]:
        raise TrainingError(
            "tensor-parallel ranks got different batches: all ranks that differ along axis 'tp' "
            "alone compute one batch together, so a loader shares data out by "
            "engine.job.mesh.coordinate('dp') among engine.job.mesh.size('dp')"
        )


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().to("cpu").contiguous().flatten()
    data = flat.view(torch.uint8) if flat.numel() else flat
    return f"{tuple(tensor.shape)} {hashlib.sha256(bytes(data.tolist())).hexdigest()}"
