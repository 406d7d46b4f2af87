"""``ReplicatedStates``: the model states of plain data parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.checkpoint.redistribute import kept_on_host, redistribute
from drivetrain.contracts.state.fragment import Fragment
from drivetrain.contracts.state.home import StateHome, write_master
from drivetrain.contracts.state.model_states import ModelStates
from drivetrain.contracts.world.communicator import is_first_copy
from drivetrain.job.ownership import Owner
from drivetrain.precision.precision import Precision
from drivetrain.sections.data_parallel import DataParallel
from drivetrain.sections.optimization import GradientPredivideFactor, PrescaleGradients
from drivetrain.states.all_reduce import AllReduceBucket
from drivetrain.states.buckets import BucketSizes, PlannedBucket, plan_buckets
from drivetrain.states.changed_parameters import ParameterWatch, refuse_unlike_copies
from drivetrain.states.device_home import segment_fragment, step_fragments
from drivetrain.states.gradient_norm import gradient_norm
from drivetrain.states.gradients import GradientReducer, of_reducer
from drivetrain.states.loose import (
    broadcast_first,
    loose_fragments,
    synchronise_loose,
    trained_parameters,
)
from drivetrain.states.whole import handed_over

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import OptimizerPlan
    from drivetrain.job.job import Job


@dataclass(frozen=True)
class ReductionPolicy:
    """How gradients accumulate and travel.

    Args:
        sizes: bucket limits.
        gradient_dtype: accumulation dtype; ``None`` for each parameter's own.
        overlap: start reducing while backward goes on.
        predivide: factor that gradients are divided by before they are summed.
    """

    sizes: BucketSizes
    gradient_dtype: torch.dtype | None = None
    overlap: bool = True
    predivide: float = 1.0

    @classmethod
    def of(cls, job: Job) -> ReductionPolicy:
        """What the config of a job says."""
        plan = job.plan
        section = plan.section(DataParallel)
        predivide = plan.section(GradientPredivideFactor).root
        if plan.section(PrescaleGradients).root:
            predivide = float(job.mesh.size("data"))
        return cls(
            sizes=BucketSizes(section.bucket_bytes, section.first_bucket_bytes),
            gradient_dtype=Precision.of(plan).gradient,
            overlap=section.overlap,
            predivide=predivide,
        )


@dataclass(eq=False)
class _Bucket:
    planned: PlannedBucket
    parameters: torch.Tensor  # flat; every parameter of the bucket is a view of it
    gradients: AllReduceBucket
    home: StateHome

    @property
    def owner(self) -> bool:
        """Whether this rank's copy counts in norms; all segments of a bucket agree."""
        return self.planned.spec.segments[0].owner

    def open_window(self) -> None:
        """Ask the rule how the next update wants its gradients."""
        rule = self.planned.spec.rule
        assert rule is not None
        self.gradients.reduced = rule.wants_reduced(self.home.step + 1)


