"""Ulysses for scripts that shard their batches themselves, by names that DeepSpeed gave it.

An engine with ``sequence_parallel_size`` does all of this by itself. These are for scripts in the
manner of ALST (arXiv 2506.13996): they register an attention with Transformers, wrap their loader,
and put the losses of the ranks together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from drivetrain.contracts import AttentionFacts
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.modules.attention import torch_attention
from drivetrain_sequence.group import GroupLine
from drivetrain_sequence.heads import HeadShare, from_heads, to_heads
from drivetrain_sequence.layout import Cut, segments_of
from drivetrain_sequence.losses import shifted


class SequenceGroups:
    """Process groups of consecutive ranks that share sequences; an ``mpu`` for ``initialize``.

    Collective over all ranks.

    Args:
        size: ranks that share a sequence.

    Raises:
        ConfigError: they do not divide the ranks that there are.
    """

    def __init__(self, size: int) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "sequences are shared between ranks, and there are none yet: call "
                "deepspeed.init_distributed() first"
            )
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if size < 1 or ranks % size:
            raise ConfigError(
                f"sequence_parallel_size {size} does not divide the number of ranks, {ranks}"
            )
        self._size = size
        shared = [list(range(first, first + size)) for first in range(0, ranks, size)]
        apart = [list(range(first, ranks, size)) for first in range(size)]
        self._shared = _own_group(shared, rank)
        self._apart = _own_group(apart, rank)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's sequences."""
        return self._shared

    def get_sequence_parallel_world_size(self) -> int:
        """How many these are."""
        return self._size

    def get_sequence_parallel_rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank() % self._size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that have the same part of other sequences."""
        return self._apart

    def get_data_parallel_world_size(self) -> int:
        """How many these are."""
        return dist.get_world_size() // self._size

    def get_data_parallel_rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank() // self._size


class UlyssesSPAttentionHF:
    """``register_with_transformers``: attention over ranks for models of Transformers."""

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Any,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> SequenceGroups | None:
        """Have an attention of Transformers exchange heads around itself, in this process.

        Collective over all ranks. Models get parts of sequences, with ``position_ids`` that say
        where they are; where these begin again, packed sequences attend within their own. Padding
        masks are refused: pad at the end, where no token looks.

        Args:
            model_name_or_path: name of the model, or the model, whose heads are then checked now.
            core_attn_implementation: name of the attention, which the model has to use.
            sequence_parallel_size: ranks that share a sequence.
            micro_batch_size: rows; checked where lengths are fixed.
            seq_length: tokens of a whole sequence; needed where lengths are fixed.
            seq_length_is_variable: false to refuse other shapes.
            disable_in_eval: let models in evaluation attend to what their rank has.
            max_length: older name of ``seq_length``.

        Returns:
            What ``initialize`` takes as ``mpu``; ``None`` for one rank.

        Raises:
            ConfigError: an attention that has no such name, or computes all scores; heads that
                ranks cannot share; a model that uses another attention.
        """
        if sequence_parallel_size == 1:
            return None
        modeling: Any = sys.modules.get("transformers.modeling_utils")
        if modeling is None:
            import transformers.modeling_utils as modeling
        name = core_attn_implementation
        if name == "eager":
            raise ConfigError("eager attention has all scores in memory: take sdpa")
        known = modeling.ALL_ATTENTION_FUNCTIONS
        if name not in known and name != "sdpa":
            raise ConfigError(
                f"Transformers knows no attention {name!r}, but {', '.join(sorted(known.keys()))}"
            )
        _check_model(model_name_or_path, name, sequence_parallel_size)
        length = max_length if seq_length is None else seq_length
        if not seq_length_is_variable and length is None:
            raise ConfigError("seq_length is needed where seq_length_is_variable is false")
        groups = SequenceGroups(sequence_parallel_size)
        fixed = None if seq_length_is_variable else (micro_batch_size, length)
        inner = known[name]
        while hasattr(inner, "drivetrain_inner"):  # registered before
            inner = inner.drivetrain_inner
        line = GroupLine(groups.get_sequence_parallel_group())
        attend = _attention(inner, name, line, fixed, disable_in_eval)
        modeling.AttentionInterface.register(name, attend)
        return groups


class UlyssesSPDataLoaderAdapter:
    """Gives ranks their parts of the batches of all of them, one batch after the other.

    Each rank's loader has batches of its own; ``sp_world_size`` steps over this one see each of
    them, as one step over data-parallel ranks would.

    Args:
        dl: yields dicts with ``input_ids``, ``position_ids`` and ``labels``, [b, S] alike on all
            ranks.
        sp_rank: this rank, of those of a sequence.
        sp_group: these ranks.
        sp_world_size: how many they are.
        device: where batches meet; ``None`` for the CPU.
    """

    def __init__(
        self,
        dl: Any,
        sp_rank: int,
        sp_group: dist.ProcessGroup | None,
        sp_world_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.dl = dl
        self.sp_rank = sp_rank
        self.sp_group = sp_group
        self.sp_world_size = sp_world_size
        self.device = torch.device("cpu" if device is None else device)

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.dl:
            yield from self._parts(batch)

    def _parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """This rank's part of each rank's batch, with ``shift_labels`` in place of labels.

        Raises:
            TrainingError: something is missing, or the tokens cannot be shared out.
        """
        if missing := [k for k in ("input_ids", "position_ids", "labels") if k not in batch]:
            raise TrainingError(
                f"a batch without {', '.join(missing)} cannot be shared out; it has "
                f"{', '.join(batch)}"
            )
        shape = batch["input_ids"].shape
        if shape[1] % self.sp_world_size:
            raise TrainingError(
                f"{shape[1]} tokens cannot be cut into {self.sp_world_size} equal parts: pad them, "
                "with -100 as label"
            )
        for name, value in batch.items():  # before ranks meet
            if isinstance(value, torch.Tensor) and value.shape[:2] != shape:
                raise TrainingError(
                    f"{name} of shape {tuple(value.shape)} is not one for each of {shape[1]} "
                    f"tokens of {shape[0]} rows, so it cannot be cut"
                )
        whole: list[dict[str, Any]] = [{} for _ in range(self.sp_world_size)]
        for name, value in batch.items():
            for found, own in zip(whole, self._gathered(value), strict=True):
                found[name] = own
        part = slice(*(shape[1] // self.sp_world_size * (self.sp_rank + i) for i in (0, 1)))
        for found in whole:
            found["shift_labels"] = shifted(found.pop("labels"))
            for name, value in found.items():
                if isinstance(value, torch.Tensor):
                    found[name] = value[:, part].contiguous().cpu()
        return whole

    def _gathered(self, value: Any) -> list[Any]:
        """What every rank has in the place of ``value``."""
        if self.sp_world_size == 1:
            return [value]
        if not isinstance(value, torch.Tensor):
            found: list[Any] = [None] * self.sp_world_size
            dist.all_gather_object(found, value, group=self.sp_group)
            return found
        own = value.to(self.device).contiguous()
        others = [torch.empty_like(own) for _ in range(self.sp_world_size)]
        dist.all_gather(others, own, group=self.sp_group)
        return others


class FPDT_InputConstruct:  # noqa: N801  # DeepSpeed's name
    """A rank's part of a batch for models that are computed in chunks of the sequence.

    Of every chunk of all tokens each rank has its part, as with ``sequence_parallel.chunk``; there
    ``sequence_parallel.inputs: whole`` takes what this makes.

    Args:
        tokens: [b, S].
        labels: [b, S] or ``None``.
        loss_mask: [b, S] or ``None``.
        attention_mask: passed on as it is.
        position_ids: [b, S] or ``None``.
        args: has ``ds_sequence_parallel_fpdt_chunk_size``, tokens of a chunk.
        sp_size: ranks that share a sequence.
        sp_rank: this one.

    Raises:
        ConfigError: the tokens cannot be shared out.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        args: Any,
        sp_size: int,
        sp_rank: int,
    ) -> None:
        chunk, length = int(args.ds_sequence_parallel_fpdt_chunk_size), tokens.shape[1]
        if length % chunk or chunk % sp_size:
            raise ConfigError(
                f"{length} tokens in chunks of {chunk} (ds_sequence_parallel_fpdt_chunk_size) "
                f"cannot be shared out over {sp_size} ranks: each has to divide the one before"
            )
        self._parts = (tokens, labels, loss_mask)
        self._attention_mask = attention_mask
        self._position_ids = position_ids
        self._places = Cut(sp_size, chunk=chunk).of_rank(length, sp_rank).to(tokens.device)

    def generate(self) -> tuple[Any, ...]:
        """Tokens, labels, loss mask, attention mask and position ids of this rank."""
        *parts, positions = (
            None if x is None else x[:, self._places] for x in (*self._parts, self._position_ids)
        )
        return *parts, self._attention_mask, positions


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    made = [dist.new_group(ranks) for ranks in groups]
    own = next(group for ranks, group in zip(groups, made, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own


def _check_model(model: Any, name: str, size: int) -> None:
    config = getattr(model, "config", None)
    if config is None:
        return
    if config._attn_implementation != name:
        raise ConfigError(
            f"the model's attention is {config._attn_implementation!r}, but "
            f"core_attn_implementation is {name!r}: give both the same"
        )
    heads = config.num_attention_heads
    HeadShare.of(heads, getattr(config, "num_key_value_heads", None) or heads, size)


def _attention(
    inner: Any,
    name: str,
    line: GroupLine,
    fixed: tuple[int, int | None] | None,
    training_only: bool,
) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The attention of Transformers that exchanges heads around ``inner``."""

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **others: Any,
    ) -> tuple[torch.Tensor, Any]:
        if training_only and not module.training:
            result: tuple[torch.Tensor, Any] = inner(
                module, query, key, value, attention_mask, *args, **others
            )
            return result
        shape = (query.shape[0], query.shape[2] * line.size)
        if fixed is not None and shape != fixed:
            raise TrainingError(
                f"attention is registered for {fixed[0]} rows of {fixed[1]} tokens, and has "
                f"{shape[0]} of {shape[1]}: set seq_length_is_variable"
            )
        causal = others.pop("is_causal", None)
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        own = others.pop("position_ids", None)
        if own is None:
            raise TrainingError("position_ids are needed: the places of this rank's tokens")
        own = own.expand(query.shape[0], -1)
        _refuse_padding(attention_mask, own, causal)
        positions = line.all_gather(own.t().contiguous()).t().contiguous()
        heads, share = query.shape[1], HeadShare.of(query.shape[1], key.shape[1], line.size)
        query, key, value = to_heads(line, query, key, value)
        if name == "sdpa":
            facts = _facts(others, causal, positions, share.queries[line.rank])
            whole = torch_attention(module, query, key, value, facts)
        else:
            others |= {"position_ids": positions, "is_causal": causal}
            whole = _by_another(inner, module, (query, key, value), *args, **others)
        return from_heads(line, whole.contiguous(), heads), None

    attend.drivetrain_inner = inner  # type: ignore[attr-defined]
    return attend


def _by_another(
    inner: Any, module: Any, heads: tuple[torch.Tensor, ...], *args: Any, **others: Any
) -> torch.Tensor:
    """Attention of Transformers of these heads, which may be other ones than the module has."""
    query, *pairs = heads
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in pairs)
    alike = SimpleNamespace(
        training=module.training,
        is_causal=others["is_causal"],
        config=module.config,
        num_key_value_groups=1,
    )
    output: torch.Tensor = inner(alike, query, key, value, None, *args, **others)[0]
    return output


def _facts(
    others: Mapping[str, Any], causal: bool, positions: torch.Tensor, heads: range
) -> AttentionFacts:
    sinks = others.get("s_aux")
    return AttentionFacts(
        scale=others.get("scaling"),
        causal=causal,
        window=others.get("sliding_window"),
        dropout=others.get("dropout", 0.0),
        segments=segments_of(positions),
        softcap=others.get("softcap"),
        sinks=None if sinks is None else sinks[heads.start : heads.stop],
    )


def _refuse_padding(mask: Any, positions: torch.Tensor, causal: bool) -> None:
    """Refuse a mask that hides more of a rank's tokens than causality and packing do."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return
    length = positions.shape[1]
    segments = segments_of(positions)
    seen = torch.ones(1, length, length, dtype=torch.bool, device=mask.device)
    if segments is not None:
        seen = segments[:, :, None] == segments[:, None, :]
    seen = seen.tril() if causal else seen
    given = mask if mask.dtype == torch.bool else mask == 0
    if given.shape[-2:] != (length, length) or bool((seen[:, None] & ~given).any()):
        raise TrainingError(
            "a mask hides tokens from others, and ranks that share sequences by "
            "UlyssesSPAttentionHF know no masks: pad at the end and leave out attention_mask, or "
            "use the config's sequence_parallel_size, which shares masks out"
        )
