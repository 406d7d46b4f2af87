"""An engine that turns texts into vectors, or sorts them into classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_inference.encoders.pooling import Head

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Classified:
    """What a classifier says of one text.

    Args:
        label: the likeliest.
        scores: label -> probability; for several labels at once each by itself. A model with one
            label gives its score as it is.
    """

    label: str
    scores: dict[str, float]


class Encoder:
    """Runs texts through an encoder in batches of like length.

    Texts are sorted by length, and each batch holds as many as ``most_tokens`` has room for,
    padding included, so little is computed for nothing. A text's result depends on its batch in the
    last bits at most.

    Args:
        module: returns hidden states, or the logits of classes, for ``input_ids`` and
            ``attention_mask``.
        tokenizer: for texts; ``None``: prompts are tokens.
        head: makes vectors of hidden states; ``None`` for a classifier.
        context: most tokens of a text.
        most_tokens: of a batch.
        release: called when the encoder is closed.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any | None,
        head: Head | None,
        *,
        context: int,
        most_tokens: int,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self.module, self.tokenizer, self.context = module, tokenizer, context
        self._head, self._most, self._release = head, most_tokens, release
        self._device = next(module.parameters()).device
        if head is not None:
            head.to(self._device)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.embed([[0]]).shape[1]

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of one text, with the tokenizer's special ones.

        Raises:
            ConfigError: there are none, more than the context, or no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("the model has no tokenizer, so prompts must be tokens")
            taken: Sequence[int] = self.tokenizer(prompt, truncation=False)["input_ids"]
            prompt = taken
        found: list[int] = list(prompt)
        if not found:
            raise ConfigError("a text is empty")
        if len(found) > self.context:
            raise ConfigError(
                f"a text has {len(found)} tokens, and the model takes {self.context}; cut it"
            )
        return found

    @torch.no_grad()
    def embed(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """One vector for each text (or list of tokens).

        Returns:
            fp32 [texts, dimensions] in host memory.

        Raises:
            ConfigError: the model classifies, or a text cannot be taken (:meth:`tokens`).
        """
        if self._head is None:
            raise ConfigError("the model sorts texts into classes and has no vectors; use classify")
        head = self._head
        return self._in_batches(prompts, lambda answer, mask: head(answer.last_hidden_state, mask))

    @torch.no_grad()
    def classify(self, prompts: Sequence[Prompt]) -> list[Classified]:
        """The class of each text (or list of tokens).

        Raises:
            ConfigError: the model has no classes, or a text cannot be taken (:meth:`tokens`).
        """
        if self._head is not None:
            raise ConfigError("the model has no classes; use embed")
        logits = self._in_batches(prompts, lambda answer, mask: answer.logits)
        config: Any = self.module.config
        if logits.shape[1] > 1:
            several = getattr(config, "problem_type", None) == "multi_label_classification"
            logits = logits.sigmoid() if several else logits.softmax(1)
        labels = [str(config.id2label[index]) for index in range(logits.shape[1])]
        return [
            Classified(labels[int(row.argmax())], dict(zip(labels, row.tolist(), strict=True)))
            for row in logits
        ]

    def close(self) -> None:
        """Give back what the encoder took for itself."""
        self._release()

    def _in_batches(
        self,
        prompts: Sequence[Prompt],
        result: Callable[[Any, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        rows = [self.tokens(prompt) for prompt in prompts]
        if not rows:
            raise ConfigError("there are no texts")
        order: list[int] = []
        found: list[torch.Tensor] = []
        for batch in _batches([len(row) for row in rows], self._most):
            longest = len(rows[batch[0]])
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for place, row in enumerate(batch):
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
                mask[place, : len(rows[row])] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            answer = self.module(input_ids=ids, attention_mask=mask)
            found.append(result(answer, mask).float().cpu())
            order += batch
        return torch.cat(found)[torch.tensor(order).argsort()]


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of texts, longest first, in batches of at most ``most`` tokens with padding."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
