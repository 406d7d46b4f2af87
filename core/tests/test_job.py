"""Jobs: who may open one, what it gives, and how an error on one rank ends all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from bare_jobs import TAG, plan, total

from drivetrain.communication.process_group import Ranks
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import (
    Accelerator,
    CommunicatorLayer,
    CommunicatorPhase,
    CommunicatorWrapper,
    Plugin,
    Section,
    hookimpl,
)
from drivetrain.errors import CommunicationError, ConfigError, PluginError
from drivetrain.job.accelerator_choice import (
    HostAccelerator,
    active_accelerator,
    choose_accelerator,
)
from drivetrain.job.job import Job, init_distributed
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.testing import RanksFailedError, run_distributed

# -- opening and closing ---------------------------------------------------------------------------


def test_a_single_process_needs_no_process_group_and_no_batch():
    with Job.open(plan(1)) as job:
        assert not dist.is_initialized()
        assert job.plan.batch is None
        assert (job.rank, job.world_size, job.device) == (0, 1, torch.device("cpu"))
        assert total(job) == 1
        assert job.byte_log.total().calls == 1
        with job.span("a"):
            pass
        assert set(job.ledger.take()) == {"a"}
        assert job.progress.steps == 0
        assert job.random.seed == 1234


def test_the_seed_comes_from_the_config():
    with Job.open(plan(1, seed=7)) as job:
        assert job.random.seed == 7


def ranks_meet() -> tuple[int, bool]:
    with Job.open(plan()) as job:
        assert job.ranks == Ranks(job.rank, 3, job.rank, 3)
        result = total(job)
    return result, dist.is_initialized()


def test_ranks_of_torchruns_environment_meet_and_part():
    assert run_distributed(ranks_meet, 3) == [(6, False)] * 3


def two_jobs() -> list[float]:
    one = Job.open(plan(sequence_parallel_size=2))
    other = Job.open(plan(data_parallel_size=4))
    found = [total(one, "sp"), total(other, "dp"), total(one, "dp")]
    one.close()
    one.close()
    found.append(total(other, "dp"))
    assert dist.is_initialized()
    other.close()
    assert not dist.is_initialized()
    with Job.open(plan(sequence_parallel_size=4)) as third:
        found.append(total(third, "sp"))
    return found


def test_two_jobs_live_in_one_process_and_the_last_ends_the_process_group():
    assert run_distributed(two_jobs, 4)[0] == [3, 10, 4, 10, 10]


def adopts() -> None:
    init_distributed(timeout=timedelta(seconds=30))
    group = dist.group.WORLD
    init_distributed()
    for _ in range(2):
        with Job.open(plan()) as job:
            assert job.mesh.group("world") is group
            assert total(job) == 3
    assert dist.group.WORLD is group, "a job leaves alone what it has not started"


def test_a_process_group_that_exists_is_adopted():
    run_distributed(adopts, 2)


def alone() -> int:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[variable]
    init_distributed()
    with Job.open(plan(1)) as job:
        assert total(job) == 1
    return dist.get_world_size()


def test_init_distributed_works_without_a_launcher():
    assert run_distributed(alone, 1) == [1]


def test_a_plan_for_another_world_is_refused():
    with pytest.raises(ConfigError, match=r"for 4 ranks \(the world_size argument\), .* 0 of 1"):
        Job.open(plan(4))


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 but RANK is not set: .*torchrun"):
        Job.open(plan())
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK must be a number, got 'one'"):
        Job.open(plan())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(CommunicationError, match=r"rank 0 of 2 could not join .*MASTER_ADDR"):
        Job.open(plan())
    assert not dist.is_initialized()


def a_thousand_ranks() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=777, world_size=1000)
    with Job.open(plan(1000, sequence_parallel_size=8)) as job:
        assert job.mesh.size("dp") == 125
        assert job.mesh.coordinate("sp") == 777 % 8
        job.communicator.all_reduce(torch.zeros(10), "data", TAG)
        assert job.byte_log.total().sent_bytes == pytest.approx(2 * 40 * 999 / 1000)
        assert job.byte_log.total(axis="sp").calls == 0


def test_one_of_a_thousand_fake_ranks_opens_a_job():
    run_distributed(a_thousand_ranks, 1)


def test_what_is_registered_for_closing_is_released_once_in_reverse():
    released: list[str] = []
    with Job.open(plan(1)) as job:
        job.on_close(lambda: released.append("first"))
        job.on_close(lambda: released.append("second"))
    job.close()
    assert released == ["second", "first"]


def refuse_to_be_released() -> None:
    raise OSError("the disk is gone")


def close_with_a_resource_that_fails() -> tuple[int, bool]:
    job = Job.open(plan())
    job.on_close(refuse_to_be_released)
    with pytest.raises(OSError, match="the disk is gone"):
        job.close()
    left = not dist.is_initialized()
    with Job.open(plan()) as again:
        return total(again), left


def test_a_resource_that_fails_to_close_does_not_keep_the_rank_in_its_group():
    assert run_distributed(close_with_a_resource_that_fails, 2) == [(3, True), (3, True)]


class Outer(CommunicatorWrapper):
    pass


class Middle(CommunicatorWrapper):
    pass


class Inner(CommunicatorWrapper):
    pass


class Wrapping(Plugin):
    name = "wrapping"

    @hookimpl
    def wrap_communicator(self, job: Job) -> list[CommunicatorLayer]:
        assert job.communicator is job.byte_log
        return [
            CommunicatorLayer(CommunicatorPhase.USER_LOG, Outer),
            CommunicatorLayer(CommunicatorPhase.COMPRESS, Middle),
            CommunicatorLayer(CommunicatorPhase.ROUTE, Inner),
        ]


def test_decorators_are_folded_by_phase_around_the_byte_log():
    registry = Registry(core_entries()).with_plugins(Wrapping)
    wrapped = Plan.build(
        {"plugins": {"wrapping": True}}, registry=registry, batch_required=False, world_size=1
    )
    with Job.open(wrapped) as job:
        outer = job.communicator
        assert isinstance(outer, Outer)
        assert isinstance(outer.inner, Middle)
        assert outer.inner.inner is job.byte_log
        assert isinstance(job.byte_log.inner, Inner)
        assert isinstance(job.byte_log.inner.inner, TorchCommunicator)


# -- the accelerator -------------------------------------------------------------------------------


class Gadget(Accelerator):
    """A device that is present; its tensors are the host's, so that a job can open on it."""

    name = "gadget"
    device_type = "gadget"
    absent: str | None = None

    def probe(self) -> str | None:
        return self.absent

    def communication_backend(self) -> str:
        return "gloo"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def start(self, local_rank: int, ranks_on_host: int) -> None:
        pass


