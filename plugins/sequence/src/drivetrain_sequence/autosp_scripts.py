"""Vision towers whose patches ranks share out, for scripts that cut inputs themselves.

An engine with ``sequence_parallel_size`` cuts models of images and text by itself. These have
DeepSpeed's names (AutoSP), for scripts that hand each rank its part of the patches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_sequence.group import GroupLine

logger = logging.getLogger("drivetrain.sequence")

_HAS_CLASS_TOKEN = {
    "ViTAttention": True,
    "CLIPAttention": True,
    "SiglipAttention": False,
    "InternVisionAttention": False,
    "InternVLVisionAttention": False,
    "Qwen2VLVisionAttention": False,
    "Idefics2VisionAttention": False,
    "PaliGemmaVisionAttention": False,
}
"""Class of an attention of patches -> whether its first token is one for the whole image."""

_PROJECTIONS = ("mm_projector", "multi_modal_projector", "merger", "mlp1", "connector")
"""Last parts of names of what turns results of a tower into embeddings."""

Named = tuple[str, nn.Module]


@dataclass
class SPModelInfo:
    """What of a model is to know that ranks share its sequences.

    Args:
        vit_attn_modules: attentions of patches, with their names.
        llm_attn_modules: other attentions, the outermost of each.
        vision_projection_module: the first module that turns a tower's results into embeddings.
    """

    vit_attn_modules: list[Named] = field(default_factory=list)
    llm_attn_modules: list[Named] = field(default_factory=list)
    vision_projection_module: Named | None = None


def detect_model_sp_info(model: nn.Module) -> SPModelInfo:
    """Find attentions and the projection of a model, by names of classes and of modules."""
    info = SPModelInfo()
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Attention") and module not in inside:
            found = info.vit_attn_modules if kind in _HAS_CLASS_TOKEN else info.llm_attn_modules
            found.append((name, module))
            inside |= set(module.modules())
        is_first = info.vision_projection_module is None
        if is_first and name.rpartition(".")[2] in _PROJECTIONS:
            info.vision_projection_module = (name, module)
    return info


def auto_wrap_model_for_sp(model: nn.Module, process_group: dist.ProcessGroup | None) -> nn.Module:
    """Have a model's attentions of patches gather those of all ranks.

    Other attentions stay as they are, which is said in the log: the config's
    ``sequence_parallel_size`` and ``UlyssesSPAttentionHF`` serve them.

    Args:
        model: changed in place.
        process_group: ranks that share the patches of an image, in order.

    Returns:
        ``model``.

    Raises:
        ConfigError: no attention is found.
    """
    info = detect_model_sp_info(model)
    if not info.vit_attn_modules and not info.llm_attn_modules:
        raise ConfigError(
            f"{type(model).__name__} has no attention (a module whose class is called "
            f"...Attention; of patches: {', '.join(_HAS_CLASS_TOKEN)}): wrap what attends in "
            "UlyssesSPViTAttention by hand"
        )
    for name, attention in info.vit_attn_modules:
        has_class_token = _HAS_CLASS_TOKEN[type(attention).__name__]
        parent, _, own = name.rpartition(".")
        wrapped = UlyssesSPViTAttention(attention, process_group, has_class_token)
        setattr(model.get_submodule(parent), own, wrapped)
    if info.llm_attn_modules:
        logger.warning(
            "%d other attentions, such as %s, stay as they are: set sequence_parallel_size in "
            "the config, or register them with UlyssesSPAttentionHF",
            len(info.llm_attn_modules),
            info.llm_attn_modules[0][0],
        )
    if info.vision_projection_module is not None:
        logger.warning(
            "%s makes embeddings of patches, which ranks share now: wrap it in LlavaFusionAdapter, "
            "InternVLFusionAdapter or Qwen2VLFusionAdapter",
            info.vision_projection_module[0],
        )
    return model


def counts_along_tokens(line: GroupLine, own: torch.Tensor) -> list[int]:
    """How many tokens each rank has in its ``own`` [b, n, width]. Collective."""
    count = torch.tensor([own.shape[1]], device=own.device)
    return [int(n) for n in line.all_gather(count)]


def gathered_along_tokens(line: GroupLine, own: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Join what ranks have along dimension 1, in order; lengths may differ.

    The gradient is that of the sum of all ranks' losses. Collective.

    Args:
        line: the ranks.
        own: [b, n, width] of this rank.
        counts: n of each rank.

    Returns:
        [b, sum of n, width].
    """
    rows = own.transpose(0, 1)
    # Sent to each rank as a row of its own, so that gradients from all of them add up.
    came = line.exchange(torch.cat([rows] * line.size), counts, [len(rows)] * line.size)
    return came.transpose(0, 1)


class UlyssesSPViTAttention(nn.Module):
    """Attention of this rank's patches to those of all ranks.

    Patches are gathered, all of them attend, and the results of this rank's are kept; what is
    beside attention in a tower has a part of the patches. The gradient is that of the sum of what
    ranks compute as their losses; those of copies of the token for the whole image add up.

    Args:
        attn: takes [b, n, width], and returns the like, alone or first in a tuple.
        process_group: ranks that share the patches of an image, in order.
        has_cls_token: the first token is one for the whole image, which each rank has.
    """

    def __init__(
        self, attn: nn.Module, process_group: dist.ProcessGroup | None, has_cls_token: bool = True
    ) -> None:
        super().__init__()
        self.attn = attn
        self.has_cls_token = has_cls_token
        self._line = GroupLine(process_group)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Attend. Collective.

        Args:
            hidden_states: [b, n, width] of this rank's patches, after the token for the whole image
                if there is one; ranks may have different numbers of patches.
            kwargs: handed on.

        Returns:
            Like ``attn``, of this rank's patches.

        Raises:
            TrainingError: a mask, which would be of this rank's patches alone.
        """
        if kwargs.get("attention_mask") is not None:
            raise TrainingError(
                "an attention_mask is of the patches of one rank, and UlyssesSPViTAttention has "
                "those of all attend to each other: leave it out"
            )
        own = int(self.has_cls_token)
        first, patches = hidden_states[:, :own], hidden_states[:, own:]
        counts = counts_along_tokens(self._line, patches)
        everything = gathered_along_tokens(self._line, patches, counts)
        start = own + sum(counts[: self._line.rank])
        found = self.attn(torch.cat([first, everything], 1), **kwargs)
        output, *others = found if isinstance(found, tuple | list) else (found,)
        kept = torch.cat([output[:, :own], output[:, start : start + patches.shape[1]]], 1)
        return (kept, *others) if isinstance(found, tuple | list) else kept
