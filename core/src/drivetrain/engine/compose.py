"""How an engine is put together, in one visible order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from drivetrain.checkpoint.agreement import worst
from drivetrain.contracts.loop.transform import Phase, Transform
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.job.ownership import lent_modules, refuse_kept_elsewhere
from drivetrain.job.progress import Progress
from drivetrain.job.spmd_guard import check_same_model
from drivetrain.modules.attention import connect_attention
from drivetrain.modules.materialize import WeightSource, has_meta, materialize
from drivetrain.modules.places import move
from drivetrain.optimization.facade import check_groups
from drivetrain.optimization.factory import optimizer_plan, rule_from_optimizer
from drivetrain.optimization.schedule_choice import adopt_schedule, make_schedule
from drivetrain.plan.plan import ModelObjects
from drivetrain.precision.precision import Precision, loss_scaler
from drivetrain.sections.optimization import OptimizerSection, SchedulerSection

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import OptimizerPlan
    from drivetrain.job.job import Job
    from drivetrain.optimization.facade import EngineOptimizer

logger = logging.getLogger("drivetrain.engine")

ClientOptimizer = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
"""A torch optimizer over the module's parameters, or a callable that makes one of them."""


_ELSEWHERE = ": it has none, or other ranks keep all of them (experts, or stages)"


@torch.inference_mode(False)  # tensors made in it could not be trained
def build_engine(
    job: Job,
    module: nn.Module,
    optimizer: ClientOptimizer | None = None,
    *,
    parameters: Iterable[Any] | None = None,
    scheduler: Any | None = None,
    training_data: Any | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    weights: WeightSource | None = None,
    engine_type: type[Engine] = Engine,
) -> Engine:
    """Put a module to work in a job. Collective: every rank builds the same engine.

    The order matters. The module is partitioned where the client left it, so that only this rank's
    part gets memory and travels to the device. What happens then is told by facts about parameters,
    so these come first. States come before compilation, so that hooks which gather or reduce stay
    outside compiled graphs.

    Args:
        job: device, mesh, communication.
        module: the client's module; changed in place.
        optimizer: the client's; ``None`` takes the config's, if it names one.
        parameters: what the config's optimizer trains: parameters, (name, parameter) pairs or
            group dicts; all of the module's by default. ``()`` for an engine without optimizer.
        scheduler: the client's schedule, or a callable of an optimizer; ``None``: the config's.
        training_data: dataset of ``engine.training_dataloader``.
        collate_fn: makes a micro-batch of a list of samples.
        weights: values of what is on the meta device; see
            :func:`~drivetrain.modules.materialize.materialize`.
        engine_type: class of the engine; a subclass may add to its surface.

    Returns:
        The engine; without any optimizer it only runs forward.

    Raises:
        ConfigError: the optimizer does not fit the module, names and parameters are wrong, or
            another engine keeps parameters that this one would change.
        CheckpointError: ``weights`` do not fit the module, or are damaged.
    """
    plan, hub = job.plan, job.hub
    _refuse_unserved(job, module)
    precision = Precision.of(plan)
    client = _known_to_client(job, module)
    training = optimizer is not None or plan.section(OptimizerSection).type is not None
    transforms = hub.transform_module(job, module, training)
    module = _apply(transforms, module, Phase.ADAPT, Phase.PARTITION)
    _describe(job, module, precision)
    module = _apply(transforms, _on_device(job, module, weights), Phase.RECOMPUTE)
    work = _optimizer_plan(job, module, optimizer, parameters, client)
    _check_model(job, module, work)
    job.values.agree(None if job.failures is None else job.communicator, job.device)
    precision.cast_buffers(module, lent_modules(module, None))
    states = hub.build_model_states(job, module, work)
    assert states is not None, "core's default states answer last"
    with ExitStack() as undone:  # what fails from here on leaves the module to a better try
        undone.callback(states.detach)
        undone.callback(disconnect := connect_attention(job, module))
        module = _apply(transforms, module, Phase.COMPILE, Phase.SURROUND)
        engine = engine_type(
            job,
            module,
            states,
            precision=precision,
            loss_scaler=loss_scaler(plan),
            progress=Progress() if job.engines else job.progress,  # the job's: the first's
        )
        if work is not None:
            engine.optimizer = _facade(job, engine, work, optimizer)
        engine.lr_scheduler = _schedule(job, engine.optimizer, scheduler)
        runner = hub.build_runner(job, engine)
        assert runner is not None, "core's default runner answers last"
        engine.runner = runner
        if training_data is not None:
            engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
        undone.pop_all()
    engine.on_destroy(disconnect)
    return engine


def _known_to_client(job: Job, module: nn.Module) -> set[int]:
    """Make parameters known to the job; returns their ids, which keep none that ranks drop."""
    job.parameters.register(module, reduction="data")
    return {id(parameter) for parameter in module.parameters()}


def plugins_of_objects(module: nn.Module) -> dict[str, ModelObjects]:
    """Config paths of plugins that classes in ``module`` name -> what these are."""
    found: dict[str, ModelObjects] = {}
    for part in module.modules():
        path = getattr(type(part), "drivetrain_plugin", None)
        if isinstance(path, str):
            known = found.setdefault(path, ModelObjects(type(part).__name__))
            wish = getattr(part, "drivetrain_wish", None)
            if wish is not None and wish not in known.wishes:
                found[path] = replace(known, wishes=(*known.wishes, wish))
    return found