class Gizmo(Gadget):
    name = "gizmo"


class Missing(Gadget):
    name = "missing"
    absent = "the driver is not loaded"


def plan_with(*accelerators: type[Accelerator], brought: tuple[type, ...] = (), **config) -> Plan:
    registry = Registry(core_entries()).with_plugins(*brought)
    for accelerator in accelerators:
        registry.add("accelerators", accelerator.name, accelerator)
    return Plan.build(config, world_size=1, batch_required=False, registry=registry)


def test_core_works_on_the_host_alone():
    accelerator = choose_accelerator(plan_with())
    assert isinstance(accelerator, HostAccelerator)
    assert accelerator.total_memory() > accelerator.memory_allocated() > 2**20
    assert isinstance(choose_accelerator(plan_with(accelerator="cpu")), HostAccelerator)


def test_a_device_that_is_present_goes_before_the_host(caplog):
    caplog.set_level("INFO", logger="drivetrain.accelerator")
    assert isinstance(choose_accelerator(plan_with(Gadget, Missing)), Gadget)
    assert "accelerator missing is not used: the driver is not loaded" in caplog.text


def test_two_devices_leave_the_choice_to_the_user(monkeypatch):
    with pytest.raises(ConfigError, match=r"gadget, gizmo all claim this process: .*'accelerator'"):
        choose_accelerator(plan_with(Gadget, Gizmo))
    assert isinstance(choose_accelerator(plan_with(Gadget, Gizmo, accelerator="gizmo")), Gizmo)
    monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "gadget")
    assert isinstance(choose_accelerator(plan_with(Gadget, Gizmo)), Gadget)
    assert isinstance(choose_accelerator(plan_with(Gadget, Gizmo, accelerator="gizmo")), Gizmo)


def test_an_accelerator_asked_for_must_work(monkeypatch):
    with pytest.raises(ConfigError, match=r"'accelerator' asks for 'missing', .* driver is not"):
        choose_accelerator(plan_with(Missing, accelerator="missing"))
    with pytest.raises(PluginError, match="no accelerator is named 'gadgt'; did you mean"):
        choose_accelerator(plan_with(Gadget, accelerator="gadgt"))
    monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "missing")
    with pytest.raises(ConfigError, match="DRIVETRAIN_ACCELERATOR asks for 'missing'"):
        choose_accelerator(plan_with(Missing))


class PreferenceSection(Section):
    first: tuple[str, ...]


