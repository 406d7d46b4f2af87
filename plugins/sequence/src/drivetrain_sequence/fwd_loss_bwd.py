"""One step over a rank's part of a sequence, for scripts in the manner of ALST."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from drivetrain.communication.functional import functional
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_sequence.losses import IGNORED, CausalLoss, mean_over_sequence
from drivetrain_sequence.scripts import TiledLoss

_BYTES_OF_TILE = 2**30
"""Of logits in float32, where the number of tiles is chosen here."""

_TAG = Tag(Purpose.ACTIVATION, key="loss", site="UlyssesSPFwdLossBwdWithLogits")


class UlyssesSPFwdLossBwdWithLogits:
    """Forward, loss over all ranks of a sequence, and backward, of one part of a batch.

    The loss is the mean over the labels of all ranks, the same on each, and its gradient is right
    for the engine's mean over ranks. Collective over the ranks of a sequence.

    Args:
        model: the engine.
        model_unwrapped: the model itself, whose ``loss_function`` takes ``shift_labels``.
        device: where the model computes.
        num_loss_logit_shards: tiles of the loss; ``"auto"``: as many as have at most 1 GiB of
            logits in float32.
        kwargs: accepted.

    Attributes:
        logits: of the latest forward.
        loss: of the latest call of :meth:`compute_loss`.
    """

    def __init__(
        self,
        model: Any,
        model_unwrapped: Any,
        device: torch.device | str,
        num_loss_logit_shards: int | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        self.model = model
        self.model_unwrapped = model_unwrapped
        self.device = torch.device(device)
        self.num_loss_logit_shards = num_loss_logit_shards
        self._line = functional(model.job.communicator, "sp", _TAG)
        self.logits: torch.Tensor
        self.loss: torch.Tensor

    def sp_fwd_loss_bwd(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Go forward and backward.

        Args:
            batch: what ``UlyssesSPDataLoaderAdapter`` gives: ``input_ids``, ``position_ids`` and
                ``shift_labels`` of this rank's tokens, and what else the model takes.

        Returns:
            The loss, without a graph.

        Raises:
            TrainingError: there are no ``shift_labels``.
        """
        if "shift_labels" not in batch:
            raise TrainingError(
                f"a batch without shift_labels has no loss; it has {', '.join(batch)}: let "
                "UlyssesSPDataLoaderAdapter make it"
            )
        here = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        shift_labels = here.pop("shift_labels")
        self.forward(here)
        loss = self.compute_loss(None, shift_labels)
        self.backward()
        return loss.detach()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The model's output for ``batch``, which has no labels."""
        output = self.model(**batch, use_cache=False)
        self.logits = output.logits
        return output

    def compute_loss(self, labels: None, shift_labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of the latest logits over the labels of all ranks; 0 if there are none.

        Args:
            labels: ``None``: those of the token after each are needed.
            shift_labels: [b, s] of this rank's tokens.
        """
        logits, model = self.logits, self.model_unwrapped
        if self.num_loss_logit_shards == "auto":
            shards = max(1, -(-logits.numel() * 4 // _BYTES_OF_TILE))
        else:
            shards = self.num_loss_logit_shards
        vocabulary, function = model.config.vocab_size, model.loss_function
        if isinstance(function, CausalLoss):
            # That is collective, and ranks have different numbers of tiles with labels.
            function = function.original
        own = TiledLoss.apply(function, logits, vocabulary, shift_labels, shards)
        counted = (shift_labels != IGNORED).sum()
        everywhere = self._line.all_reduce(counted.to(own.dtype)).clamp(min=1)
        # A number of tokens that all ranks know is not summed again.
        total = mean_over_sequence(own * counted, 1.0, self._line)
        self.loss = total / everywhere
        return self.loss

    def backward(self) -> None:
        """Go backward from the latest loss; it and the logits are no longer held here."""
        self.model.backward(self.loss)
        del self.loss, self.logits
