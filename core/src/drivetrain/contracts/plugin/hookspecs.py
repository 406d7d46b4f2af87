"""Every hook of Drivetrain: the contract between core and plugins.

Hooks build objects; objects run the hot path. A hook runs at set-up, or once per forward, backward
or step; anything hotter goes through the object that a hook returned. Implementations may take any
subset of a hook's arguments, without defaults.

Kinds: *collect* (every answer counts), *first result* (the first answer that is not ``None`` wins;
core's own answer is asked last), *observe* (answers ignored).

Each docstring states: when it runs, on which ranks, whether it may communicate, what it may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from drivetrain.checkpoint.format.commit import PendingSave
    from drivetrain.contracts.loop.attention import AttentionLayer
    from drivetrain.contracts.loop.batch import Batch
    from drivetrain.contracts.loop.inference import Generates, InferenceRequest
    from drivetrain.contracts.loop.loading import LoaderRequest
    from drivetrain.contracts.loop.runner import Runner
    from drivetrain.contracts.loop.step_report import StepReport
    from drivetrain.contracts.loop.transform import Transform
    from drivetrain.contracts.plugin.plugin import Problem
    from drivetrain.contracts.state.bucket import BucketSpec, OptimizerPlan, UpdateRule
    from drivetrain.contracts.state.extra import StateReader, StateWriter
    from drivetrain.contracts.state.fragment import Fragment
    from drivetrain.contracts.state.home import StateHome
    from drivetrain.contracts.state.model_states import (
        GradientFilter,
        GradientNorm,
        GradientWatch,
        ModelStates,
    )
    from drivetrain.contracts.world.accelerator import Accelerator
    from drivetrain.contracts.world.axis import AxisRequest
    from drivetrain.contracts.world.communicator import CommunicatorLayer
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

HOOKSPEC_VERSION = 1
"""Raised when a hook changes incompatibly; plugins built for another value are refused by name."""

hookspec = pluggy.HookspecMarker("drivetrain")


# -- plan: no torch, no job ------------------------------------------------------------------


@hookspec
def configure(plan: Plan) -> Sequence[Problem]:
    """Check this plugin's sections against the rest of the plan.

    Collect. Once per plan, on every rank, before any device is touched. Must not communicate or
    change anything. All problems of all plugins are reported together as one ``ConfigError``.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def plan_batch(plan: Plan) -> Batch | None:
    """Decide the batch triple: global batch, micro-batch, accumulation steps.

    First result. Once per plan, on every rank; pure arithmetic. Raise ``ConfigError`` with the
    arithmetic when the numbers do not multiply.
    """


@hookspec
def mesh_axes(plan: Plan) -> Sequence[AxisRequest]:
    """Declare mesh axes: sizes of atoms (pp, dp, sp, tp) and named sets of atoms.

    Collect. Once per plan, on every rank; pure arithmetic.
    """
    raise NotImplementedError


# -- job: devices and communication ----------------------------------------------------------


@hookspec(firstresult=True)
def select_accelerator(
    candidates: Mapping[str, Accelerator], requested: str | None
) -> Accelerator | None:
    """Choose the accelerator of this process among candidates that probed well.

    First result. Once per process, on every rank, before the process group exists, so it must not
    communicate. ``requested`` is the config's or the environment's explicit wish; then it is the
    only candidate. An answer that is no candidate raises ``PluginError``.
    """


