"""Results of towers among the embeddings of text, for scripts that cut sequences themselves.

By DeepSpeed's names (AutoSP). With the config's ``sequence_parallel_size`` the model's own merge
stays as it is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_sequence.autosp_scripts import counts_along_tokens, gathered_along_tokens
from drivetrain_sequence.group import GroupLine


class ModalityFusionSPAdapter(nn.Module):
    """Puts what ranks have of images into text, and cuts the result.

    A class of your own says in ``_splice_visual_into_text`` where images belong.

    Args:
        projection: from features of a tower [b, n, width] to embeddings [b, n, hidden size].
        process_group: ranks that share sequences, in order.
        image_token_id: stands for images in ``input_ids``.
    """

    def __init__(
        self,
        projection: nn.Module,
        process_group: dist.ProcessGroup | None,
        image_token_id: int = -200,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.image_token_id = image_token_id
        self._line = GroupLine(process_group)

    def forward(
        self, visual_features: torch.Tensor, text_embeds: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Join images and text, and cut. Collective.

        Args:
            visual_features: [b, n, width] of this rank; numbers may differ.
            text_embeds: [b, t, hidden size], of all text.
            input_ids: [b, t].

        Returns:
            This rank's part of [b, S, hidden size], S made a multiple of the ranks with zeros.

        Raises:
            TrainingError: images and the tokens that stand for them do not match.
        """
        own = self.projection(visual_features)
        images = gathered_along_tokens(self._line, own, counts_along_tokens(self._line, own))
        fused = self._splice_visual_into_text(text_embeds, images, input_ids)
        missing = -fused.shape[1] % self._line.size
        fused = nn.functional.pad(fused, (0, 0, 0, missing))
        return fused.chunk(self._line.size, 1)[self._line.rank].contiguous()

    def _splice_visual_into_text(
        self, text_embeds: torch.Tensor, visual_embeds: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings of a sequence with images in it.

        Args:
            text_embeds: [b, t, hidden size].
            visual_embeds: [b, v, hidden size], of all ranks.
            input_ids: [b, t].

        Returns:
            [b, S, hidden size].
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say where images belong in text: override "
            "_splice_visual_into_text, or take LlavaFusionAdapter, InternVLFusionAdapter or "
            "Qwen2VLFusionAdapter"
        )


class LlavaFusionAdapter(ModalityFusionSPAdapter):
    """Each token that stands for an image gives way to the image's embeddings, equally many each.

    Rows that become shorter than others end with zeros.
    """

    def _splice_visual_into_text(
        self, text_embeds: torch.Tensor, visual_embeds: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        rows = [self._row(*row) for row in zip(text_embeds, visual_embeds, input_ids, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _row(self, text: torch.Tensor, visual: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        places = (tokens == self.image_token_id).nonzero().flatten().tolist()
        if not places:
            return text
        if len(visual) % len(places):
            raise TrainingError(
                f"{len(visual)} embeddings of images are not equally many for each of "
                f"{len(places)} tokens {self.image_token_id} that stand for images in a row"
            )
        pieces, begin = [], 0
        for place, image in zip(places, visual.chunk(len(places)), strict=True):
            pieces += [text[begin:place], image]
            begin = place + 1
        return torch.cat([*pieces, text[begin:]])


class InternVLFusionAdapter(ModalityFusionSPAdapter):
    """Each token that stands for a patch gives way to one embedding, in order."""

    def _splice_visual_into_text(
        self, text_embeds: torch.Tensor, visual_embeds: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        return _in_places(text_embeds, visual_embeds, input_ids == self.image_token_id)


class Qwen2VLFusionAdapter(ModalityFusionSPAdapter):
    """Tokens between one that begins an image and one that ends it give way to one embedding each.

    Args:
        projection: from features of a tower to embeddings.
        process_group: ranks that share sequences, in order.
        vision_start_token_id: begins an image.
        vision_end_token_id: ends it.
    """

    def __init__(
        self,
        projection: nn.Module,
        process_group: dist.ProcessGroup | None,
        vision_start_token_id: int,
        vision_end_token_id: int,
    ) -> None:
        super().__init__(projection, process_group)
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id

    def _splice_visual_into_text(
        self, text_embeds: torch.Tensor, visual_embeds: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        begins = (input_ids == self.vision_start_token_id).long()
        ends = (input_ids == self.vision_end_token_id).long()
        open_images = begins.cumsum(1) - ends.cumsum(1)
        if not bool(
            ((open_images == 0) | (open_images == 1)).all() & (open_images[:, -1] == 0).all()
        ):
            raise TrainingError(
                f"tokens {self.vision_start_token_id} and {self.vision_end_token_id}, which begin "
                "and end images, are not pairs"
            )
        return _in_places(text_embeds, visual_embeds, (open_images == 1) & (begins == 0))


def _in_places(text: torch.Tensor, visual: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``text`` [b, t, width] with the first of ``visual`` [b, v, width] where ``places`` [b, t]."""
    needed = int(places.sum(1).max())
    if needed != visual.shape[1]:  # of the longest row; others are padded
        raise TrainingError(
            f"{needed} tokens of a row stand for images, which have {visual.shape[1]} embeddings"
        )
    order = (places.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(text)
    if not visual.shape[1]:
        return text
    return torch.where(places[..., None], visual.gather(1, order), text)
