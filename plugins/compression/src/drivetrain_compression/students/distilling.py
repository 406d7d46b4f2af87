"""Learn from a teacher: logits, hidden states, attention.

Terms are extra losses of the student's micro-batch, so accumulation, loss scale, weights and ranks
treat them as they treat the loss. Soft cross entropy with a temperature: Hinton et al. 2015,
arXiv:1503.02531, section 2. Hidden states and attention scores by mean squared error, as in Wu et
al. 2022, "XTC", arXiv:2206.01859, section 4. Terms that end before training does, and the
Kullback-Leibler divergence of logits: Rajbhandari et al. 2022, "DeepSpeed-MoE", arXiv:2201.05596,
section 4.2, where a mixture of experts with fewer layers (Mixture-of-Students) learns from its
teacher for the first part of its training and from the text alone in the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import open_jobs
from drivetrain_compression.students.terms import TermConfig

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine


def module_of(teacher: nn.Module) -> nn.Module:
    """The module of a teacher that may be an engine; has its paths and parameters."""
    found: nn.Module = teacher.module if hasattr(teacher, "job") else teacher  # type: ignore[assignment]
    return found


class Distillation:
    """Terms between two models that see the same inputs; removed by :meth:`close`.

    The teacher runs right before the student, on the student's arguments, in evaluation and without
    gradients. Where its layers are sharded it runs as an engine of its own. Once no term has a
    weight any more (``until_step``), it runs no longer.

    Args:
        student: the model that an engine trains.
        teacher: called with the same arguments; a module or an engine.
        terms: plain data, see :class:`TermConfig`.

    Raises:
        ConfigError: a module is missing.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Mapping[str, Any] | TermConfig],
    ) -> None:
        self._teacher = teacher
        self.terms = [TermConfig.model_validate(term) for term in terms]
        if not self.terms:
            raise ConfigError("distillation has no terms: give at least one")
        self._found: Engine | None = None
        self._given: dict[int, torch.Tensor] = {}
        self._student = student
        hooks = [student.register_forward_pre_hook(self._teach, prepend=True, with_kwargs=True)]
        root = module_of(teacher)
        for number, term in enumerate(self.terms):
            own = _submodule(student, term.student, "student")
            other = term.student if term.teacher is None else term.teacher
            hooks.append(own.register_forward_hook(self._learn(number, term)))
            known = _submodule(root, other, "teacher")
            hooks.append(known.register_forward_hook(self._note(number, term)))
        self._hooks = hooks

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._found = None
        self._given.clear()

    def _teach(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self._student.training and torch.is_grad_enabled()):
            return
        self._given.clear()
        if not self._is_due():
            return
        training = self._teacher.training
        self._teacher.eval()
        try:
            with torch.no_grad():
                self._teacher(*args, **kwargs)
        finally:
            self._teacher.train(training)

    def _note(self, number: int, term: TermConfig) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, outputs: Any) -> None:
            self._given[number] = _chosen(outputs, term, "teacher").detach()

        return note

    def _learn(self, number: int, term: TermConfig) -> Callable[..., Any]:
        def learn(module: nn.Module, _args: Any, outputs: Any) -> Any:
            if not (module.training and torch.is_grad_enabled()) or number not in self._given:
                return None
            own, given = _chosen(outputs, term, "student"), self._given[number]
            if own.shape != given.shape:
                raise TrainingError(
                    f"distillation: {term.student or 'the model'} returns {list(own.shape)} and "
                    f"the teacher {list(given.shape)}; choose modules of one shape"
                )
            engine = self._engine()
            weight = term.weight_at(engine.progress.steps)
            if not weight:
                return None
            value = _loss(own, given, term)
            # It rides on what the loss depends on; attention scores lead nowhere.
            return _carried(outputs, lambda t: engine.job.losses.add(t, value, weight))

        return learn

    def _is_due(self) -> bool:
        """Whether any term has a weight in this step."""
        if all(term.until_step is None for term in self.terms):
            return True
        steps = self._engine().progress.steps
        return any(term.weight_at(steps) for term in self.terms)

    def _engine(self) -> Engine:
        """The engine that trains the student.

        Raises:
            TrainingError: there is none.
        """
        if self._found is not None and self._found.job in open_jobs():
            return self._found
        own = {id(parameter) for parameter in self._student.parameters()}
        for job in reversed(open_jobs()):
            for engine in job.engines:
                if any(id(parameter) in own for parameter in engine.module.parameters()):
                    self._found = engine
                    return engine
        raise TrainingError(
            "distillation adds to the losses of an engine, and the student has none"
        )


def _loss(own: torch.Tensor, given: torch.Tensor, term: TermConfig) -> torch.Tensor:
    wide = own.dtype if own.dtype == torch.float64 else torch.float32
    own, given = own.to(wide), given.to(wide)
    if term.loss == "mse":
        return F.mse_loss(own, given)
    t = term.temperature
    wanted = F.softmax(given / t, dim=-1)
    found = -(wanted * F.log_softmax(own / t, dim=-1)).sum(-1).mean() * t**2
    if term.loss == "kl":
        found = found + torch.xlogy(wanted, wanted).sum(-1).mean() * t**2
    return found


def _chosen(outputs: Any, term: TermConfig, who: str) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor) and term.output == 0:
        return outputs
    try:
        found = outputs[term.output]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, torch.Tensor):
        raise TrainingError(
            f"distillation: output {term.output!r} of the {who}'s {term.student or 'model'} is no "
            f"tensor but {type(found).__name__}"
        )
    return found


def _carried(outputs: Any, carry: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Outputs whose first floating tensor carries a term."""
    if isinstance(outputs, torch.Tensor):
        return carry(outputs)
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                outputs[key] = carry(value)  # type: ignore[index]
                return outputs
    elif isinstance(outputs, (tuple, list)):
        for place, value in enumerate(outputs):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                parts = [*outputs[:place], carry(value), *outputs[place + 1 :]]
                return (
                    type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
                )
    raise TrainingError("distillation: a module of the student returns no tensor with a gradient")


def _submodule(model: nn.Module, name: str, who: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"distillation: the {who} has no module {name!r}") from None