@hookspec
def wrap_communicator(job: Job) -> Sequence[CommunicatorLayer]:
    """Decorate the communicator: routing, compression, watchdogs, logs.

    Collect; layers are folded inside out by phase. Once per job, on every rank, after the process
    group exists. May create process groups through ``job.mesh``, the same ones on every rank.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def place_state(job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome] | None:
    """Give every bucket a home: the place that keeps its states and runs its update.

    First result. Once per engine with *all* bucket specs, on every rank. The answer is parallel to
    ``specs``. May allocate; must not communicate.
    """


# -- engine: module, states, loop ------------------------------------------------------------


@hookspec
def transform_module(job: Job, module: torch.nn.Module, training: bool) -> Sequence[Transform]:
    """Offer rewrites of the module, each with its phase: adapt, partition, recompute, ...

    Collect; transforms run by phase, in dependency order inside one. Once per engine, on every
    rank. ``training`` is false for an engine without an optimizer, which only serves: it has no
    backward to prepare for. Adapt and partition find the module where the client left it: on the
    host, the meta device or the job's, to which only what is left of it moves then. A transform
    that replaces a parameter calls ``job.parameters.replace(old, new)``.
    """
    raise NotImplementedError


@hookspec
def wrap_attention(job: Job) -> Sequence[AttentionLayer]:
    """Put layers around the function that computes attention.

    Collect; layers are folded inside out by phase. Once per engine, on every rank, after the module
    was partitioned, and again for one that generates with an attention of its own; may create
    process groups through ``job.mesh``, the same ones on every rank.
    The function is what ``drivetrain.attention`` calls, and the attention of every model of
    Transformers in the module, until the engine is destroyed. Without any layer nothing is changed.
    """
    raise NotImplementedError


@hookspec
def describe_parameters(job: Job, module: torch.nn.Module) -> None:
    """Fill in ``job.parameters.info(p)``: placement, reduction, distinct, dtypes.

    Collect. Once per engine, after the module was partitioned, on every rank; no communication.
    Tensors may have no memory yet.
    Facts about buffers are ``job.parameters.buffer(module, name)``: name, placement, reduction and
    distinct. What was built in place of the client's modules gets the client's names.
    """


@hookspec
def keep_parameters(job: Job, module: torch.nn.Module) -> None:
    """Keep own parameters of ``module``, a part of the model, otherwise than whole on the device.

    Collect. Once per part that was on the meta device, as soon as it has values, before the
    next part gets any; on every rank, in the order of ``named_modules``. May communicate if all
    ranks have the same parts. So no rank ever holds a model that is larger than its memory.
    """


@hookspec
def wrap_update_rule(job: Job, rule: UpdateRule) -> UpdateRule | None:
    """Put a rule of your own around the one that the config or the client chose.

    Folded: each answer is handed to the next plugin; ``None`` leaves the rule. Once per engine with
    an optimizer, on every rank, before states are built; no communication. The answer is a
    :class:`~drivetrain.contracts.state.bucket.WrappedRule`. Its states are cut, moved and saved
    like any optimizer's.
    """


@hookspec
def watch_gradients(job: Job) -> Sequence[GradientWatch]:
    """Look at this rank's gradients before they are summed over ranks.

    Collect. Once per engine, and again per ``engine.rebuild()``, on every rank. The answers are
    called in backward as ``watch(parameter, gradient)``, right before the gradient is sent: once
    for every parameter and reduction. ``gradient`` is this rank's sum, of a scaled loss, over the
    micro-batches since the last reduction. What is added to a parameter after that is shown in a
    call of its own. A watch must not change the gradient, keep it, or communicate.
    """
    raise NotImplementedError


@hookspec
def receive_gradients(job: Job) -> Sequence[GradientFilter]:
    """Change each gradient of this rank as it arrives, before it is added to others.

    Collect; each filter takes what the one before it returned. Once per engine, and again per
    ``engine.rebuild()``, on every rank. They are called as ``filter(parameter, gradient)`` for
    every accumulation of a backward, and for what a script has assigned to ``.grad``; the answer
    has the gradient's shape, on its device, in any floating dtype. Must not communicate.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def build_gradient_norm(job: Job) -> GradientNorm | None:
    """Provide what computes the norm that gradients are clipped by and reports show.

    First result. Once per engine, and again per ``engine.rebuild()``, on every rank; no
    communication.
    """


@hookspec(firstresult=True)
def build_model_states(
    job: Job, module: torch.nn.Module, optimizer: OptimizerPlan | None
) -> ModelStates | None:
    """Take ownership of parameters, gradients and optimizer state.

    First result. Once per engine, on every rank; may communicate (initial broadcast).
    ``optimizer`` is ``None`` when the engine only serves.
    """


@hookspec(firstresult=True)
def build_runner(job: Job, engine: Engine) -> Runner | None:
    """Provide the micro-batch loop behind ``engine.train_batch`` and ``engine.eval_batch``.

    First result. Once per engine, on every rank. Counters, step and checkpoints stay the engine's.
    """


