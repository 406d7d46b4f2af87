"""The engine that generates: requests in, steps, results out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from typing import Any

import torch
from torch import nn

from drivetrain.contracts import InferenceRequest
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain_inference import loading
from drivetrain_inference import requests as asked
from drivetrain_inference.adapters.adapter import Adapter
from drivetrain_inference.adapters.adapters import Adapters
from drivetrain_inference.admission import Limits, Prompt, checked, each_of
from drivetrain_inference.cache.blocks import BlockManager
from drivetrain_inference.cache.host import HostBlocks
from drivetrain_inference.cache.paged import PagedCache
from drivetrain_inference.cache.room import Agree, Room
from drivetrain_inference.fast.decode import Capture
from drivetrain_inference.fast.model import FastModel
from drivetrain_inference.models import choice
from drivetrain_inference.models.crossed import CrossedModel
from drivetrain_inference.models.plain import PlainModel
from drivetrain_inference.models.shared import SharedTokens
from drivetrain_inference.ragged import RaggedEngine, SchedulingResult
from drivetrain_inference.requests import Completion, Progress, SamplingParams
from drivetrain_inference.results import Result, best_of
from drivetrain_inference.sampling.beams import BeamSearch
from drivetrain_inference.sampling.groups import BeamGroup
from drivetrain_inference.sampling.speculation import Drafter
from drivetrain_inference.scheduler import Scheduler, Work
from drivetrain_inference.section import InferenceSection
from drivetrain_inference.text import GrowingText


class QueueFullError(DrivetrainError, RuntimeError):
    """As many requests wait as the config allows; try again later."""


class InferenceEngine:
    """Generates for many requests at once; one thread at a time may use it.

    Where several ranks compute a model together, all of them make the same calls in the same order;
    everything that they decide follows from those, so they stay together without messages.

    Attributes:
        lockstep: whether other ranks make the same calls.
        adapters: low-rank changes of the model that requests can choose.

    Args:
        module: of Transformers with values, which generates. It is read, never changed.
        section: limits and choices.
        request: tokenizer and stop tokens.
        formats: how weights lie in memory.
        shared: the ranks that share out the tokens of each forward; ``None`` for one.
        agree: gives ranks that compute the model together the least of their numbers; collective.

    Raises:
        ConfigError: the module cannot be served over a paged cache, or the cache would be too
            small for one sequence.
    """

    def __init__(
        self,
        module: nn.Module,
        section: InferenceSection,
        request: InferenceRequest,
        *,
        formats: choice.Formats | None = None,
        shared: SharedTokens | None = None,
        agree: Agree | None = None,
    ) -> None:
        self.module, self.section, self.tokenizer = module, section, request.tokenizer
        self.context = loading.context_of(module, request.context, section.max_context)
        self.stop_tokens = loading.stop_tokens_of(module) | set(request.stop_tokens)
        self._formats, self._shared = formats or choice.Formats(), shared
        model, self._plain = self._chosen()
        size = section.block_size
        self._start, self._numbers = loading.start_of(module), count()
        longest = asked.longest(self.context, self._start, size)
        room = Room.of(section, longest, model.layers, model.dtype, agree or list)
        blocks = BlockManager(room.blocks, size, prefix_caching=section.prefix_caching)
        self.cache = PagedCache(
            model.layers, blocks.blocks, size, dtype=model.dtype, device=model.device,
            form=section.cache_format,
        )  # fmt: skip
        self.scheduler = Scheduler(
            blocks,
            budget=section.max_batch_tokens,
            most_running=section.max_sequences,
            host=HostBlocks(self.cache, room.host) if room.host else None,
        )
        self.ragged = RaggedEngine(
            model,
            self.cache,
            blocks,
            budget=section.max_batch_tokens,
            most_sequences=section.max_sequences,
            most_tracked=section.max_tracked_sequences,
            context=self.context,
        )
        self.put, self.query = self.ragged.put, self.ragged.query
        self.can_schedule, self.flush = self.ragged.can_schedule, self.ragged.flush
        self._sampler = loading.sampler_of(module, self.stop_tokens)
        self._results: dict[int, list[Result]] = {}
        self._groups: dict[int, BeamGroup] = {}
        self._drafter: Drafter | None = None
        self.lockstep = False
        self._drafted = self._accepted = 0
        self._on_close: list[Callable[[], object]] = []
        self._capture: Capture | None = None
        self.adapters = Adapters(module, self._check_adapter)

    @property
    def fast(self) -> bool:
        """Whether the module's own code is left out."""
        return self.ragged.model is not self._plain

    # -- requests -----------------------------------------------------------------------------

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Queue a request; returns its number.

        Args:
            prompt: text, or tokens.
            params: how to sample.
            timeout: seconds from now after which it ends with what there is.

        Raises:
            ConfigError: the prompt is empty, too long, or has tokens that the model has not.
            QueueFullError: too many requests wait.
        """
        params = params or SamplingParams()
        tokens, adapter = self._checked(prompt, params), self.adapters.find(params.adapter)
        tokens, source = asked.laid(tokens, self._start, self.section.block_size)
        if timeout is not None and self.lockstep:
            raise ConfigError(
                "timeout: ranks compute each forward together and have no common clock, so one "
                "could end a request while another waits for it; cancel it on all of them instead"
            )
        if not self._has_room(params):
            raise QueueFullError(
                f"{len(self.scheduler.waiting)} sequences wait and {self.section.max_waiting} may; "
                "try again later, or raise inference.max_waiting"
            )
        number = next(self._numbers)
        deadline = None if timeout is None else time.monotonic() + timeout
        sequences = [
            asked.Sequence(number, index, tokens, params, deadline, adapter, source)
            for index in range(params.results)
        ]
        first, wanted = sequences[0], sequences
        if params.num_beams > 1:
            for each in sequences:
                each.beams = sequences
            search = BeamSearch.of(params, self._ends_of(params))
            self._groups[number] = BeamGroup(sequences, search, self._sampler)
            wanted = sequences[: params.n]
        else:
            first.siblings = sequences[1:]  # they begin when the prompt has been computed
        self.scheduler.add(first)
        self._results[number] = [
            Result(each, GrowingText(self.tokenizer, params.stop)) for each in wanted
        ]
        return number

    def speculate(self, drafter: Drafter) -> None:
        """Check tokens that ``drafter`` guesses, as many as the section says; before requests."""
        self._drafter = drafter

    def capture_with(self, capture: Capture) -> None:
        """Repeat forwards of few sequences as the accelerator can, on the fast path."""
        self._capture = capture
        if isinstance(self.ragged.model, FastModel):
            self.ragged.model.capture_with(capture)

    def cancel(self, request: int) -> list[Progress]:
        """End a request; one that is over already is no error."""
        return self._end_all(request, "cancelled")

    @staticmethod
    def sampling(**options: Any) -> SamplingParams:
        """How to sample, for a server that does not import this package.

        Raises:
            ConfigError: a name is not known, or a value is wrong.
        """
        known = SamplingParams.__dataclass_fields__
        if unknown := sorted(options.keys() - known.keys()):
            raise ConfigError(f"there is no way to sample by {', '.join(unknown)}")
        return SamplingParams(**options)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._results)

    def status(self) -> dict[str, float]:
        """Sequences that run and wait, and how full the cache is."""
        blocks = self.scheduler.blocks
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "cache_tokens": blocks.blocks * blocks.size,
            "cache_used": 1 - blocks.free / blocks.blocks,
            "preemptions": self.scheduler.preemptions,
            "swaps": self.scheduler.swaps,
            "drafted": self._drafted,
            "accepted": self._accepted,
        }

    # -- work ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Run one forward; returns what it has added."""
        done = self._end_overdue()
        work = self.scheduler.next()
        if not work.pieces:
            return done
        self._draft(work)
        self.cache.copy(work.copies)
        for away, places in work.returns:
            assert self.scheduler.host is not None
            self.scheduler.host.restore(away, places)
        pieces = [(seq.table, [*seq.slice(number), *seq.draft]) for seq, number in work.pieces]
        wanted = [1 + len(seq.draft) for seq, _ in work.pieces]
        ends = [at for at, (seq, number) in enumerate(work.pieces) if number == seq.pending]
        logits = self.ragged.run(pieces, wanted if self._drafter is not None else None)
        for sequence, number in work.pieces:
            self._computed(sequence, number)
        places = [0, *accumulate(wanted)]
        rows, sequences = self._with_siblings(ends, [seq for seq, _ in work.pieces], places)
        if rows:
            every = rows == [*range(len(logits))]
            chosen = self._sampler(logits if every else logits[rows], sequences)
            for row, sequence, first in zip(rows, sequences, chosen, strict=True):
                done += self._taken(sequence, logits[row : row + 1 + len(sequence.draft)], first)
        return done

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Completion]]:
        """Continue every prompt; for each its ``n`` results, in the order of the prompts.

        The queue's limit does not hold for it: it fills the queue as it empties.

        Raises:
            ConfigError: a prompt cannot be served; nothing has been computed.
        """
        todo = list(zip(prompts, each_of(params, len(prompts)), strict=True))
        for prompt, own in todo:
            self._checked(prompt, own)
            self.adapters.find(own.adapter)
        found: dict[int, dict[int, Completion]] = {}
        order: list[int] = []
        try:
            while len(order) < len(todo) or any(number in self._results for number in order):
                while len(order) < len(todo) and self._has_room(todo[len(order)][1]):
                    order.append(self.add(*todo[len(order)]))
                for progress in self.step():
                    if progress.completion is not None:
                        results = found.setdefault(progress.request, {})
                        results[progress.index] = progress.completion
        except BaseException:
            for number in order:
                self.cancel(number)
            raise
        return [[found[number][index] for index in sorted(found[number])] for number in order]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Progress]:
        """Yield the progress of one request; leaving the loop cancels it."""
        number = self.add(prompt, params)
        try:
            while number in self._results:
                yield from (each for each in self.step() if each.request == number)
        finally:
            self.cancel(number)

    def update_weights(self) -> None:
        """Take over the module's weights again, after training has changed them.

        Raises:
            ConfigError: requests run, whose texts would be a mixture.
        """
        if self.busy or self.ragged.tables:
            raise ConfigError("weights can be updated between requests only; some are running")
        self._plain.close()
        self.ragged.model, self._plain = self._chosen()
        if self._capture is not None:
            self.capture_with(self._capture)
        self.scheduler.blocks.forget()

    def close(self) -> None:
        """Cancel what runs and give the cache's memory back."""
        for number in list(self._results):
            self.cancel(number)
        for uid in list(self.ragged.tables):
            self.ragged.flush(uid)
        self._plain.close()
        self.ragged.model.close()
        self.cache.close()
        while self._on_close:
            self._on_close.pop()()

    def on_close(self, release: Callable[[], object]) -> None:
        """Have ``release`` called when the engine is closed."""
        self._on_close.append(release)

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------

    def _chosen(self) -> tuple[choice.Model, PlainModel | CrossedModel]:
        return choice.choose(
            self.module,
            self.section.fast_path,
            context=self.context,
            formats=self._formats,
            shared=self._shared,
        )

    def _check_adapter(self, adapter: Adapter) -> None:
        if self.lockstep:
            raise ConfigError(
                f"adapter {adapter.name}: ranks share the model out, and adapters are served by one"
            )
        choice.check_adapter(adapter, self.ragged.model, self._plain)

    def _checked(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        limits = Limits(
            self.section,
            self.context,
            self.scheduler.blocks.blocks,
            loading.vocabulary_of(self.module),
            crossed=self._start is not None,
        )
        return checked(prompt, params, self.tokenizer, limits)

    def _has_room(self, params: SamplingParams) -> bool:
        return len(self.scheduler.waiting) + params.results <= self.section.max_waiting

    def _ends_of(self, params: SamplingParams) -> frozenset[int]:
        own = () if params.ignore_eos else self.stop_tokens
        return frozenset((*params.stop_tokens, *own))

    def _draft(self, work: Work) -> None:
        """Add guesses to what decodes, as far as tokens and blocks are left."""
        if self._drafter is None:
            return
        able = [
            seq for seq, number in work.pieces
            if number == 1 == seq.pending and seq.output and not seq.beams
        ]  # fmt: skip
        most = min(self.section.speculative_tokens, self.scheduler.budget - work.tokens)
        blocks = self.scheduler.blocks
        for sequence, guess in zip(able, self._drafter.draft(able, most), strict=True):
            left = sequence.params.max_new_tokens - len(sequence.output) - 1
            count = min(len(guess), left, self.scheduler.budget - work.tokens)
            if count > 0 and blocks.needed(sequence.table, 1 + count) <= blocks.free:
                work.copies += blocks.extend(sequence.table, 1 + count)
                sequence.draft = guess[:count]
                work.tokens += count
                self._drafted += count

    def _computed(self, sequence: asked.Sequence, count: int) -> None:
        """Note that the next ``count`` tokens are in the cache."""
        size, length = self.scheduler.blocks.size, sequence.table.length
        if length // size == (length + count) // size:
            sequence.table.length = length + count
        else:  # a block is full
            self.scheduler.blocks.commit(sequence.table, sequence.tokens[: length + count])

    def _taken(
        self,
        sequence: asked.Sequence,
        logits: torch.Tensor,
        first: tuple[int, asked.TokenLogprobs | None],
    ) -> list[Progress]:
        """Take the tokens that a forward gave: one, and one more for each right guess."""
        group = self._groups.get(sequence.request)
        if group is not None:
            return self._moved(group, sequence, logits[0])
        draft, sequence.draft = sequence.draft, []
        (token, logprobs), done = first, list[Progress]()
        for guess, row in zip(draft, logits[1:], strict=True):
            done += self._append(sequence, token, logprobs)
            if sequence.finish_reason is not None or token != guess:
                return done
            self._accepted += 1
            self._computed(sequence, 1)
            ((token, logprobs),) = self._sampler(row[None], [sequence])
        return done + self._append(sequence, token, logprobs)

    def _moved(
        self, group: BeamGroup, sequence: asked.Sequence, logits: torch.Tensor
    ) -> list[Progress]:
        """Move a beam search on; at its end, its results."""
        if not group.take(sequence, logits, self.scheduler):
            return []
        done = []
        results = self._results[sequence.request]
        for result, beam in zip(results, group.search.results, strict=False):
            result.sequence.output = beam.output
            ended = beam.output[-1] in self._ends_of(sequence.params)
            for token in beam.output[: len(beam.output) - ended]:
                result.text.add(token)
            done += self._finish(result, "stop" if ended else "length")
        return done

    def _with_siblings(
        self, ends: list[int], sequences: list[asked.Sequence], places: list[int]
    ) -> tuple[list[int], list[asked.Sequence]]:
        """Rows of logits to sample from, and for which sequences."""
        rows, chosen = [], []
        for end in ends:
            sequence, row = sequences[end], places[end]
            rows.append(row)
            chosen.append(sequence)
            for sibling in sequence.siblings:
                if self.scheduler.fork(sequence, sibling):
                    rows.append(row)
                    chosen.append(sibling)
            sequence.siblings = []
        return rows, chosen

    def _append(
        self, sequence: asked.Sequence, token: int, logprobs: asked.TokenLogprobs | None
    ) -> list[Progress]:
        result = self._results[sequence.request][sequence.index]
        params = sequence.params
        sequence.output.append(token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
            sequence.score += logprobs.chosen
        ends = token in params.stop_tokens or (not params.ignore_eos and token in self.stop_tokens)
        if ends or result.text.add(token):
            return self._finish(result, "stop", token)
        if len(sequence.output) >= params.max_new_tokens:
            return self._finish(result, "length", token)
        if params.best_of is not None:
            return []  # which results are the best is known at the end
        text = result.text.take()
        return [Progress(sequence.request, sequence.index, token, text, logprobs=logprobs)]

    def _finish(
        self, result: Result, reason: asked.FinishReason, token: int | None = None
    ) -> list[Progress]:
        sequence = result.sequence
        sequence.finish_reason = reason
        if sequence in self.scheduler:
            self.scheduler.remove(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)
        if reason != "stop":
            result.text.finish()
        request = self._results[sequence.request]
        over = all(each.sequence.finish_reason is not None for each in request)
        if over:
            del self._results[sequence.request]
            group = self._groups.pop(sequence.request, None)
            if group is not None:
                group.remove(self.scheduler)
        if sequence.params.best_of is not None:
            return best_of(request, sequence.params) if over else []
        logprobs = sequence.logprobs[-1] if token is not None and sequence.logprobs else None
        text = result.text.take(last=True)
        completion = result.completion()
        return [Progress(sequence.request, sequence.index, token, text, completion, logprobs)]

    def _end_all(self, request: int, reason: asked.FinishReason) -> list[Progress]:
        results = self._results.get(request, [])
        running = [each for each in results if not each.sequence.finish_reason]
        return [progress for each in running for progress in self._finish(each, reason)]

    def _end_overdue(self) -> list[Progress]:
        late = {seq.request for seq in self.scheduler if seq.overdue()}
        return [
            progress for request in sorted(late) for progress in self._end_all(request, "deadline")
        ]


__all__ = ["InferenceEngine", "Prompt", "QueueFullError", "SchedulingResult"]
