"""What the engine's module is given in place of whole batches, and what becomes of its loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError, TrainingError
from drivetrain_sequence.inputs import (
    Cutter,
    Labels,
    OwnCutter,
    Prepared,
    Whole,
    is_of_transformers,
)
from drivetrain_sequence.losses import (
    CausalLoss,
    TiledHead,
    mean_over_sequence,
    refuse_shifting,
)
from drivetrain_sequence.modalities import fused_cutter, language_model_of
from drivetrain_sequence.probe import probe
from drivetrain_sequence.tiles import tile_of
from drivetrain_sequence.towers import share_towers
from drivetrain_sequence.two_sequences import two_sequences

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_sequence.layout import Cut
    from drivetrain_sequence.section import SequenceParallelSection
    from drivetrain_sequence.turn import Turn

_SAME = {"ForMaskedLM": "same", "ForTokenClassification": "same"}
"""Kinds of losses of Transformers that are means over the labels of the tokens themselves."""


class SharedModel:
    """An engine's module whose sequences several ranks share, or whose loss comes in tiles.

    Args:
        job: mesh and communication.
        module: the finished module.
        section: settings.
        turn: how sequences are shared out; tells attention when it sees parts.

    Raises:
        ConfigError: it is not known how to cut the module's batches.
    """

    def __init__(
        self, job: Job, module: nn.Module, section: SequenceParallelSection, turn: Turn
    ) -> None:
        cut = turn.cut
        self._job = job
        self._module = module
        self._probes = section.probe and cut.cuts
        self._turn = turn
        tag = Tag(Purpose.ACTIVATION, key="loss", site="sequence parallelism")
        self._line: Functional = functional(job.communicator, "sp", tag)
        self._pending: Prepared | None = None
        self._now: Prepared | None = None
        self._seen = not cut.cuts
        self._loss: CausalLoss | None = None
        self._head: TiledHead | None = None
        self._inside: list[Callable[[], None]] = []
        self._cutter = self._cutter_of(job, section, cut)
        hooks = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]
        self._hooks = hooks

    def prepare(
        self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the arguments of one forward."""
        if self._cutter is None:  # the script has
            self._pending = Prepared({})
            return args, dict(kwargs)
        arguments = self._cutter.named(args, kwargs)
        first, self._seen = not self._seen, True
        # A rehearsal has no values to compare.
        first = first and self._line_device().type != "meta"
        if first and self._line.size > 1:
            self._check_alike(arguments)
        prepared = self._cutter(arguments)
        if first and self._probes:
            probe(self._module, self._cutter, arguments, self._line, self._turn)
        self._pending = prepared
        return (), prepared.keywords

    def undo(self) -> None:
        """Leave the module as it was found."""
        for hook in self._hooks:
            hook.remove()
        for undo in self._inside:
            undo()
        if self._head is not None:
            self._head.undo()
        if self._loss is not None:
            self._loss.undo()

    def _cutter_of(self, job: Job, section: SequenceParallelSection, cut: Cut) -> Cutter | None:
        module, rank = self._module, job.mesh.coordinate("sp")
        if is_of_transformers(module):
            return self._of_transformers(section, cut, rank)
        if section.loss_tile is not None:
            raise ConfigError(
                "sequence_parallel.loss_tile: only losses of models of Transformers are computed "
                "in tiles by themselves; in another model call TiledFusedLogitsLoss.apply of "
                "drivetrain_sequence.scripts"
            )
        if section.inputs == "whole" or not cut.cuts:
            return None
        if cut.ranks == 1:
            return Whole(module, cut, rank)
        if "position_ids" not in inspect.signature(module.forward).parameters:
            raise ConfigError(
                f"the forward of {type(module).__name__} takes no position_ids, which tell a rank "
                "where the tokens are that it is given of a sequence (sequence_parallel_size): add "
                "them, to be used where tokens are numbered; or set sequence_parallel.inputs: "
                "whole, and hand in parts"
            )
        return OwnCutter(module, cut, rank)

    def _of_transformers(
        self, section: SequenceParallelSection, cut: Cut, rank: int
    ) -> Cutter | None:
        module: Any = self._module
        if getattr(module.config, "is_encoder_decoder", False):
            if section.inputs == "whole" or section.loss_tile is not None:
                key = "inputs: whole" if section.inputs == "whole" else "loss_tile"
                raise ConfigError(
                    f"sequence_parallel.{key}: {type(module).__name__} has an encoder and a "
                    "decoder with sequences of their own, which the engine alone shares out, and "
                    "whose loss is not that of the next token: leave it out"
                )
            both, self._inside = two_sequences(module, self._turn, rank)
            self._inside.append(refuse_shifting(module))
            return both
        labels = self._take_loss(section)
        if section.inputs == "whole":
            return None
        inner = language_model_of(module) if cut.cuts else None
        if inner is None and section.towers == "shared":
            raise ConfigError(
                f"sequence_parallel.towers: {type(module).__name__} has no towers of images that "
                "ranks (sequence_parallel_size) could share: leave it out"
            )
        if inner is None:
            return Cutter(module, cut, rank, labels)
        fused, door = fused_cutter(module, inner, self._turn, rank, labels)
        self._inside.append(door.undo)
        if section.towers == "shared" and self._line.size > 1:
            self._inside += share_towers(module, inner, self._line, self._turn, section.probe)
        return fused

    def _take_loss(self, section: SequenceParallelSection) -> Labels | None:
        """Compute the loss of a causal model here; say what labels are."""
        model: Any = self._module
        losses: Any = sys.modules["transformers.loss.loss_utils"]
        original = model.loss_function
        if original is losses.ForCausalLMLoss:
            self._loss = CausalLoss(self._line, model)
            tile = tile_of(self._job, section, "loss_tile")
            if tile is not None:
                self._head = TiledHead(model.get_output_embeddings(), tile)
                self._loss.in_tiles = self._head
            return "next"
        if section.loss_tile is not None:
            raise ConfigError(
                f"sequence_parallel.loss_tile: the loss of {type(model).__name__} is not that of "
                "the next token, the only one that is computed in tiles"
            )
        kind = getattr(model, "loss_type", None)
        return "same" if kind in _SAME else None

    def _check_alike(self, arguments: Mapping[str, Any]) -> None:
        """Refuse ranks that were given different batches. Collective."""
        assert self._cutter is not None
        tokens = next((arguments[n] for n in self._cutter.tokens if n in arguments), None)
        facts = torch.zeros(1, 4, dtype=torch.float64)
        if isinstance(tokens, torch.Tensor) and tokens.dim() > 1:
            own = tokens.detach().to("cpu", torch.float64).flatten()
            weights = torch.linspace(1, 2, own.numel(), dtype=torch.float64)
            facts = torch.stack([*map(torch.tensor, tokens.shape[:2]), own.sum(), own @ weights])
            facts = facts.double()[None]
        facts = facts.to(self._line_device())
        everyone = self._line.all_gather(facts)
        if not bool((everyone == everyone[:1]).all()):
            raise TrainingError(
                "the ranks of one sequence (sequence_parallel_size) were given different batches, "
                "and each needs the whole one: share data out by job.mesh.coordinate('dp'), as "
                "loaders of the engine do"
            )

    def _line_device(self) -> torch.device:
        return next((p.device for p in self._module.parameters()), torch.device("cpu"))

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._pending is None:
            return
        self._now, self._pending = self._pending, None
        self._turn.in_forward = self._turn.cut.cuts
        if self._loss is not None:
            self._loss.made = None
        if self._head is not None:
            self._head.labels = self._now.labels

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        now, self._now = self._now, None
        if now is None:
            return output
        self._turn.in_forward = False
        if self._head is not None:
            output = _without(output, self._head.made)
            self._head.forget()
        if now.labels is None or output is None:  # None: the forward has raised
            return output
        if self._loss is None:
            return self._averaged(output, now)
        made, self._loss.made = self._loss.made, None  # it holds a graph
        if made is None:
            raise TrainingError(
                f"{type(module).__name__} computes its loss without its loss_function, so it is "
                "not over the whole sequence: leave out labels and compute it of outputs"
            )
        # A version is above 0 where something was added in place.
        if self._line.size > 1 and (_loss(output) is not made or made._version):
            raise TrainingError(
                f"{type(module).__name__} adds something of its own to the loss of its tokens "
                "(routers do), which is of this rank's part of the sequence: leave it out (of "
                "Transformers: output_router_logits=False), or set sequence_parallel_size to 1"
            )
        return output

    def _averaged(self, output: Any, now: Prepared) -> Any:
        """The output with the loss over all ranks in place of the mean over this rank's labels."""
        loss = _loss(output)
        counted = torch.as_tensor(now.counted)
        loss = mean_over_sequence(loss * counted, counted, self._line)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output


def _loss(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output["loss"]


def _without(output: Any, losses: torch.Tensor | None) -> Any:
    """The output without the losses of tokens that stand where logits would."""
    if losses is None or output is None:
        return output
    if isinstance(output, tuple):
        return tuple(item for item in output if item is not losses)
    for name, item in list(output.items()):
        if item is losses:
            output[name] = None
    return output
