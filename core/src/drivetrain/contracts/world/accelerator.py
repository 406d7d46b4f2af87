"""What core needs to know of a kind of device beyond what torch itself offers.

Streams, events, memory statistics and synchronisation come from ``torch.accelerator`` and
``torch.get_device_module``; an accelerator adds what torch lacks. A minimal one sets ``name`` and
``device_type`` and implements :meth:`probe` and :meth:`communication_backend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from drivetrain.plan.plan import Plan


class Accelerator(ABC):
    """One kind of device. The module that defines it must not import torch at import time.

    Class attributes:
        name: the accelerator's name, equal to its entry point's name.
        device_type: torch's device type, e.g. ``"cuda"``; may differ from ``name``.
        visible_devices_variable: environment variable that selects devices, if there is one.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    visible_devices_variable: ClassVar[str | None] = None

    # -- must be implemented ----------------------------------------------------------------

    @abstractmethod
    def probe(self) -> str | None:
        """Why this accelerator cannot be used here, or ``None`` when it can.

        Cheap (below 0.1 s), safe before a fork, creates no device context, raises nothing.
        """

    @abstractmethod
    def communication_backend(self) -> str:
        """Backend string for ``torch.distributed.init_process_group``, e.g. ``"gloo"``."""

    # -- sensible defaults for devices that torch knows ---------------------------------------

    def configure(self, plan: Plan) -> None:  # noqa: B027
        """Take what the config says of this accelerator; called once, before :meth:`start`."""

    def device(self, local_rank: int) -> torch.device:
        """The device of this process, given its rank on this host."""
        import torch

        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_type, local_rank % max(1, self.device_count()))

    def control_device(self, local_rank: int) -> torch.device:
        """Where messages lie that ranks read at once, such as shapes; the backend takes both."""
        return self.device(local_rank)

    def start(self, local_rank: int, ranks_on_host: int) -> None:
        """Make the device current; called once per process before any tensor is created on it."""
        if self.device_type != "cpu":
            self._module().set_device(self.device(local_rank))

    def device_count(self) -> int:
        """Number of devices of this kind that this process sees."""
        return 1 if self.device_type == "cpu" else int(self._module().device_count())

    def synchronize(self) -> None:
        """Wait for all work queued on the current device; a no-op for host devices."""
        if self.device_type != "cpu":
            self._module().synchronize()

    def supported_dtypes(self) -> Sequence[torch.dtype]:
        """Floating dtypes that matrix products run in natively."""
        import torch

        return (torch.float32, torch.bfloat16, torch.float16)

    def memory_allocated(self) -> int:
        """Bytes of tensors now alive on the current device."""
        return int(self._module().memory_allocated())

    def max_memory_allocated(self) -> int:
        """Highest :meth:`memory_allocated` since :meth:`reset_peak_memory`, in bytes."""
        return int(self._module().max_memory_allocated())

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        self._module().reset_peak_memory_stats()

    def total_memory(self) -> int:
        """Bytes of memory of the current device."""
        return int(self._module().mem_get_info()[1])

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of a host tensor; the tensor itself where that means nothing."""
        return tensor if self.device_type == "cpu" else tensor.pin_memory()

    def stream(self) -> Any | None:
        """A new side stream, or ``None`` for devices that run synchronously."""
        return None if self.device_type == "cpu" else self._module().Stream()

    def on_stream(self, stream: Any | None) -> AbstractContextManager[Any]:
        """Context in which work is queued on ``stream``."""
        return nullcontext() if stream is None else self._module().stream(stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None] | None:
        """What repeats the work that ``function`` queues, without Python; ``None`` if nothing does.

        ``function`` runs any number of times here. A repetition reads and writes the same memory.
        """
        return None

    def alike(self, times: int) -> AbstractContextManager[Any]:
        """Say that what runs in the context stands for ``times`` runs, each like the other.

        Code does so where tensors have no memory, and one run tells as much as all.
        """
        return nullcontext()

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Mark a range for the vendor's profiler."""
        return nullcontext()

    def _module(self) -> Any:
        import torch

        return torch.get_device_module(self.device_type)
