"""The plugin that has models attend to some blocks of keys only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import (
    AttentionLayer,
    AttentionPhase,
    Plugin,
    Problem,
    Sections,
    hookimpl,
)
from drivetrain_sparse_attention.section import PATH, SparseAttentionSection

if TYPE_CHECKING:
    from drivetrain.job.job import Job


class SparseAttention(Plugin):
    """Owns ``sparse_attention``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: SparseAttentionSection}

    @hookimpl
    def configure(self) -> Sequence[Problem]:
        from drivetrain_sparse_attention.layouts import sparsity_of

        section = self.section(SparseAttentionSection)
        if section.mode in ("dense", "topk"):
            return []
        try:
            sparsity_of(section, 1)
        except (ValueError, NotImplementedError) as error:
            return [Problem(PATH, str(error))]
        return []

    @hookimpl
    def wrap_attention(self, job: Job) -> Sequence[AttentionLayer]:
        section = self.section(SparseAttentionSection)
        if section.mode == "dense":
            return []
        from drivetrain.errors import ConfigError
        from drivetrain_sparse_attention.layer import SparseLayer

        shares = [axis for axis in ("sp", "tp") if job.mesh.size(axis) > 1]
        if shares and section.different_layout_per_head and section.mode != "topk":
            raise ConfigError(
                f"{PATH}.different_layout_per_head: ranks share out heads ({shares[0]}), so a "
                "layer does not know which heads it has: give all heads the same layout"
            )
        return [AttentionLayer(AttentionPhase.KERNEL, SparseLayer(section).around)]

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.mode": self.section(SparseAttentionSection).mode}
