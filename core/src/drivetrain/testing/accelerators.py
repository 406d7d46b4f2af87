"""Conformance kit for accelerators: any kind of device against plain torch on the host.

A package that brings an accelerator subclasses :class:`AcceleratorConformance` in its own tests::

    from acme.accelerator import Acme

    class TestAcme(AcceleratorConformance):
        accelerator = Acme
        expected_failures = {"test_autocast_follows_float32": "no lower precision yet"}

``drivetrain test-plugin NAME`` runs the same checks on an installed accelerator.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from unittest import SkipTest

import torch

from drivetrain.communication.process_group import Ranks
from drivetrain.contracts.world.accelerator import Accelerator
from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import data, device_checks, job_checks, models
from drivetrain.testing.check import Kit, check, expect
from drivetrain.testing.conformance import imported_with, run_python
from drivetrain.testing.distributed import run_distributed
from drivetrain.testing.reference import reference_losses

TIMEOUT = 300.0
"""Seconds that the ranks of one check may take."""

STEPS = 6


class AcceleratorConformance(Kit):
    """Inherit this in a test module and say which accelerator it is about.

    Where the device is absent, all checks but the first few are skipped with what ``probe`` says.
    Ranks are processes of their own, so the class must be importable from a module.

    Class attributes:
        accelerator: the accelerator's class.
        config: what the accelerator needs of a config besides its name.
        tolerance: largest relative difference of a loss from plain torch on the host in float32;
            sums in another order cost less, products in a lower precision more.
        expected_failures: name of a check -> why it fails; see :class:`Kit`.
    """

    accelerator: ClassVar[type[Accelerator]]
    config: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-4

    # -- what it is ---------------------------------------------------------------------------

    @check()
    def test_every_member_is_there(self) -> None:
        """Name, device type and both methods without a default exist, and nothing else is asked."""
        kind = self.accelerator
        missing = sorted(getattr(kind, "__abstractmethods__", ()))
        expect(not missing, "no abstract method", ", ".join(missing), f"write it in {kind}")
        for name in ("name", "device_type"):
            value = getattr(kind, name, None)
            text = isinstance(value, str) and value
            expect(text, f"a text in {kind.__name__}.{name}", repr(value), "set it in the class")
        kind()

    @check("test_every_member_is_there")
    def test_the_module_imports_without_torch(self) -> None:
        """Looking at all installed accelerators costs no time."""
        module = self.accelerator.__module__
        loaded = "torch" in imported_with(module)
        expect(not loaded, f"{module} not to import torch", "it does", "do so inside functions")

    @check("test_every_member_is_there")
    def test_the_probe_answers(self) -> None:
        """The probe returns ``None`` or a reason, raises nothing and touches no device."""
        wanted = "probe() to answer None or a reason in words"
        try:
            answer: object = self.accelerator().probe()
        except Exception as error:  # noqa: BLE001 - whatever it raises is wrong
            text = f"{type(error).__name__}: {error}"
            expect(False, wanted, text, "catch it in probe() and return it as the reason")
        sound = answer is None or (isinstance(answer, str) and answer.strip())
        expect(sound, wanted, repr(answer), "return None where the device can be used")
        if self.accelerator.device_type != "cpu":
            touched = run_python(_PROBE.format(self.accelerator)) == "True\n"
            advice = "ask the driver, not torch, in probe(): a process that forks must stay clean"
            expect(not touched, "probe() to create no device context", "it does", advice)

    @check("test_the_probe_answers")
    def test_the_device_is_present(self) -> None:
        """All that follows needs the device."""
        reason = self.accelerator().probe()
        if reason is not None:
            raise SkipTest(f"{self.accelerator.name} cannot be used here: {reason}")

    @check("test_the_device_is_present")
    def test_a_config_finds_it_by_its_name(self) -> None:
        """``"accelerator": name`` in a config takes this class."""
        kind = self.accelerator
        value = f"{kind.__module__}:{kind.__qualname__}"
        for entry in Registry.installed().entries("accelerators"):
            if entry.value == value:
                advice = f"give the class and the entry point of {entry.distribution} one name"
                wanted = f"an entry point named {kind.name!r} for {value}"
                expect(entry.name == kind.name, wanted, repr(entry.name), advice)
        found = type(choose_accelerator(_plan(kind, self.config)))
        expect(found is kind, f"{kind.name!r} to find {value}", found, "choose another name")

    @check("test_the_device_is_present")
    def test_torch_knows_the_device_type(self) -> None:
        """``device_type`` is one of torch's, or one that a package has registered with torch."""
        given = self.accelerator.device_type
        try:
            torch.device(given)
        except RuntimeError as error:
            expect(False, "a device type of torch", repr(given), f"set device_type: {error}")

    @check("test_torch_knows_the_device_type")
    def test_every_rank_gets_a_device(self) -> None:
        """There is at least one device; ranks get different ones as far as they reach."""
        kind, accelerator = self.accelerator, self.accelerator()
        count = accelerator.device_count()
        advice = "check device_count() and device()"
        expect(count > 0, "device_count() of 1 or more", count, advice)
        devices = [accelerator.device(local_rank) for local_rank in range(2 * count)]
        indices = (None, 0) if kind.device_type == "cpu" else tuple(range(count))
        for rank, device in enumerate(devices):
            fits = device.type == kind.device_type and device.index in indices
            wanted = f"device({rank}) to be a {kind.device_type!r} with an index in {indices}"
            expect(fits, wanted, device, advice)
        if kind.device_type != "cpu":
            different = len(set(devices[:count])) == count
            expect(different, f"{count} ranks on {count} devices", devices[:count], advice)

    # -- the device by itself -------------------------------------------------------------------

    @check("test_every_rank_gets_a_device")
    def test_start_leaves_torch_alone(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.start_leaves_torch_alone`."""
        self._run(_with_accelerator, device_checks.start_leaves_torch_alone)

    @check("test_start_leaves_torch_alone")
    def test_synchronize_waits(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.synchronize_waits`."""
        self._run(_on_device, device_checks.synchronize_waits)

    @check("test_synchronize_waits")
    def test_memory_figures_fit(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.memory_figures_fit`."""
        self._run(_on_device, device_checks.memory_figures_fit)

    @check("test_synchronize_waits")
    def test_claimed_dtypes_work(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.dtypes_work`."""
        self._run(_on_device, device_checks.dtypes_work)

    @check("test_synchronize_waits")
    def test_pinned_memory_holds_its_values(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.pinned_memory_holds_its_values`."""
        self._run(_on_device, device_checks.pinned_memory_holds_its_values)

    @check("test_start_leaves_torch_alone")
    def test_ranges_nest(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.ranges_nest`."""
        self._run(_on_device, device_checks.ranges_nest)

    @check("test_memory_figures_fit", "test_pinned_memory_holds_its_values", "test_ranges_nest")
    def test_random_state_is_left_alone(self) -> None:
        """See :func:`~drivetrain.testing.device_checks.random_state_is_left_alone`."""
        self._run(_on_device, device_checks.random_state_is_left_alone)

    # -- jobs -----------------------------------------------------------------------------------

    @check("test_synchronize_waits")
    def test_collectives_of_one_rank(self) -> None:
        """See :func:`~drivetrain.testing.job_checks.collectives_are_right`."""
        self._run(_in_job, job_checks.collectives_are_right)

    @check("test_collectives_of_one_rank")
    def test_collectives_of_two_ranks(self) -> None:
        """See :func:`~drivetrain.testing.job_checks.collectives_are_right`."""
        self._run(_in_job, job_checks.collectives_are_right, ranks=2)

    @check("test_collectives_of_one_rank", "test_random_state_is_left_alone")
    def test_random_streams_go_on(self) -> None:
        """See :func:`~drivetrain.testing.job_checks.random_streams_go_on`."""
        self._run(_in_job, job_checks.random_streams_go_on)

    @check("test_collectives_of_one_rank")
    def test_update_rules_are_right(self) -> None:
        """See :func:`~drivetrain.testing.job_checks.update_rules_are_right`."""
        self._run(_in_job, job_checks.update_rules_are_right)

    @check("test_update_rules_are_right", "test_memory_figures_fit")
    def test_one_rank_learns_what_plain_torch_learns(self) -> None:
        """A job's losses are those of plain torch on the host."""
        (losses,) = self._run(_in_job, job_checks.trains, STEPS)
        self._compare("one rank", losses, self.tolerance)

    @check("test_one_rank_learns_what_plain_torch_learns", "test_collectives_of_two_ranks")
    def test_two_ranks_learn_what_plain_torch_learns(self) -> None:
        """The mean of their losses is that of plain torch on the whole batch."""
        both = self._run(_in_job, job_checks.trains, STEPS, ranks=2)
        means = [sum(step) / 2 for step in zip(*both, strict=True)]
        self._compare("two ranks", means, self.tolerance)

    @check("test_one_rank_learns_what_plain_torch_learns", "test_claimed_dtypes_work")
    def test_autocast_follows_float32(self) -> None:
        """Under autocast, products are in the lower precision and the model learns the same."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        lower = [d for d in self.accelerator().supported_dtypes() if d in names]
        if not lower:
            raise SkipTest(f"{self.accelerator.name} claims no dtype below float32")
        config = {"enabled": True, "dtype": names[lower[0]]}
        (answer,) = self._run(_in_job, job_checks.autocasts, STEPS, torch_autocast=config)
        losses, dtype = answer
        advice = "torch.autocast has to know the device type"
        expect(dtype == str(lower[0]), f"linear layers to compute in {lower[0]}", dtype, advice)
        self._compare("autocast", losses, 0.05)

    @check("test_one_rank_learns_what_plain_torch_learns")
    def test_training_continues_from_a_checkpoint(self) -> None:
        """A job that loads a checkpoint has the losses of the one that wrote it."""
        with tempfile.TemporaryDirectory() as folder:
            ((wrote, loaded),) = self._run(_in_job, job_checks.continues, folder, STEPS)
        near = all(abs(a - b) <= 1e-6 * abs(a) for a, b in zip(wrote, loaded, strict=True))
        advice = "tensors must survive the way to host memory and back"
        expect(near, f"losses {wrote} after loading", loaded, advice)

    # -- helpers --------------------------------------------------------------------------------

    def _run(
        self,
        on_rank: Callable[..., Any],
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int = 1,
        **config: Any,
    ) -> list[Any]:
        """What ``function`` answers on each rank."""
        kind = self.accelerator
        if kind.device_type != "cpu" and (count := kind().device_count()) < ranks:
            raise SkipTest(f"{ranks} ranks need as many devices, there are {count}")
        wanted = {**self.config, **config}
        return run_distributed(on_rank, ranks, function, kind, wanted, arguments, timeout=TIMEOUT)

    def _compare(self, who: str, losses: list[float], tolerance: float) -> None:
        inputs, targets = data.vectors(STEPS * job_checks.BATCH)
        size = job_checks.BATCH
        steps = [
            [(inputs[at : at + size], targets[at : at + size])]
            for at in range(0, STEPS * size, size)
        ]
        wanted = reference_losses(
            models.mlp(),
            steps,
            lambda parameters: torch.optim.AdamW(parameters, **job_checks.OPTIMIZERS["AdamW"]),
            clipping=1.0,
        )
        for step, (loss, plain) in enumerate(zip(losses, wanted, strict=True)):
            expect(
                abs(loss - plain) <= tolerance * abs(plain),
                f"the loss of {who} at step {step} within {tolerance:g} of plain torch's {plain}",
                loss,
                "compare the gradients of one layer with those on the host",
            )


_PROBE = """\
import sys
from importlib import import_module
module = import_module("{0.__module__}")
for part in "{0.__qualname__}".split("."):
    module = getattr(module, part)
module().probe()
device = getattr(sys.modules.get("torch"), "{0.device_type}", None)
print(getattr(device, "is_initialized", bool)())
"""


def _plan(kind: type[Accelerator], config: Mapping[str, Any], ranks: int = 1) -> Plan:
    """A plan on that accelerator, whether or not it is installed."""
    registry = Registry.installed()
    entry = registry.find("accelerators", kind.name)
    if entry is None or entry.value != f"{kind.__module__}:{kind.__qualname__}":
        registry.add("accelerators", kind.name, kind)
    given = {
        "accelerator": kind.name,
        "train_batch_size": job_checks.BATCH,
        "optimizer": {"type": "AdamW", "params": dict(job_checks.OPTIMIZERS["AdamW"])},
    }
    return Plan.build({**given, **config}, world_size=ranks, registry=registry)


def _with_accelerator(
    function: Callable[..., Any],
    kind: type[Accelerator],
    config: Mapping[str, Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Call ``function`` on a rank with an accelerator that is configured and not started."""
    return function(choose_accelerator(_plan(kind, config)), *arguments)


def _on_device(
    function: Callable[..., Any],
    kind: type[Accelerator],
    config: Mapping[str, Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Call ``function`` on a rank with an accelerator that is configured and started."""
    accelerator = choose_accelerator(_plan(kind, config))
    accelerator.start(0, 1)
    return function(accelerator, *arguments)


def _in_job(
    function: Callable[..., Any],
    kind: type[Accelerator],
    config: Mapping[str, Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Call ``function`` on every rank with an open job."""
    ranks = Ranks.current()
    with Job.open(_plan(kind, config, ranks.world_size), ranks) as job:
        return function(job, *arguments)
