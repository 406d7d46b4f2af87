"""Noticing, in hooks, how far autograd has come.

Hooks are attached to what operations have made, never to leaves, where they would stay for ever;
and no hook refers to the graph that it hangs on, which would keep the graph alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from drivetrain.engine.backward_window import recorded_in

if TYPE_CHECKING:
    from drivetrain_zero.gathering.unit import GatheredUnit

_GRAPH = "drivetrain_zero.graph"


def in_backward() -> bool:
    """Whether autograd runs a pass."""
    return current_pass() != -1


def current_pass() -> int:
    """The number of the innermost pass that autograd runs, or -1."""
    number: int = torch._C._current_graph_task_id()
    return number


def operations_so_far() -> int:
    """The number that autograd gives to the next operation that it records."""
    autograd: Any = torch.autograd  # it does not export the function
    number: int = autograd._get_sequence_nr()
    return number


def when_pass_ends(call: Callable[[], None]) -> None:
    """Call ``call`` when the innermost pass that autograd runs is over."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def beneath_transforms() -> AbstractContextManager[object]:
    """Inside the block ``torch.func`` transforms nothing, so parameters may be written."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that transforms of ``torch.func`` have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def call_before_backward(outputs: object, call: Callable[[Sequence[Any]], None]) -> None:
    """Call when backward comes to what made a tensor in ``outputs``, with the gradients there.

    Hooks on that node run after those on the tensor, by which the unit that took it as input is
    released: so the memory of one can be that of the other.
    """
    for tensor in recorded_in(outputs):
        assert tensor.grad_fn is not None
        tensor.grad_fn.register_prehook(call)


def keep_with_graph(kept: object, gradients: object) -> bool:
    """Keep an object for as long as the graph that made ``gradients``; False if there is none."""
    recorded = list(recorded_in(gradients))
    for tensor in recorded:
        node: Any = tensor.grad_fn  # torch types its metadata as a method
        node.metadata.setdefault(_GRAPH, []).append(kept)
    return bool(recorded)


@dataclass(eq=False)
class Graph:
    """What one pass through the model has recorded; alive as long as autograd's graph.

    Args:
        held: units that its backward needs, beside those that it comes to through their outputs.
        operations: autograd's numbers at the beginning and the end of a forward.
        is_over: its backward has come.
        is_kept: whether the graph keeps this object.
    """

    held: list[GatheredUnit] = field(default_factory=list)
    operations: tuple[int, int] = (0, 0)
    is_over: bool = False
    is_kept: bool = False


class InputsKnown:
    """Notices when autograd has the gradients of all tensors that a computation took as inputs.

    Leaves are not waited for: theirs may be known while the computation's backward goes on. This
    object has to live as long as the graph of the computation's outputs, and no longer.

    Args:
        inputs: what the computation takes.
        call: called with the gradient of each input.
        last: called after the last one.
    """

    def __init__(
        self, inputs: object, call: Callable[[torch.Tensor], None], last: Callable[[], None]
    ) -> None:
        self._left: dict[int, int] = {}
        recorded = list(recorded_in(inputs))
        self._nodes = [tensor.grad_fn for tensor in recorded if tensor.grad_fn is not None]
        for tensor in recorded:
            tensor.register_hook(partial(_count, self._left, call, last))  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        """The backward of the computation begins in the pass under way."""
        number = current_pass()
        if number not in self._left:
            coming = sum(map(torch._C._will_engine_execute_node, self._nodes))
            if coming:
                self._left[number] = coming


def _count(
    left: dict[int, int],
    call: Callable[[torch.Tensor], None],
    last: Callable[[], None],
    gradient: torch.Tensor,
) -> None:
    number = current_pass()
    if number not in left:
        return
    call(gradient)
    left[number] -= 1
    if not left[number]:
        del left[number]
        last()