@hookspec(firstresult=True)
def build_inference(
    job: Job, module: torch.nn.Module, request: InferenceRequest
) -> Generates | None:
    """Build an engine that generates with a module whose parameters have values.

    First result. Once per engine that generates, on every rank; may communicate. The module is that
    of an engine without optimizer, or of one that trains: it is read, and never changed.
    """


@hookspec(firstresult=True)
def build_loader(job: Job, request: LoaderRequest) -> Any | None:
    """Build the data loader for a dataset given to ``initialize`` or ``engine.deepspeed_io``.

    First result. Once per loader, on every rank; no communication.
    """


@hookspec
def prepare_inputs(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Change the arguments of one forward: truncate, cast, shard, add keywords.

    Folded: each answer feeds the next; ``None`` leaves the arguments. Once per forward, on every
    rank; may communicate if every rank does.
    """


@hookspec(firstresult=True)
def backward(
    engine: Engine,
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    retain_graph: bool,
) -> bool | None:
    """Run one backward pass as ``torch.autograd.backward`` does; answer ``True`` when done.

    It starts from one scaled loss, whose gradient is ``None``, or from outputs of a pipeline's
    stage with the gradients of each.

    First result. Once per ``engine.backward`` and ``engine.backward_from``, on every rank. Nothing
    may depend on it for correctness, since users may call ``loss.backward()`` themselves.
    """


@hookspec(firstresult=True)
def optimizer_step(engine: Engine) -> bool | None:
    """Finish reduction, check, clip, update and publish at an accumulation boundary.

    First result; wrappers allowed. Once per boundary, on every rank; communicates. Answers whether
    the update was applied.
    """


@hookspec
def step_end(engine: Engine, report: StepReport) -> None:
    """Look at what a step did. Values in ``report`` are computed when read.

    Observe. Once per boundary, on every rank. Must not change training state. Must communicate on
    all ranks or none.
    """


@hookspec
def save_state(engine: Engine, writer: StateWriter) -> None:
    """Write this plugin's own extra state into a checkpoint, as plain data or tensors.

    Collect. Once per save, on every rank; no communication. Keys begin with the plugin's name and a
    slash. A plugin that stores nothing, or lacks ``load_state``, makes the save fail.
    """


@hookspec
def state_fragments(engine: Engine) -> Sequence[Fragment]:
    """Describe tensors of this plugin that are cut over ranks, so that they reshard.

    Collect. Once per save and load, on every rank; no communication. Names begin with the plugin's
    name and a slash; the kind is ignored. ``tensor_fragment`` of
    ``drivetrain.contracts.state.home`` makes a
    fragment of a tensor. A load fills the boxes that each rank has now, whatever they were when
    saving; what the checkpoint lacks stays as it is.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def carry_out_save(engine: Engine, pending: PendingSave) -> bool | None:
    """Write a save that has been prepared, now or in the background; answer ``True``.

    First result. Once per save, on every rank; may communicate. Every rank calls ``pending.write``,
    and when all have voted rank 0 calls ``pending.commit``. Who writes later calls
    ``pending.snapshot`` first: the tensors change as soon as this returns.
    """


@hookspec
def load_state(engine: Engine, reader: StateReader) -> None:
    """Restore what ``save_state`` wrote.

    Collect. Once per load, on every rank.
    """


@hookspec
def report_rows() -> Sequence[tuple[str, str]]:
    """Lines for ``drivetrain report``: (label, value).

    Collect. Called outside a job; must not start devices or communicate.
    """
    raise NotImplementedError


@hookspec
def memory_rows(
    engine: Engine, block_activations: int, blocks: int
) -> Sequence[tuple[str, str, int, int]]:
    """Memory of one rank that is neither parameter nor state: (kind, place, bytes, locked bytes).

    Collect. Once per forecast (``drivetrain report --memory``), in one process that stands for a
    rank; ``engine`` was put together of tensors without memory (device ``meta``) and will not run.
    Places are ``"device"``, ``"host"`` and ``"nvme"``; locked bytes are a part of the host's. Rows
    of one kind are added up, so a plugin that moves something also returns a negative row for the
    place where it was. ``block_activations`` is what autograd saves, in bytes, in the forward of
    one of the model's ``blocks`` blocks; 0 if unknown. Must not communicate, allocate or touch
    files.
    """
    raise NotImplementedError
