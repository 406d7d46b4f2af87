"""What passes of each chunk cost: the numbers that the simulator's clocks run by."""

from __future__ import annotations

from dataclasses import dataclass

from drivetrain_pipeline.schedules.instruction import Kind


@dataclass(frozen=True)
class Costs:
    """Times and memory of one micro-batch, by chunk along the model.

    Any unit of time and of memory will do, the same for all.

    Args:
        forward: time of a forward.
        inputs: time of the gradients of inputs.
        weights: time of the gradients of weights.
        send: time of a message between two stages. It passes beside the computation.
        activations: memory from the begin of a forward to the end of the backward.
        kept: the part of it that stays from the end of the gradients of inputs to that of weights;
            None for all of it.
        fixed: memory of parameters, gradients and optimizer states.
        backward: time of a full backward; None if it takes as long as its two halves.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    send: float = 0.0
    activations: tuple[float, ...] = ()
    kept: tuple[float, ...] | None = None
    fixed: tuple[float, ...] = ()
    backward: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.forward)
        for name in ("inputs", "weights", "activations", "kept", "fixed", "backward"):
            values = getattr(self, name)
            left_out = values is None or (not values and name in ("activations", "fixed"))
            if not left_out and len(values) != count:
                raise ValueError(f"{name} of {len(values)} chunks, but forward of {count}")
        values = (*self.forward, *self.inputs, *self.weights, *(self.backward or ()), self.send)
        if any(not 0 <= value < float("inf") for value in values):
            raise ValueError("a time is negative or not finite")

    @classmethod
    def even(
        cls,
        chunks: int,
        *,
        forward: float = 1.0,
        inputs: float = 1.0,
        weights: float = 1.0,
        send: float = 0.0,
        activations: float = 1.0,
    ) -> Costs:
        """Costs of chunks that are all alike.

        Args:
            chunks: of the whole model.
            forward: time of a forward of one chunk.
            inputs: time of its gradients of inputs.
            weights: time of its gradients of weights.
            send: time of a message.
            activations: memory that one micro-batch of one chunk keeps.
        """
        return cls(
            (forward,) * chunks,
            (inputs,) * chunks,
            (weights,) * chunks,
            send,
            (activations,) * chunks,
        )

    def time(self, kind: Kind, chunk: int) -> float:
        """Time of one pass through a chunk."""
        if kind == "F":
            return self.forward[chunk]
        if kind == "I":
            return self.inputs[chunk]
        if kind == "W":
            return self.weights[chunk]
        if self.backward is not None:
            return self.backward[chunk]
        return self.inputs[chunk] + self.weights[chunk]