class Preference(Plugin):
    """Chooses the first accelerator of a list that works here; without one, leaves it to core."""

    name = "preference"
    sections = {"preference": PreferenceSection}

    @hookimpl
    def select_accelerator(
        self, candidates: Mapping[str, Accelerator], requested: str | None
    ) -> Accelerator | None:
        assert requested is None or list(candidates) == [requested]
        names = self.section(PreferenceSection).first
        return next((candidates[name] for name in names if name in candidates), None)


class Invention(Plugin):
    name = "invention"

    @hookimpl
    def select_accelerator(self) -> Accelerator:
        return Gadget()


def chosen_by_preference(*first: str, **config) -> str:
    config = {"preference": {"first": first}, **config}
    plan = plan_with(Gadget, Gizmo, Missing, brought=(Preference,), **config)
    return choose_accelerator(plan).name


def test_a_plugin_may_choose_by_its_section_among_the_accelerators_that_work():
    assert chosen_by_preference("gizmo", "gadget") == "gizmo"
    assert chosen_by_preference("missing", "gadget", "gizmo") == "gadget"
    assert chosen_by_preference("cpu") == "cpu"


def test_a_plugin_that_chooses_none_leaves_the_choice_as_it_was():
    with pytest.raises(ConfigError, match="gadget, gizmo all claim this process"):
        chosen_by_preference("missing")
    assert chosen_by_preference("gadget", accelerator="gizmo") == "gizmo"


def test_a_job_opens_on_the_accelerator_that_a_plugin_chose():
    section = {"first": ["gizmo"]}
    with Job.open(plan_with(Gadget, Gizmo, brought=(Preference,), preference=section)) as job:
        assert isinstance(job.accelerator, Gizmo)
        assert active_accelerator() == "gizmo"


def test_a_plugin_may_choose_nothing_but_a_candidate():
    plan = plan_with(Gizmo, brought=(Invention,), plugins={"invention": True}, accelerator="gizmo")
    with pytest.raises(PluginError, match=r"no candidate \(gizmo\): it has to return one of"):
        choose_accelerator(plan)


class Abacus(Gadget):
    name = "abacus"
    device_type = "cpu"


class DoesNotLoad(Gadget):
    name = "cpu"

    def __init__(self) -> None:
        raise PluginError("its library is missing")


def test_another_accelerator_on_the_cpu_is_used_only_when_it_is_asked_for(monkeypatch):
    assert isinstance(choose_accelerator(plan_with(Abacus)), HostAccelerator)
    assert isinstance(choose_accelerator(plan_with(Abacus, accelerator="abacus")), Abacus)
    monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "abacus")
    assert isinstance(choose_accelerator(plan_with(Abacus)), Abacus)


def test_a_process_without_any_accelerator_that_loads_says_where_to_look():
    with pytest.raises(ConfigError, match=r"no accelerator can be used here; the log"):
        choose_accelerator(plan_with(DoesNotLoad))


def test_the_accelerator_of_the_job_that_was_opened_last_is_active_while_it_is_open():
    assert active_accelerator() is None
    first = Job.open(plan_with(Gadget))
    with Job.open(plan_with(Abacus, accelerator="abacus")):
        assert active_accelerator() == "abacus"
    assert active_accelerator() == "gadget"
    last = Job.open(plan_with())
    first.close()
    assert active_accelerator() == "cpu"
    last.close()
    assert active_accelerator() is None


class Hooked(Gadget):
    name = "hooked"

    @hookimpl
    def wrap_communicator(self, job: Job) -> list[CommunicatorLayer]:
        return [CommunicatorLayer(CommunicatorPhase.ROUTE, Inner)]


def test_an_accelerator_takes_part_in_hooks_and_its_plan_may_run_again():
    hooked = plan_with(Hooked)
    for _ in range(2):
        with Job.open(hooked) as job:
            assert isinstance(job.byte_log.inner, Inner)


# -- ranks that disagree ---------------------------------------------------------------------------


def different_plans(stranger: int) -> None:
    seed = 1 if int(os.environ["RANK"]) == stranger else 2
    Job.open(plan(seed=seed, steps_per_print=10))


@pytest.mark.parametrize("stranger", [0, 2])
def test_every_rank_names_the_one_that_runs_another_plan(stranger):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(different_plans, 4, stranger)
    assert set(caught.value.errors) == {0, 1, 2, 3}
    usual = 1 if stranger == 0 else 0
    for error in caught.value.errors.values():
        assert error.error.startswith(
            f"ConfigError: ranks disagree about what to run, rank {stranger} with rank {usual} "
            "and most others (1 of 4 ranks differ)"
        )
        assert f"config.seed is 2 on rank {usual}, 1 on rank {stranger}" in error.error
        assert "steps_per_print" not in error.error
