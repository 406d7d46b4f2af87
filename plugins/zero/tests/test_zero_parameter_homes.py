"""Stage 3 with homes that keep the parameters: the device has them only while they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from zero_harness import (
    PRECISIONS,
    Run,
    assert_equal_to_plain,
    batches,
    config,
    run_engine,
    whole_parameters,
)
from zero_models import (
    ADAPTED,
    BODY,
    EMBEDDED,
    RECOMPUTED,
    REENTRANT,
    ROUTED,
    SHARED,
    SKIPPING,
    UNEVEN,
    USED_OUTSIDE,
)

from drivetrain.contracts import (
    BucketSpec,
    Fragment,
    Hyper,
    ParameterHome,
    Plugin,
    StateHome,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.states.device_home import DeviceHome, segment_fragment
from drivetrain.states.whole import whole
from drivetrain.testing import run_distributed
from drivetrain.testing.data import Samples
from drivetrain.testing.reference import CASES, Case


class Keeper(ParameterHome):
    """Keeps parameters apart. What it fetches is rubbish until it has been waited for."""

    def __init__(self, spec: BucketSpec) -> None:
        self.spec = spec
        self._states = DeviceHome(spec)
        self._values = torch.empty(0)
        self._fetching: torch.Tensor | None = None
        self._seen = torch.empty(0)
        self.seen_early = False

    @property
    def step(self) -> int:
        return self._states.step

    @step.setter
    def step(self, value: int) -> None:
        self._states.step = value

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self._values = parameters.clone()
        self._states.adopt(self._values, originals)

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self._seen = gradient.clone()
        self.seen_early |= torch._C._current_graph_task_id() != -1

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        assert torch.equal(self._seen, gradient), "another gradient than the home was shown"
        self._states.update(gradient, hyper, scale)

    def fetch(self, into: torch.Tensor) -> None:
        assert self._fetching is None, "one fetch at a time"
        into.fill_(float("nan") if into.is_floating_point() else 255)
        self._fetching = into

    def fetched(self) -> None:
        assert self._fetching is not None
        self._fetching.copy_(self._values)
        self._fetching = None

    def keep(self, parameters: torch.Tensor) -> None:
        self._values.copy_(parameters)

    def refresh(self) -> None:
        self._states.refresh()

    def fragments(self) -> Sequence[Fragment]:
        own = [segment_fragment(s, "parameter", self._values, "apart") for s in self.spec.segments]
        return [*own, *self._states.fragments()]


class Keepers(Plugin):
    name = "keepers"

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        assert all(spec.released for spec in specs)
        return [Keeper(spec) for spec in specs]


def kept(run: Run) -> Run:
    return replace(run, config={**run.config, "plugins": {"keepers": True}}, plugins=(Keepers,))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_kept_parameters_train_like_plain_torch(world: int, precision: str) -> None:
    mode, _, bound = PRECISIONS[precision]
    settings = config(3, accumulation=2, gradient_clipping=0.05, **mode)
    assert_equal_to_plain(kept(Run(settings, BODY)), world, rtol=bound)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(UNEVEN, id="sizes that do not divide"),
        pytest.param(SHARED, id="tied weights and a module called twice"),
        pytest.param(RECOMPUTED, id="checkpointed"),
        pytest.param(REENTRANT, id="checkpointed re-entrantly"),
        pytest.param(ADAPTED, id="adapters on frozen and packed weights"),
        pytest.param(USED_OUTSIDE, id="packed weights used outside of their block"),
        pytest.param(ROUTED, id="experts that a rank does not use"),
        pytest.param(SKIPPING, id="blocks that a rank skips"),
        pytest.param(EMBEDDED, id="an embedding"),
        pytest.param(CASES["tied"], id="a tied language model"),
    ],
)
def test_awkward_modules_train(case: Case) -> None:
    run = kept(Run(config(3, accumulation=2), case))
    assert_equal_to_plain(run, 2, compare_parameters=case is not CASES["tied"])


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"overlap_comm": True}, id="gathered ahead"),
        pytest.param({"stage3_prefetch_bucket_size": 0}, id="nothing ahead"),
        pytest.param({"stage3_param_persistence_threshold": 100}, id="small units stay"),
        pytest.param({"mics_shard_size": 2}, id="MiCS"),
        pytest.param({"zero_hpz_partition_size": 2}, id="second shards"),
    ],
)
def test_they_train_with_other_settings(zero: dict[str, Any]) -> None:
    assert_equal_to_plain(kept(Run(config(3, zero=zero), BODY)), 4)


def writes_between(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """Before each step all parameters grow, by a client that gathers them."""
    with whole(engine.module, write_rank=0), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.mul_(1.01)
    return run_engine(engine, micro_batches, step)


def grown() -> tuple[list[float], dict[str, torch.Tensor]]:
    """What plain torch learns when parameters grow so."""
    run = Run(config(3), BODY)
    model = BODY.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in batches(run, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        pairs = [pair for micro in step for pair in micro]
        loss = torch.stack([model(*pair) for pair in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_what_a_client_writes_is_kept() -> None:
    run = kept(Run(config(3), BODY, loop=writes_between))
    assert_equal_to_plain(run, 2, expected=grown())


def between_uses(run: Run) -> tuple[int, bool]:
    """Bytes of whole parameters after a step, and whether fragments show what gathering does."""
    engine = run.engine()
    pair = batches(run, 1)[0][0][0]
    run_engine(engine, [pair], 0)
    held = sum(p.untyped_storage().nbytes() for p in engine.module.parameters() if any(p.stride()))
    shown = {f.name: f.read().clone() for f in engine.states.fragments() if f.kind == "parameter"}
    found = whole_parameters(engine)
    alike = all(torch.equal(shown[name], found[name].reshape(-1)) for name in found)
    engine.destroy()
    return held, alike


def test_a_single_rank_releases_them_too() -> None:
    """It has nobody to share with, but its device is relieved all the same."""
    settings = config(3)
    (answer,) = run_distributed(between_uses, 1, kept(Run(settings, BODY)))
    held, alike = answer
    plain_held, _ = run_distributed(between_uses, 1, Run(settings, BODY))[0]
    assert alike
    assert held == 0 < plain_held


def seen_in_backward(run: Run) -> list[bool]:
    """For each bucket, whether its home saw its gradient before backward was over."""
    homes: list[Keeper] = []

    class Noting(Keepers):
        @hookimpl
        def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
            homes.extend(Keeper(spec) for spec in specs)
            return homes

    engine = replace(run, plugins=(Noting,)).engine()
    micro_batches = batches(run, 1)[0]
    run_engine(engine, [micro_batches[0][0]], 0)
    early = any(home.seen_early for home in homes)
    run_engine(engine, [micro_batches[1][0]], 1)
    engine.destroy()
    return [early, *(home.seen_early for home in homes if home.spec.rule is not None)]


def test_homes_see_gradients_while_backward_goes_on() -> None:
    """In the last micro-batch of a window and not before: what they see then is the sum."""
    run = kept(Run(config(3, accumulation=2), BODY))
    for before_the_last, *in_the_last in run_distributed(seen_in_backward, 2, run):
        assert not before_the_last
        assert sum(in_the_last) >= len(in_the_last) - 1  # the root's may end with backward
