"""The engine that generates: requests in, steps, results out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from drivetrain.contracts import InferenceRequest
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain_inference import loading
from drivetrain_inference import requests as asked
from drivetrain_inference.cache.blocks import BlockManager
from drivetrain_inference.cache.paged import PagedCache
from drivetrain_inference.models import choice
from drivetrain_inference.ragged import RaggedEngine, SchedulingResult
from drivetrain_inference.requests import Completion, Progress, SamplingParams
from drivetrain_inference.sampling.sampler import Sampler
from drivetrain_inference.scheduler import Scheduler
from drivetrain_inference.section import InferenceSection
from drivetrain_inference.text import GrowingText

Prompt = str | Sequence[int]


class QueueFullError(DrivetrainError, RuntimeError):
    """As many requests wait as the config allows; try again later."""


@dataclass
class _Result:
    """What belongs to a sequence on the way to the client."""

    sequence: asked.Sequence
    text: GrowingText


class InferenceEngine:
    """Generates for many requests at once; one thread at a time may use it.

    Args:
        module: a causal language model of Transformers with values. It is read, never changed.
        section: limits and choices.
        request: tokenizer and stop tokens.
        formats: how weights lie in memory.

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
    ) -> None:
        self.module, self.section, self.tokenizer = module, section, request.tokenizer
        self.context = loading.context_of(module, request.context, section.max_context)
        self.stop_tokens = loading.stop_tokens_of(module) | set(request.stop_tokens)
        self._formats = formats or choice.Formats()
        model, self._plain = choice.choose(
            module, section.fast_path, context=self.context, formats=self._formats
        )
        size = section.block_size
        blocks = BlockManager(
            self._number_of_blocks(model), size, prefix_caching=section.prefix_caching
        )
        self.cache = PagedCache(
            model.layers, blocks.blocks, size, dtype=model.dtype, device=model.device
        )
        self.scheduler = Scheduler(
            blocks, budget=section.max_batch_tokens, most_running=section.max_sequences
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
        self._sampler = Sampler(frozenset(self.stop_tokens))
        self._results: dict[int, list[_Result]] = {}
        self._numbers = count()
        self._on_close: list[Callable[[], object]] = []

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
        tokens = self._checked(prompt, params)
        if not self._has_room(params):
            raise QueueFullError(
                f"{len(self.scheduler.waiting)} sequences wait and {self.section.max_waiting} may; "
                "try again later, or raise inference.max_waiting"
            )
        number = next(self._numbers)
        deadline = None if timeout is None else time.monotonic() + timeout
        sequences = [
            asked.Sequence(number, index, tokens, params, deadline) for index in range(params.n)
        ]
        first = sequences[0]
        first.siblings = sequences[1:]  # they begin when the prompt has been computed
        self.scheduler.add(first)
        self._results[number] = [
            _Result(each, GrowingText(self.tokenizer, params.stop)) for each in sequences
        ]
        return number

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
        }

    # -- work ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Run one forward; returns what it has added."""
        done = self._end_overdue()
        work = self.scheduler.next()
        if not work.pieces:
            return done
        self.cache.copy(work.copies)
        pieces = [(seq.table, seq.slice(number)) for seq, number in work.pieces]
        ends = [row for row, (seq, number) in enumerate(work.pieces) if number == seq.pending]
        logits = self.ragged.run(pieces)
        for sequence, number in work.pieces:
            end = sequence.table.length + number
            known = sequence.tokens if self._fills_a_block(sequence, number) else None
            if known is None:
                sequence.table.length = end
            else:
                self.scheduler.blocks.commit(sequence.table, known[:end])
        rows, sequences = self._with_siblings(ends, [seq for seq, _ in work.pieces])
        if rows:
            chosen = self._sampler(logits[rows], sequences)
            for sequence, (token, logprobs) in zip(sequences, chosen, strict=True):
                done.append(self._append(sequence, token, logprobs))
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
        todo = list(zip(prompts, self._each(params, len(prompts)), strict=True))
        for prompt, own in todo:
            self._checked(prompt, own)
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
        self.ragged.model, self._plain = choice.choose(
            self.module, self.section.fast_path, context=self.context, formats=self._formats
        )
        self.scheduler.blocks.forget()

    def close(self) -> None:
        """Cancel what runs and give the cache's memory back."""
        for number in list(self._results):
            self.cancel(number)
        for uid in list(self.ragged.tables):
            self.ragged.flush(uid)
        self._plain.close()
        self.cache.keys, self.cache.values = [], []
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

    def _number_of_blocks(self, model: choice.Model) -> int:
        size, section = self.section.block_size, self.section
        each = PagedCache.bytes_per_block(model.layers, size, model.dtype)
        useful = -(-self.context // size) * section.max_sequences
        number = min(section.cache_blocks or section.cache_bytes // each, useful)
        if number < 2:
            raise ConfigError(
                f"inference.cache_bytes: {section.cache_bytes} is less than two blocks of {each} "
                "bytes; give the cache more memory, or make block_size smaller"
            )
        return number

    def _checked(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("the prompt is text, and the engine has no tokenizer")
            prompt = self.tokenizer(prompt)["input_ids"]
        tokens = tuple(int(token) for token in prompt)
        if not tokens:
            raise ConfigError("the prompt is empty")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop is text, and the engine has no tokenizer; use stop_tokens")
        if params.n > self.section.max_waiting:
            raise ConfigError(
                f"n is {params.n}, and inference.max_waiting lets {self.section.max_waiting} wait"
            )
        vocabulary = loading.vocabulary_of(self.module)
        if vocabulary and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ConfigError(f"the prompt has tokens that are not in [0, {vocabulary})")
        whole = len(tokens) + params.max_new_tokens
        if whole > self.context:
            raise ConfigError(
                f"{len(tokens)} tokens of prompt and {params.max_new_tokens} new ones are more "
                f"than the context of {self.context}"
            )
        blocks = self.scheduler.blocks
        if -(-(whole - 1) // blocks.size) > blocks.blocks:
            raise ConfigError(
                f"{whole} tokens do not fit into the cache of {blocks.blocks * blocks.size}; raise "
                "inference.cache_bytes"
            )
        return tokens

    def _has_room(self, params: SamplingParams) -> bool:
        return len(self.scheduler.waiting) + params.n <= self.section.max_waiting

    @staticmethod
    def _each(
        params: SamplingParams | Sequence[SamplingParams] | None, number: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * number
        if len(params) != number:
            raise ConfigError(f"{len(params)} sampling parameters for {number} prompts")
        return list(params)

    def _fills_a_block(self, sequence: asked.Sequence, count: int) -> bool:
        size, length = self.scheduler.blocks.size, sequence.table.length
        return length // size != (length + count) // size

    def _with_siblings(
        self, ends: list[int], sequences: list[asked.Sequence]
    ) -> tuple[list[int], list[asked.Sequence]]:
        """Rows of logits to sample from, and for which sequences."""
        rows, chosen = [], []
        for row in ends:
            sequence = sequences[row]
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
    ) -> Progress:
        result = self._results[sequence.request][sequence.index]
        params = sequence.params
        sequence.output.append(token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        ends = token in params.stop_tokens or (not params.ignore_eos and token in self.stop_tokens)
        if ends or result.text.add(token):
            return self._finish(result, "stop", token)
        if len(sequence.output) >= params.max_new_tokens:
            return self._finish(result, "length", token)
        return Progress(
            sequence.request, sequence.index, token, result.text.take(), logprobs=logprobs
        )

    def _finish(
        self, result: _Result, reason: asked.FinishReason, token: int | None = None
    ) -> Progress:
        sequence = result.sequence
        sequence.finish_reason = reason
        if sequence in self.scheduler:
            self.scheduler.remove(sequence)
        if reason != "stop":
            result.text.finish()
        completion = Completion(
            tuple(sequence.output),
            result.text.text,
            reason,
            tuple(sequence.logprobs),
            sequence.cached_tokens,
        )
        request = self._results[sequence.request]
        if all(each.sequence.finish_reason is not None for each in request):
            del self._results[sequence.request]
        logprobs = sequence.logprobs[-1] if token is not None and sequence.logprobs else None
        text = result.text.take(last=True)
        return Progress(sequence.request, sequence.index, token, text, completion, logprobs)

    def _end_all(self, request: int, reason: asked.FinishReason) -> list[Progress]:
        results = self._results.get(request, [])
        return [self._finish(each, reason) for each in results if not each.sequence.finish_reason]

    def _end_overdue(self) -> list[Progress]:
        late = {seq.request for seq in self.scheduler if seq.overdue()}
        return [
            progress for request in sorted(late) for progress in self._end_all(request, "deadline")
        ]


__all__ = ["InferenceEngine", "QueueFullError", "SchedulingResult"]