def _refuse_unserved(job: Job, module: nn.Module) -> None:
    """Check that plugins which objects in ``module`` need take part in the plan.

    Raises:
        ConfigError: one does not; says what to write into the config.
    """
    for path, found in plugins_of_objects(module).items():
        entry = job.plan.registry.find("plugins", path)
        if entry is None or not any(type(p) is entry.load() for p in job.plan.plugins):
            raise ConfigError(
                f"the model has a {found.kind}, which needs the plugin {path!r}, and the plan does "
                f'not have it or switches it off: write "{path}": {{}} into the config (a job '
                "that is opened without a model cannot know)"
            )


def _check_model(job: Job, module: nn.Module, work: OptimizerPlan | None) -> None:
    """Refuse a module that differs between ranks, or that another engine would change."""
    groups = () if work is None else work.groups
    check_same_model(job, module, groups)
    refuse_kept_elsewhere(job, module, groups)


def _describe(job: Job, module: nn.Module, precision: Precision) -> None:
    job.parameters.register(module, reduction="data")  # what transforms have added
    precision.describe(module, job.parameters)
    job.hub.describe_parameters(job, module)


def _on_device(job: Job, module: nn.Module, weights: WeightSource | None) -> nn.Module:
    """Give this rank's part of the module memory, values, and a place on the device."""
    if job.device.type == "meta":  # a rehearsal: nothing will run
        return move(module, job.device, job.parameters)
    if has_meta(module):
        check_same_model(job, module, ())  # before ranks meet to make it
        keep = partial(job.hub.keep_parameters, job)
        materialize(module, weights, job=job, made=keep)
    elif weights is not None:
        raise ConfigError(
            "weights are for what is on the meta device, and all of the module has memory already: "
            "construct it under torch.device('meta')"
        )
    return move(module, job.device, job.parameters)


def _apply(transforms: Sequence[Transform], module: nn.Module, *phases: Phase) -> nn.Module:
    for phase in phases:
        for transform in transforms:
            if transform.phase is phase:
                module = transform.apply(module)
    return module


def _optimizer_plan(
    job: Job,
    module: nn.Module,
    optimizer: ClientOptimizer | None,
    parameters: Iterable[Any] | None,
    client: Container[int],
) -> OptimizerPlan | None:
    """What is trained, and how; of parameters with an id in ``client``, those of this rank."""
    section = job.plan.section(OptimizerSection)
    if optimizer is not None:
        if section.type is not None:
            logger.info("optimizer of the config (%s) is overridden by the client's", section.type)
        if not isinstance(optimizer, Optimizer) and callable(optimizer):
            optimizer = optimizer(list(parameters or module.parameters()))
        work = rule_from_optimizer(optimizer)
    elif section.type is not None and parameters not in ((), []):
        trained = list(parameters) if parameters is not None else list(module.parameters())
        work = optimizer_plan(section.type, section.params, trained, job.plan.registry, job)
    else:
        return None
    work = replace(work, rule=job.hub.wrap_update_rule(job, work.rule))
    names = {p: job.parameters.info(p).name for p in module.parameters()}
    for group in work.groups:  # transforms and the way to the device may have replaced some
        latest = [job.parameters.latest(parameter) for parameter in group["params"]]
        # What was the model's and is not any more, other ranks have: experts, or stages.
        group["params"] = [p for p in latest if p in names or id(p) not in client]
    problem = None
    try:
        if job.mesh.size("pp") > 1 and not any(parameter.requires_grad for parameter in names):
            raise ConfigError(
                f"pipeline.stages: all {len(names)} parameters of stage {job.mesh.coordinate('pp')}"
                " have requires_grad=False, so it has nothing to train: use fewer stages, or cut "
                "the model elsewhere (pipeline.partition)"
            )
        check_groups(work.groups, names)
    except ConfigError as error:
        none = not any(group["params"] for group in work.groups)
        problem = f"{error}{_ELSEWHERE if none else ''}"
    if (found := worst(job, problem)) is not None:
        raise ConfigError(found)
    return work


def _facade(
    job: Job, engine: Engine, work: OptimizerPlan, optimizer: ClientOptimizer | None
) -> EngineOptimizer:
    named = job.plan.section(OptimizerSection).type
    client = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else None
    return engine.optimizer_type(
        work.groups,
        {p: job.parameters.info(p).name for p in engine.module.parameters()},
        step=engine.step,
        zero_grad=engine.zero_grad,
        type_name=client or named or type(work.rule).__name__,
        defaults=work.rule.defaults,
    )


def _schedule(job: Job, optimizer: EngineOptimizer | None, client: Any | None) -> Any | None:
    section = job.plan.section(SchedulerSection)
    if client is None and section.type is None:
        return None
    if optimizer is None:
        logger.warning("the scheduler is ignored, since there is no optimizer whose rate it sets")
        return None
    if client is not None:
        return adopt_schedule(client, optimizer)
    assert section.type is not None
    return make_schedule(section.type, section.params, optimizer, job.plan.registry)


def require_module(model: object) -> nn.Module:
    """The model, if it is one.

    Raises:
        ConfigError: it is not a ``torch.nn.Module``.
    """
    if isinstance(model, nn.Module):
        return model
    raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
