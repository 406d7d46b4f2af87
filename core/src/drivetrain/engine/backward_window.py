"""Notice when a backward pass begins and ends, also where a script calls ``loss.backward()``.

The hooks sit on the tensors that the module returned. The first of them to fire marks the
beginning and queues a callback that autograd runs when the whole pass is over. (Queued from a
parameter's hook it would run too early: re-entrant checkpointing runs passes inside the pass.)
A pass that adds to no ``.grad``, such as that of ``torch.autograd.grad``, is not a backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.job.extra_losses import ExtraLosses, Factor, Note
    from drivetrain.precision.loss_scale import LossScaler


class BackwardPass:
    """Tells whether the backward pass in which it was made still runs.

    A pass that ends calls ``end``. One that an exception breaks off calls nothing, but autograd
    drops the callbacks of that pass, and :attr:`runs` becomes false. So what was begun with a
    pass can be ended in both cases.

    Args:
        end: called when the pass is over.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        final = _Final(end)
        self._final = weakref.ref(final)
        torch.autograd.Variable._execution_engine.queue_callback(final)

    @property
    def runs(self) -> bool:
        """Whether the pass has neither ended nor died."""
        return self._final() is not None


class _Final:
    """What autograd calls at the end of a pass; it has the only reference."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def __call__(self) -> None:
        self._end()


class BackwardWindow:
    """Calls ``begin`` once before and ``end`` once after each backward through watched outputs.

    Args:
        begin: runs before any gradient of the module is computed; may raise to stop the pass.
        end: runs after the last one.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end
        self._pass: BackwardPass | None = None
        self._announced = self._noticed = False

    @contextmanager
    def announced(self) -> Iterator[None]:
        """A backward runs inside the block for which all that ``begin`` does was done before.

        Its end is told also if it crosses no watched output.
        """
        self._announced, self._noticed = True, False
        try:
            yield
        finally:
            self._announced = False
        if not self._noticed:
            self._end()

    def watch(self, outputs: object) -> None:
        """Attach to every tensor in ``outputs`` that a backward pass can start from or cross.

        Parameters among them are left out; their gradients are noticed in any case.
        """
        for tensor in recorded_in(outputs):
            tensor.register_hook(self._on_output)  # type: ignore[no-untyped-call]

    def _on_output(self, _gradient: torch.Tensor) -> None:
        if (self._pass is not None and self._pass.runs) or not accumulates():
            return
        self.settle()
        if not self._announced:
            self._begin()
        self._noticed = True
        self._pass = BackwardPass(self._on_end)

    def settle(self) -> None:
        """Call ``end`` for a pass that died of an exception, which the client has caught."""
        if self._pass is not None and not self._pass.runs:
            self._on_end()

    def _on_end(self) -> None:
        self._pass = None
        self._end()


class ScaledLosses:
    """Knows whether the backward pass that runs is one of a loss that was scaled here.

    Passes of losses that need neither loss scale nor weight, nor have extra terms, are not noted.

    Args:
        terms: of the job's losses; told in each pass what they are multiplied by.
        note: takes the terms of such passes, for the loss that is reported.
        scaler: of the first pass, which a schedule may run without the engine.
    """

    def __init__(self, terms: ExtraLosses, note: Note, scaler: LossScaler) -> None:
        self._pass: BackwardPass | None = None
        self._terms = terms
        self._note = note
        self.goes_on(scaler, None)

    def scale(
        self, scaler: LossScaler, loss: torch.Tensor, weight: float | torch.Tensor | None
    ) -> torch.Tensor:
        """Apply ``scaler`` and ``weight`` to ``loss``; in float32 at least, if there are any."""
        scaled = scaler.scale(loss)
        if weight is not None:
            scaled = scaled.to(torch.promote_types(scaled.dtype, torch.float32)) * weight
        if scaler.active or weight is not None or self._terms.used:
            begins = partial(self._begins, scaler, weight)
            scaled.register_hook(begins)  # type: ignore[no-untyped-call]
        return scaled

    def goes_on(self, scaler: LossScaler, weight: Factor | None) -> None:
        """A pass comes whose loss another rank has scaled, and given ``weight``."""
        self._terms.begin(lambda: scaler.scale_value, weight, self._note)

    def is_plain(self) -> None:
        """A pass of a loss that was not scaled here has begun; its loss is not reported."""
        self._terms.begin(lambda: 1.0, None)

    @property
    def runs(self) -> bool:
        """Whether such a pass runs, or one inside of it."""
        return self._pass is not None and self._pass.runs

    def _begins(self, scaler: LossScaler, weight: Factor | None, _gradient: torch.Tensor) -> None:
        self.goes_on(scaler, weight)
        self._pass = BackwardPass(lambda: None)


