"""``ZeroStates``: model states of which every data-parallel rank keeps a shard."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.checkpoint.redistribute import kept_on_host, redistribute
from drivetrain.contracts import Fragment, ModelStates, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.job.ownership import Owner, lent
from drivetrain.states.buckets import BucketSizes, plan_buckets
from drivetrain.states.changed_parameters import ParameterWatch, refuse_unlike_copies
from drivetrain.states.device_home import step_fragments
from drivetrain.states.gradient_norm import gradient_norm
from drivetrain.states.gradients import GradientReducer, Slot, of_reducer
from drivetrain.states.loose import loose_fragments, synchronise_loose, trained_parameters
from drivetrain_zero.compressed.layers import kept_errors
from drivetrain_zero.gathering import released
from drivetrain_zero.gathering.gatherer import Gatherer
from drivetrain_zero.gathering.handle import ShardedParameter, leave_whole
from drivetrain_zero.gathering.order import CommonOrder, wider_axes
from drivetrain_zero.gathering.out_of_order import agreement_of
from drivetrain_zero.gathering.unit import (
    GatheredUnit,
    Reason,
    UnitState,
    find_units,
    without_empty,
)
from drivetrain_zero.gathering.unit_hooks import UnitHooks
from drivetrain_zero.gathering.written import begin_publish, show_written
from drivetrain_zero.init.shards import refuse_other_layout
from drivetrain_zero.policy import ZeroPolicy
from drivetrain_zero.scripts.copies import guard_copies
from drivetrain_zero.shards.bucket import ShardedBucket
from drivetrain_zero.shards.frozen import bucketed, plan_frozen
from drivetrain_zero.shards.gradients import GradientMemory, ReduceScatterBucket
from drivetrain_zero.shards.passing_memory import most_gathered

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, OptimizerPlan
    from drivetrain.job.job import Job
    from drivetrain.states.buckets import PlannedBucket

_WHOLE_UNIT = BucketSizes(regular=2**62, first=2**62)


class ZeroStates(ModelStates):
    """Flat buckets of which each rank updates its shard.

    Args:
        job: communicator, mesh, homes.
        module: parameters are replaced in place by views of flat buckets, in compute dtype.
        optimizer: rule and groups; ``None`` for an engine that only serves.
        policy: what is sharded and how.

    Raises:
        ConfigError: the update rule cannot work on shards.
    """

    def __init__(
        self, job: Job, module: nn.Module, optimizer: OptimizerPlan | None, policy: ZeroPolicy
    ) -> None:
        self._job = job
        self._module = module
        self._optimizer = optimizer
        self._policy = policy
        self._buckets: list[ShardedBucket] = []
        self._sums: list[ReduceScatterBucket] = []
        self._gathering: UnitHooks | None = None
        self._owner = Owner(job, module, self)
        self._prefix = f"engine{len(job.engines)}." if job.engines else ""
        refuse_other_layout(job, module.parameters())
        trained = trained_parameters(optimizer)
        kept = bucketed(module.parameters(), trained, frozen=policy.frozen)
        synchronise_loose(job, module, set(kept))
        self._build({})

    # -- set-up -------------------------------------------------------------------------------

    def _build(self, steps: Mapping[str, int]) -> None:
        job, policy = self._job, self._policy
        units = self._units()
        self._memory = GradientMemory(job.communicator)
        planned = [(unit, plan) for unit in units for plan in self._plan(unit, steps)]
        for _, plan in planned:
            released.refuse_communicating(plan.spec.rule)
        self._buckets = []
        for unit, plan in planned:
            bucket = ShardedBucket(
                job,
                plan,
                *policy.axes(plan.spec.reduction),
                sharded=policy.by_unit and self._is_used_together(plan.spec.reduction),
                kept=policy.gather.until_update,
                rounds=policy.rounds is not None and policy.rounds(plan.spec.key),
            )
            unit.buckets.append(bucket)
            self._buckets.append(bucket)
        homes = job.hub.place_state(job, [bucket.spec for bucket in self._buckets])
        assert homes is not None, "core's default homes answer last"
        for bucket, home in zip(self._buckets, homes, strict=True):
            bucket.adopt(home)
        leave_whole(self._module, {p for bucket in self._buckets for p in bucket.parameters})
        for bucket in self._buckets:
            bucket.shown.begin_checks()
        self._sums = [self._sum_of(bucket) for bucket in self._trained_in_backward_order(units)]
        self._memory.make()
        self._errors = kept_errors(job.communicator, [bucket.parameters for bucket in self._sums])
        self._reducer = GradientReducer(
            self._sums,
            job.communicator,
            every_backward=policy.every_backward,
            watches=job.hub.watch_gradients(job),
            filters=job.hub.receive_gradients(job),
        )
        self._norm = gradient_norm(job)
        self._shard_parameters(units)
        self._reducer.note_parameters()  # as they are in buckets now
        self._owner.take(p for bucket in self._buckets for p in bucket.parameters)
        self._watch = ParameterWatch(
            self._module, job.parameters, self._optimizer, self._reducer.slots
        )
        for bucket in self._buckets:
            bucket.shown.reads_values = policy.sanity_checks
            bucket.shown.note_values()
        self._open_window()

    def _units(self) -> list[GatheredUnit]:
        units = (
            find_units(self._module)
            if self._policy.by_unit
            else [GatheredUnit(0, "", self._module, list(self._module.parameters()))]
        )
        trained = trained_parameters(self._optimizer)
        borrowed = lent(self._module.parameters(), self)
        for unit in units:
            own = [parameter for parameter in unit.parameters if parameter not in borrowed]
            unit.parameters = bucketed(own, trained, frozen=self._policy.frozen)
        return without_empty(units) if borrowed else units

    def _is_used_together(self, reduction: Axis) -> bool:
        """Tell whether all ranks that share a parameter use it at one time.

        Stages of a pipeline do not: each is at another micro-batch, so neither could gather an
        embedding that is also the head of another stage.
        """
        mesh = self._job.mesh
        stages = {mesh.layout.coordinate(rank, "pp") for rank in mesh.ranks(reduction)}
        return len(stages) == 1

    def _plan(self, unit: GatheredUnit, steps: Mapping[str, int]) -> list[PlannedBucket]:
        job, policy = self._job, self._policy
        prefix = self._prefix + (f"{unit.name or 'root'}." if policy.by_unit else "")
        planned = []
        if self._optimizer is not None:
            planned = plan_buckets(
                unit.parameters,
                self._optimizer,
                job.parameters,
                job.communicator,
                _WHOLE_UNIT if policy.by_unit else policy.sizes,
                gradient_dtype=policy.gradient_dtype,
                steps=steps,
                prefix=prefix,
            )
        if policy.frozen:
            trained = {p for plan in planned for p in plan.parameters}
            rest = [p for p in unit.parameters if p not in trained]
            planned += plan_frozen(rest, job.parameters, prefix)
        return planned

    def _trained_in_backward_order(self, units: Sequence[GatheredUnit]) -> list[ShardedBucket]:
        """Trained buckets, those first whose gradients are about the first to be ready."""
        ordered = [*units[:0:-1], units[0]]
        return [b for unit in ordered for b in unit.buckets if b.spec.rule is not None]

    def _sum_of(self, bucket: ShardedBucket) -> ReduceScatterBucket:
        policy = self._policy
        return ReduceScatterBucket(
            key=bucket.key,
            reduction=bucket.spec.reduction,
            replicated=bucket.spec.replicated,
            parameters=bucket,
            communicator=self._job.communicator,
            memory=self._memory,
            keep=not policy.every_backward,
            predivide=policy.predivide,
            asynchronous=policy.overlap,
        )

    def _shard_parameters(self, units: list[GatheredUnit]) -> None:
        sharded = [unit for unit in units if any(bucket.sharded for bucket in unit.buckets)]
        if not sharded:
            # What is whole already is made exact on demand, where gathers round it.
            for bucket in (bucket for bucket in self._buckets if bucket.rounds):
                own = GatheredUnit(0, bucket.key, self._module, [*bucket.parameters], [bucket])
                own.state, own.reasons = UnitState.WHOLE, {Reason.PERSISTENT}
                self._attach_handles(own)
            return
        for unit in units:
            self._attach_handles(unit)
        released.refuse_scripted(self._module)
        policy, communicator = self._policy, self._job.communicator
        alone = policy.secondary_axis is None and all(
            communicator.reads_settled(bucket.shard, bucket.axis)
            for unit in sharded
            for bucket in unit.buckets
            if bucket.sharded
        )
        order = CommonOrder(
            [unit.name for unit in units],
            communicator,
            None if alone else agreement_of(self._job),
            logs=policy.gather.log_order,
        )
        order.wider_axes = wider_axes(self._job, {b.axis for b in self._buckets if b.sharded})
        gatherer = Gatherer(
            units, policy.gather, order, asynchronous=policy.overlap, passed=self._units_passed
        )
        self._gathering = UnitHooks(gatherer)
        self._reducer.in_turn = not order.alone
        if policy.secondary_axis is not None:
            gathered = [unit for unit in units if Reason.PERSISTENT not in unit.reasons]
            for bucket in (bucket for unit in gathered for bucket in unit.buckets):
                if bucket.sharded and bucket.axis == "data":
                    bucket.whole.keep_secondary(policy.secondary_axis)
        for axis in ("data", *order.wider_axes):
            communicator.barrier(axis, Tag(Purpose.CONTROL, site="first shards"))
        self._gathering.begin()
        for part in self._module.modules():
            released.mark_released_in_state_dict(part)

    def _attach_handles(self, unit: GatheredUnit) -> None:
        for bucket in unit.buckets:
            for index, parameter in enumerate(bucket.parameters):
                slot = self._reducer.slots.get(parameter)
                handle = ShardedParameter(self._job, unit, bucket, index, slot)
                parameter.drivetrain_handle = handle  # type: ignore[attr-defined]
                guard_copies(parameter)

    # -- gradients ----------------------------------------------------------------------------

    def begin_backward(self, *, last: bool, local: bool) -> None:
        self._reducer.begin_backward(last=last, local=local)
        self._tell_buckets()

    def _tell_buckets(self) -> None:
        for bucket in self._sums:
            bucket.local, bucket.last = not self._reducer.reduce_now, self._reducer.last

    weighted = of_reducer("weighted")

    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reducer.gradients_ready(parameters)

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reducer.defer(parameters)

    def added(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return self._reducer.added(parameter)

    def take_set_gradients(self, *, unscaled: bool) -> None:
        self._reducer.take_set(unscaled=unscaled)

    def end_backward(self) -> None:
        if self._gathering is not None:
            self._gathering.end_backward()
        self._reducer.end_backward()

    def _units_passed(self, numbers: Sequence[int]) -> None:
        assert self._gathering is not None
        buckets = {id(b) for number in numbers for b in self._gathering.units[number].buckets}
        self._reducer.passed(sum_ for sum_ in self._sums if id(sum_.parameters) in buckets)

    def finish_reduction(self) -> None:
        if self._policy.need_all_gradients:
            self._refuse_unused()
        self._reducer.finish()
        for bucket in self._sums:
            bucket.sum_replicas()
            bucket.tell_home()

    def complete_gradients(self) -> float | None:
        if not self._reducer.complete():
            return None
        for bucket in self._sums:
            bucket.sum_replicas()
        return self._policy.predivide

    def gradient_norm(self) -> torch.Tensor:
        counted = [bucket.shard for bucket in self._sums if bucket.parameters.counts]
        return self._norm({1: counted}, "world") * self._policy.predivide

    def first_nonfinite(self) -> str:
        for bucket in reversed(self._sums):  # the order of the module
            for segment in reversed(bucket.parameters.spec.segments):
                gradient = segment.of(bucket.shard)
                bad = int((~torch.isfinite(gradient)).sum())
                if bad:
                    return f"{segment.name} ({bad} of {gradient.numel()} elements of its gradient)"
        return "none in this rank's shard"

    def why_not_finite(self, loss: torch.Tensor) -> str:
        return released.explain(loss, self._gathering, self._job.parameters)

    def _refuse_unused(self) -> None:
        unused = [slot.name for slot in self._reducer.slots.values() if not slot.used]
        if unused:
            raise TrainingError(
                f"parameter {unused[0]} got no gradient in this window"
                + (f", and {len(unused) - 1} more" if unused[1:] else "")
                + "; zero_optimization.ignore_unused_parameters: true counts them as zero"
            )

    # -- the end of a window ------------------------------------------------------------------

    def update(self, scale: float | torch.Tensor) -> None:
        assert self._optimizer is not None
        self._watch.refuse_other_module()
        self._watch.refuse_other_groups()
        if self._policy.sanity_checks:
            self._refuse_foreign_changes()
        self._take_over_changes()
        self._forget_parameters()
        scale = scale * self._policy.predivide
        updated: list[ShardedBucket] = []
        for bucket in self._in_update_order():
            parameters = bucket.parameters
            hyper = self._optimizer.groups[parameters.spec.group]
            parameters.home.update(bucket.shard, hyper, scale)
            updated.append(parameters)
            if self._policy.overlap and len(updated) > 1:
                begin_publish(updated.pop(0))  # travels while the others are updated
        self._finish_publish(updated)
        self._open_window()

    def _in_update_order(self) -> Sequence[ReduceScatterBucket]:
        """What forward needs first: first, to be published; last, where a home may have it near."""
        return self._sums if self._gathering is not None else self._sums[::-1]

    def _publish(self) -> None:
        """Let every rank compute with all shards, after a load or a script has changed them."""
        self._forget_parameters()
        self._finish_publish([bucket.parameters for bucket in reversed(self._sums)])

    def _finish_publish(self, updated: Sequence[ShardedBucket]) -> None:
        """Show every rank the last updated shards, and wait for all that are under way."""
        for parameters in updated:
            begin_publish(parameters)
        for bucket in self._sums:
            bucket.parameters.whole.finish_publish()
        if self._gathering is not None:
            self._gathering.updated()
        self._note_parameters()

    def discard_gradients(self) -> None:
        self._reducer.drop()
        self._open_window()

    def _open_window(self) -> None:
        self._reducer.restart()
        self._tell_buckets()

    # -- changes from outside -----------------------------------------------------------------

    def refresh(self) -> None:
        for bucket in self._buckets:
            bucket.home.refresh()
        self._reducer.note_parameters()
        self._note_parameters()

    def take_over(
        self, parameters: Iterable[nn.Parameter], same: Iterable[nn.Parameter] = ()
    ) -> None:
        self._reducer.note_parameters(same)
        for parameter in parameters:
            slot = self._reducer.slots.get(parameter)
            if slot is not None and slot.place is not None:
                self._sum_with(slot).parameters.take_over(slot.index)
                slot.note()

    def _take_over_changes(self) -> None:
        """Keep what scripts have changed in parameters that are whole; see core's note."""
        for slot in self._watch.changed():
            bucket = self._sum_with(slot).parameters
            if bucket.spec.has_masters:
                slot.take_over()  # which shows the same values elsewhere
            else:
                bucket.take_over(slot.index)
                slot.note()
        for total in self._sums:
            if total.changed:
                refuse_unlike_copies(self._job.communicator, total)

    def _sum_with(self, slot: Slot) -> ReduceScatterBucket:
        assert isinstance(slot.bucket, ReduceScatterBucket)
        return slot.bucket

    def fragments_written(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        if parameters is None:
            for bucket in self._buckets:
                bucket.whole.shard_changes()
            self._publish()
            return
        written = set(parameters)
        chosen = [bucket for bucket in self._buckets if written.intersection(bucket.parameters)]
        units = [] if self._gathering is None else self._gathering.units
        show_written(chosen, units, self._job.communicator)

    def _refuse_foreign_changes(self) -> None:
        for bucket in self._buckets:
            bucket.shown.check_values()
        # Ranks that share memory see each other's updates at once.
        self._job.communicator.barrier("data", Tag(Purpose.CONTROL, site="sanity checks"))

    def _forget_parameters(self) -> None:
        for bucket in self._buckets:
            bucket.shown.forget_values()

    def _note_parameters(self) -> None:
        for bucket in self._buckets:
            bucket.shown.note_values()

    def steps(self) -> Mapping[str, int]:
        return {
            segment.name: bucket.home.step
            for bucket in self._buckets
            if bucket.spec.rule is not None
            for segment in bucket.plan.spec.segments
        }

    def rebuild(self, steps: Mapping[str, int] | None = None) -> None:
        self._watch.refuse_other_module()
        self.discard_gradients()
        self.flush()
        known = self.steps()
        kept = kept_on_host(self._home_fragments())
        self.detach()
        self._gathering = None
        self._buckets, self._sums = [], []
        del self._reducer, self._watch
        gc.collect()  # hooks and units refer to each other; states go before others come
        self._build({**known, **(steps or {})})
        new = [fragment for fragment in self._home_fragments() if fragment.name in known]
        redistribute(self._job, kept, new)
        self._publish()

    def _home_fragments(self) -> list[Fragment]:
        """Masters and optimizer states."""
        found = (f for bucket in self._buckets for f in bucket.home.fragments())
        return [fragment for fragment in found if fragment.kind != "parameter"]

    def flush(self) -> None:
        for bucket in self._buckets:
            bucket.home.flush()

    def fragments(self) -> Sequence[Fragment]:
        self._watch.refuse_other_module()
        found: list[Fragment] = []
        bucketed: set[nn.Parameter] = set()
        sums = {bucket.key: bucket for bucket in self._sums}
        for bucket in self._buckets:
            bucketed.update(bucket.parameters)
            total = sums.get(bucket.key)
            found += bucket.fragments(None if total is None else total.shard)
            if total is not None:
                found += step_fragments(bucket.home, self._open_window)
            found += bucket.home.fragments()
        return found + self._errors + loose_fragments(self._job, self._module, bucketed, self)

    def memory_rows(self) -> list[tuple[str, str, int, int]]:
        """Memory on the device beside parameters and states: (kind, place, bytes, locked)."""
        rows = [("gradients on their way", "device", self._memory.nbytes, 0)]
        if self._gathering is not None:
            most = most_gathered(
                self._gathering.units, self._policy.gather, asynchronous=self._policy.overlap
            )
            rows.append(("gathered parameters, at most", "device", most, 0))
        return rows

    def learned(self) -> Sequence[str]:
        return self._reducer.late_buckets()

    def learn(self, learned: Sequence[str]) -> None:
        self._reducer.learn_late(learned)

    def detach(self) -> None:
        """Remove every hook; sharded parameters stay reachable through ``whole``."""
        self._reducer.close()
        self._owner.release()
        for bucket in self._buckets:
            bucket.shown.end_checks()
        if self._gathering is not None:
            self._gathering.close()