class ReplicatedStates(ModelStates):
    """Flat buckets, gradients summed over each parameter's reduction axes, one update a bucket.

    Args:
        job: communicator, mesh, homes.
        module: parameters are replaced in place by views of flat buckets, in compute dtype.
        optimizer: rule and groups; ``None`` keeps the parameters as they are, for serving.
        policy: accumulation and reduction.
    """

    def __init__(
        self, job: Job, module: nn.Module, optimizer: OptimizerPlan | None, policy: ReductionPolicy
    ) -> None:
        self._job = job
        self._module = module
        self._optimizer = optimizer
        self._policy = policy
        self._buckets: list[_Bucket] = []
        self._owner = Owner(job, module, self)
        synchronise_loose(job, module, trained_parameters(optimizer))
        self._build({})

    # -- set-up -------------------------------------------------------------------------------

    def _build(self, steps: dict[str, int]) -> None:
        job, policy = self._job, self._policy
        planned = (
            plan_buckets(
                self._module.parameters(),
                self._optimizer,
                job.parameters,
                job.communicator,
                policy.sizes,
                gradient_dtype=policy.gradient_dtype,
                steps=steps,
            )
            if self._optimizer is not None
            else []
        )
        homes = job.hub.place_state(job, [plan.spec for plan in planned])
        assert homes is not None, "core's default homes answer last"
        sums = [
            AllReduceBucket.of(
                plan, job.communicator, overlap=policy.overlap, predivide=policy.predivide
            )
            for plan in planned
        ]
        self._reducer = GradientReducer(
            sums,
            job.communicator,
            watches=job.hub.watch_gradients(job),
            filters=job.hub.receive_gradients(job),
        )
        self._norm = gradient_norm(job)
        self._buckets = [
            _Bucket(plan, self._flatten(plan, home), gradients, home)
            for plan, home, gradients in zip(planned, homes, sums, strict=True)
        ]
        for bucket in self._buckets:
            for slot, segment in zip(
                bucket.gradients.slots, bucket.planned.spec.segments, strict=True
            ):
                slot.place = segment.of(bucket.parameters)
        self._reducer.note_parameters()  # as they are in buckets now
        self._watch = ParameterWatch(
            self._module, job.parameters, self._optimizer, self._reducer.slots
        )
        self._owner.take(self._reducer.slots)
        self._open_window()

    def _flatten(self, plan: PlannedBucket, home: StateHome) -> torch.Tensor:
        """Move a bucket's parameters into one flat tensor and hand it to its home."""
        spec = plan.spec
        wide = max((p.dtype for p in plan.parameters), key=lambda dtype: dtype.itemsize)
        with handed_over(plan.parameters):
            originals = torch.cat([p.detach().to(wide).reshape(-1) for p in plan.parameters])
        broadcast_first(self._job, originals, spec.key, spec.reduction, spec.replicated)
        flat = self._job.communicator.buffer(spec.numel, spec.parameter_dtype, spec.reduction)
        flat.copy_(originals)
        for segment, parameter in zip(spec.segments, plan.parameters, strict=True):
            parameter.grad = None
            parameter.data = segment.of(flat)
        home.step = plan.step
        home.adopt(flat, originals)
        return flat

    # -- gradients ----------------------------------------------------------------------------

    weighted = of_reducer("weighted")

    def begin_backward(self, *, last: bool, local: bool) -> None:
        self._reducer.begin_backward(last=last, local=local)

    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reducer.gradients_ready(parameters)

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reducer.defer(parameters)

    def added(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return self._reducer.added(parameter)

    def take_set_gradients(self, *, unscaled: bool) -> None:
        self._reducer.take_set(unscaled=unscaled)

    def end_backward(self) -> None:
        self._reducer.end_backward()

    def finish_reduction(self) -> None:
        self._reducer.finish()
        for bucket in self._buckets:
            bucket.home.gradient_ready(bucket.gradients.gradient)

    def complete_gradients(self) -> float | None:
        reduced = all(bucket.gradients.reduced for bucket in self._buckets)
        return self._policy.predivide if reduced and self._reducer.complete() else None

    def gradient_norm(self) -> torch.Tensor:
        communicator, world = self._job.communicator, self._job.mesh.size("world")
        # When every bucket is summed over the whole world, every rank has every sum already.
        local = all(
            bucket.gradients.reduced and communicator.size(bucket.planned.spec.reduction) == world
            for bucket in self._buckets
        )
        counted: dict[int, list[torch.Tensor]] = {1: []}  # by what the squares are multiplied with
        for bucket in self._buckets:
            if not bucket.gradients.reduced:
                # One rank's term, taken as if all terms were alike; the mean of these estimates
                # over the ranks is one number that all ranks agree on.
                spec = bucket.planned.spec
                if is_first_copy(communicator, spec.replicated):
                    size = communicator.size(spec.reduction)
                    counted.setdefault(size, []).append(bucket.gradients.gradient)
            elif local or bucket.owner:
                counted[1].append(bucket.gradients.gradient)
        return self._norm(counted, None if local else "world") * self._policy.predivide

    def first_nonfinite(self) -> str:
        for bucket in reversed(self._buckets):  # the order of the module
            for segment in reversed(bucket.planned.spec.segments):
                gradient = segment.of(bucket.gradients.gradient)
                bad = int((~torch.isfinite(gradient)).sum())
                if bad:
                    return f"{segment.name} ({bad} of {gradient.numel()} elements of its gradient)"
        return "none on this rank"

    # -- the end of a window ------------------------------------------------------------------

    def update(self, scale: float | torch.Tensor) -> None:
        assert self._optimizer is not None
        self._watch.refuse_other_module()
        self._watch.refuse_other_groups()
        for slot in self._watch.changed():
            slot.take_over()
        for bucket in self._buckets:
            if bucket.gradients.changed and bucket.gradients.reduced:  # else copies may differ
                refuse_unlike_copies(self._job.communicator, bucket.gradients)
        scale = scale * self._policy.predivide
        for bucket in self._buckets:
            hyper = self._optimizer.groups[bucket.planned.spec.group]
            bucket.home.update(bucket.gradients.gradient, hyper, scale)
        for bucket in self._buckets:
            bucket.home.publish()
        self._open_window()

    def discard_gradients(self) -> None:
        self._reducer.drop()
        self._open_window()

    def _open_window(self) -> None:
        self._reducer.restart()
        for bucket in self._buckets:
            bucket.open_window()

    # -- changes from outside -----------------------------------------------------------------

    def refresh(self) -> None:
        for bucket in self._buckets:
            bucket.home.refresh()
        self._reducer.note_parameters()

    def fragments_written(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        pass  # they are the module's parameters

    def take_over(
        self, parameters: Iterable[nn.Parameter], same: Iterable[nn.Parameter] = ()
    ) -> None:
        self._reducer.note_parameters(same)
        written = set(parameters)
        for bucket in self._buckets:
            pairs = zip(bucket.gradients.slots, bucket.planned.spec.segments, strict=True)
            for slot, segment in pairs:
                if slot.parameter in written:
                    slot.take_over()
                    write_master(bucket.home, segment, slot.parameter)

    def steps(self) -> Mapping[str, int]:
        return {s.name: b.home.step for b in self._buckets for s in b.planned.spec.segments}

    def rebuild(self, steps: Mapping[str, int] | None = None) -> None:
        self._watch.refuse_other_module()
        self.discard_gradients()
        self.flush()
        known = self.steps()
        kept = kept_on_host(f for bucket in self._buckets for f in bucket.home.fragments())
        self._reducer.close()
        self._build({**known, **(steps or {})})
        new = (f for bucket in self._buckets for f in bucket.home.fragments())
        redistribute(self._job, kept, [f for f in new if f.name in known])

    def flush(self) -> None:
        for bucket in self._buckets:
            assert self._optimizer is not None
            bucket.home.settle(self._optimizer.groups[bucket.planned.spec.group])
            bucket.home.flush()

    def fragments(self) -> Sequence[Fragment]:
        self._watch.refuse_other_module()
        found: list[Fragment] = []
        bucketed: set[nn.Parameter] = set()
        for bucket in self._buckets:
            bucketed.update(bucket.planned.parameters)
            for segment in bucket.planned.spec.segments:
                flats = {"parameter": bucket.parameters, "gradient": bucket.gradients.gradient}
                for kind, flat in flats.items():
                    found.append(segment_fragment(segment, kind, flat, "device"))
            found += step_fragments(bucket.home, bucket.open_window)
            found += bucket.home.fragments()
        return found + loose_fragments(self._job, self._module, bucketed, self)

    def learned(self) -> Sequence[str]:
        return self._reducer.late_buckets()

    def learn(self, learned: Sequence[str]) -> None:
        self._reducer.learn_late(learned)

    def detach(self) -> None:
        self._reducer.close()
        self._owner.release()