def check_loss(loss: torch.Tensor) -> None:
    """Refuse what no backward can start from.

    Raises:
        TrainingError: it is no scalar, or has no graph.
    """
    shape = getattr(loss, "shape", None)
    if shape is None or loss.numel() != 1:
        got = type(loss).__name__ if shape is None else tuple(shape)
        raise TrainingError(f"backward needs a scalar loss, got {got}; reduce it, e.g. .mean()")
    if not loss.requires_grad:
        raise TrainingError(
            "the loss has no graph: it was detached, or computed under torch.no_grad(), or no "
            "trainable parameter took part in it"
        )


def starting_points(
    outputs: object, gradients: object
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors in ``outputs`` that have a graph, and the gradient given for each.

    Args:
        outputs: a tensor or nested tensors.
        gradients: nested alike.

    Raises:
        TrainingError: a gradient is missing, left over, or of another shape; nothing has a graph.
    """
    given = {path: gradient for path, gradient in _leaves(gradients) if gradient is not None}
    tensors, found = [], []
    for path, output in _leaves(outputs):
        gradient, name = given.pop(path, None), f"output{path}"
        if isinstance(output, torch.Tensor) and output.requires_grad:
            tensors.append(output)
            found.append(_fitting(name, output, gradient))
        elif gradient is not None:
            raise TrainingError(
                f"{name} ({type(output).__name__}) has no graph, but a gradient is given for it: "
                "was it detached, or computed under torch.no_grad()? If not, give None"
            )
        elif next(tensors_in(output), None) is not None and not isinstance(output, torch.Tensor):
            raise TrainingError(
                f"{name} is a {type(output).__name__}, whose tensors cannot be told from each "
                "other: pass them in a tuple or dict"
            )
    if given:
        path = next(iter(given))
        raise TrainingError(f"a gradient is given for output{path}, which is not among the outputs")
    if not tensors:
        raise TrainingError(
            "no output has a graph: they were detached, or computed under torch.no_grad(), or no "
            "trainable parameter took part in them"
        )
    return tensors, found


def _leaves(value: object) -> list[tuple[str, object]]:
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]


def _fitting(name: str, output: torch.Tensor, gradient: object) -> torch.Tensor:
    shape = tuple(output.shape)
    if not isinstance(gradient, torch.Tensor):
        got = "none" if gradient is None else type(gradient).__name__
        raise TrainingError(
            f"{name} of shape {shape} needs a gradient, got {got}: give zeros if nothing depends "
            "on it"
        )
    if gradient.shape != output.shape:
        raise TrainingError(
            f"the gradient of {name} has shape {tuple(gradient.shape)}, the output {shape}"
        )
    return gradient


def accumulates() -> bool:
    """Tell, in a hook, whether the pass under way adds to the ``.grad`` of tensors.

    ``torch.autograd.grad`` and ``torch.func`` do not. Autograd does not say so itself, but it says
    of each leaf whether it is going to be reached, so the nearest leaf of the graph is asked.
    """
    nodes = [torch._C._current_autograd_node()]
    known = set(nodes)
    leaves = 0
    for node in nodes:
        if type(node).__name__ == "AccumulateGrad":
            leaves += 1
            if _is_accumulated(node):
                return True
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                nodes.append(following)
    return leaves == 0


def _is_accumulated(leaf: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch answers in this way for an input of ``torch.autograd.grad``
        return False


def recorded_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in ``value`` that an operation has made, and that a backward can cross.

    Leaves are left out: a hook on a parameter would stay for as long as the parameter. A tensor
    that a transform of ``torch.func`` has wrapped is yielded at every level that has a graph.
    """
    functorch = torch._C._functorch
    for tensor in tensors_in(value):
        inner = tensor
        while functorch.is_functorch_wrapped_tensor(inner):
            if inner.grad_fn is not None:
                yield inner
            inner = functorch.get_unwrapped(inner)
        if inner.grad_fn is not None:
            yield inner


def tensors_in(value: object, _seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers: pytrees, mappings, dataclasses, plain objects."""
    seen = set() if _seen is None else _seen
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from tensors_in(_members(leaf), seen)


def _members(leaf: object) -> dict[Any, Any] | None:
    """What a leaf that torch does not know as a container contains; ``None`` for a true leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if isinstance(leaf, (type, torch.nn.Module)) or callable(leaf):
        return None
    return dict(vars(leaf)) if hasattr(leaf, "__dict__") else None
