"""A model as a list of layers, of which each stage of a pipeline builds its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError, TrainingError
from drivetrain_pipeline.cutting import LayerFacts, cut
from drivetrain_pipeline.layers import (
    Layer,
    LayerSpec,
    TiedLayerSpec,
    count_parameters,
    kind_of,
    refuse_unlike_ties,
)
from drivetrain_pipeline.running.chunked import Around
from drivetrain_pipeline.section import PATH, PipelineSection


class PipelineModule(nn.Module):
    """Layers that run one after the other, each taking what the one before has returned.

    Each rank builds the layers of its stage alone. A layer's initial values depend on its number
    and on ``torch.initial_seed()`` (or ``base_seed``), not on the number of stages. The engine is
    used with ``train_batch`` and ``eval_batch``; a micro-batch is ``(inputs, labels)``.

    Args:
        layers: descriptions, modules and functions of one argument.
        num_stages: ranks along ``pp``; by default ``pipeline.stages`` of the config.
        topology: in place of ``num_stages``: has ``get_dim("pipe")``.
        loss_fn: called as ``loss_fn(output, labels)``; without it the last layer returns the loss.
        seed_layers: layer ``i`` is built with seed ``base_seed + i``.
        seed_fn: called with that seed before a layer is built, in place of ``torch.manual_seed``.
        base_seed: see ``seed_layers``.
        partition_method: ``parameters``, ``uniform`` or ``type:REGEX``; the config's
            ``pipeline.partition`` goes before it.
        activation_checkpoint_interval: so many layers are recomputed together in backward; 0: none.
        activation_checkpoint_func: called as ``function(run, input)`` to recompute; torch's,
            not re-entrant, by default.
        checkpointable_layers: names of classes; layers are recomputed together only if all are
            among them. By default if any of them has parameters.
        dynamic_shape: shapes between stages depend on values.

    Raises:
        ConfigError: the world cannot be divided into so many stages, there are fewer layers, or
            tied ones are not alike.
    """

    drivetrain_plugin: ClassVar[str] = PATH
    needs_inputs = False

    def __init__(
        self,
        layers: Iterable[Layer],
        num_stages: int | None = None,
        topology: Any | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], object] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        super().__init__()
        if num_stages is None and topology is not None:
            num_stages = int(topology.get_dim("pipe"))
        self.loss_fn = loss_fn
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.checkpointable_layers = checkpointable_layers
        self.dynamic_shape = dynamic_shape
        self._specs = list(layers)
        refuse_unlike_ties(self._specs)
        self._num_stages = num_stages
        self._method = partition_method
        self._recompute = activation_checkpoint_func or _not_reentrant
        self._seed = base_seed if seed_layers else torch.initial_seed()
        self._seed_fn = seed_fn or torch.manual_seed
        self._begun: tuple[int, Any, Any, bool] | None = None
        self._is_whole = False
        self._around: Around = _straight
        self.holders: MutableMapping[nn.Parameter, set[int]] = WeakTensorKeyDictionary()
        self.own_parts: list[nn.Module] = []
        self.layers, self.tied_modules = nn.ModuleDict(), nn.ModuleDict()
        if num_stages is not None:
            stage = _stage_of_this_rank(num_stages)
            section = PipelineSection(stages=num_stages)
            self.build(range(num_stages), stage, section)

    @property
    def drivetrain_wish(self) -> dict[str, Any]:
        """What this model asks of the plan: keys of the section ``pipeline``."""
        found: dict[str, Any] = {"dynamic_shape": True} if self.dynamic_shape else {}
        return found if self._num_stages is None else {**found, "stages": self._num_stages}

    # -- building -----------------------------------------------------------------------------

    def build(self, placement: Sequence[int], stage: int, section: PipelineSection) -> None:
        """Build the layers of a stage; those that are there already and stay are kept.

        Args:
            placement: stage of each chunk.
            stage: whose chunks to build.
            section: how to cut.

        Raises:
            ConfigError: fewer layers than chunks, or a stage without parameters.
        """
        method = section.partition if "partition" in section.model_fields_set else self._method
        if "activation_checkpoint_interval" in section.model_fields_set:
            self.activation_checkpoint_interval = section.activation_checkpoint_interval
        facts = [
            LayerFacts(str(i), kind_of(layer), self._count(layer, method))
            for i, layer in enumerate(self._specs)
        ]
        self._bounds = cut(facts, len(placement), method, section)
        self._placement, self._is_whole = tuple(placement), False
        own = [i for i in range(len(self._specs)) if self.stage_owner(i) == stage]
        specs = [self._specs[i] for i in own]
        keys = {spec.key for spec in specs if isinstance(spec, TiedLayerSpec)}
        for kept, names in ((self.layers, {str(i) for i in own}), (self.tied_modules, keys)):
            for name in [name for name in kept if name not in names]:
                del kept[name]
        for i in own:
            self._build_layer(i)
        if next(self.parameters(), None) is None:
            raise ConfigError(
                f"{PATH}.partition: stage {stage} has layers {own} without parameters, so it has "
                "nothing to train; use fewer stages, or partition by parameters"
            )
        self._describe_holders(stage)

    def drivetrain_whole(self) -> None:
        """Build the layers of other stages, too, on the meta device, until the next ``build``.

        For plugins that decide by the whole model what this rank has of a layer. Until then
        ``forward`` runs all layers.
        """
        with torch.device("meta"):
            for number in range(len(self._specs)):
                self._build_layer(number)
        self._is_whole = True

    def _count(self, layer: Layer, method: str) -> int:
        """Parameters of a layer, where they decide anything."""
        return count_parameters(layer) if method.lower() in ("parameters", "auto", "best") else 0

    def _build_layer(self, number: int) -> None:
        spec = self._specs[number]
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in self.tied_modules:
                first = next(
                    i
                    for i, other in enumerate(self._specs)
                    if isinstance(other, TiedLayerSpec) and other.key == spec.key
                )
                self.tied_modules[spec.key] = self._seeded(first)
        elif str(number) in self.layers:
            pass  # maybe another than was given: plugins replace layers
        elif isinstance(spec, nn.Module):
            self.layers[str(number)] = spec
        elif isinstance(spec, LayerSpec):
            self.layers[str(number)] = self._seeded(number)

    def _seeded(self, number: int) -> nn.Module:
        spec = self._specs[number]
        assert isinstance(spec, LayerSpec)
        with torch.random.fork_rng():
            self._seed_fn(self._seed + number)
            return spec.build()

    def _describe_holders(self, stage: int) -> None:
        self.holders.clear()
        self.own_parts = list(self.layers.values())
        for module in self.layers.values():
            for parameter in module.parameters():
                self.holders.setdefault(parameter, set()).add(stage)
        for key, module in self.tied_modules.items():
            stages = {
                self.stage_owner(i)
                for i, spec in enumerate(self._specs)
                if isinstance(spec, TiedLayerSpec) and spec.key == key
            }
            for parameter in module.parameters():
                self.holders.setdefault(parameter, set()).update(stages)
            if len(stages) == 1:
                self.own_parts.append(module)

    # -- what scripts ask ---------------------------------------------------------------------

    def num_pipeline_stages(self) -> int:
        """Ranks along ``pp``.

        Raises:
            ConfigError: neither this model nor an engine has said it yet.
        """
        if self._num_stages is None:
            raise ConfigError("the number of stages is the config's, which is not read yet")
        return self._num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that has a layer."""
        for chunk, end in enumerate(self._bounds[1:]):
            if layer_idx < end:
                return self._placement[chunk]
        raise ConfigError(f"there is no layer {layer_idx}; the model has {len(self._specs)}")

    def partitions(self) -> list[int]:
        """The first layer of each part, and the number of layers."""
        return list(self._bounds)

    def set_checkpoint_interval(self, interval: int) -> None:
        """Recompute so many layers together in backward from now on; 0: none."""
        self.activation_checkpoint_interval = interval

    def get_additional_losses(self) -> Mapping[str, torch.Tensor] | None:
        """Return terms of the loss beside ``loss_fn``: ``None``, see the engine's report."""
        return None

    # -- one forward --------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Number of chunks of the whole model."""
        return len(self._bounds) - 1

    def begin(
        self, chunk: int, received: Any, labels: Any = None, *, with_loss: bool = True
    ) -> None:
        """See :class:`~drivetrain_pipeline.running.chunked.ChunkedModel`."""
        self._begun = chunk, received, labels, with_loss

    def layers_by_name(self) -> dict[str, nn.Module | None]:
        """All layers, in order; ``None`` for those of other stages, tied ones and functions."""
        own = dict(self.layers.items())
        return {str(number): own.get(str(number)) for number in range(len(self._specs))}

    def watch_calls(self, around: Around | None) -> None:
        """See :class:`~drivetrain_pipeline.running.chunked.ChunkedModel`."""
        self._around = around or _straight

    def inputs(
        self, batch: Any, *, with_loss: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Take ``(inputs, labels)`` apart; without a loss, labels may be missing.

        Raises:
            TrainingError: a micro-batch is something else.
        """
        needs_labels = self.loss_fn is not None and with_loss
        if not needs_labels and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            return (batch,), {}, None
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TrainingError(
                f"a micro-batch of a PipelineModule is (inputs, labels), got {_described(batch)}"
            )
        return (batch[0],), {}, batch[1]

    def forward(self, inputs: Any = None) -> Any:
        """Run one chunk of this stage, or the whole model where there is one stage.

        Raises:
            TrainingError: it is one stage of several and the runner did not call.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            if len(set(self._placement)) > 1 and not self._is_whole:
                raise TrainingError(
                    "this model is one stage of a pipeline, which runs whole batches: call "
                    "engine.train_batch(batches) or engine.eval_batch(batches)"
                )
            return self._layers(inputs, 0, len(self._specs))
        chunk, received, labels, with_loss = begun
        bounds = self._bounds[chunk], self._bounds[chunk + 1]
        output = self._layers(received if chunk else inputs, *bounds)
        if chunk + 1 < self.chunks or self.loss_fn is None or not with_loss:
            return output
        last = str(len(self._specs) - 1)
        loss = self._around(last, self.loss_fn, (output, labels), is_loss=True)
        return {"loss": loss, "logits": output}

    def _layers(self, x: Any, begin: int, end: int) -> Any:
        interval = self.activation_checkpoint_interval
        if not interval or not torch.is_grad_enabled():
            return self._run(x, begin, end)
        for first in range(begin, end, interval):
            last = min(first + interval, end)
            if self._is_recomputed(first, last):
                x = self._recompute(partial(self._run, begin=first, end=last), x)
            else:
                x = self._run(x, first, last)
        return x

    def _run(self, x: Any, begin: int, end: int) -> Any:
        for number in range(begin, end):
            spec = self._specs[number]
            if isinstance(spec, TiedLayerSpec):
                module = self.tied_modules[spec.key]
                run = module if spec.forward_fn is None else partial(spec.forward_fn, module)
                x = self._around(str(number), run, (x,), parameters=module.parameters())
            elif isinstance(spec, (LayerSpec, nn.Module)):
                x = self.layers[str(number)](x)
            else:
                x = self._around(str(number), spec, (x,))
        return x

    def _is_recomputed(self, begin: int, end: int) -> bool:
        specs = self._specs[begin:end]
        if self.checkpointable_layers is not None:
            return all(kind_of(spec) in self.checkpointable_layers for spec in specs)
        return any(isinstance(spec, (LayerSpec, nn.Module)) for spec in specs)


def _straight(layer: str, run: Callable[..., Any], args: tuple[Any, ...], **about: Any) -> Any:
    return run(*args)


def _not_reentrant(function: Callable[[Any], Any], x: Any) -> Any:
    return checkpoint(function, x, use_reentrant=False)


def _stage_of_this_rank(stages: int) -> int:
    """The stage of this process, whose rank is known before there is a job: ``pp`` is outermost."""
    ranks = Ranks.current()
    if stages < 1 or ranks.world_size % stages:
        raise ConfigError(
            f"{ranks.world_size} ranks cannot be divided into {stages} stages: "
            f"{ranks.world_size} / {stages} leaves {ranks.world_size % max(stages, 1)}"
        )
    return ranks.rank // (ranks.world_size // stages)


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
