"""``get_accelerator()``: the device of this process, with the methods that DeepSpeed gives it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from drivetrain.contracts import Accelerator
from drivetrain.job.accelerator_choice import choose_accelerator


class DeepSpeedAccelerator:
    """One kind of device under DeepSpeed's names; made by :func:`get_accelerator`.

    Names that are not here are looked up in torch's module of the device, such as ``torch.cuda``.

    Args:
        accelerator: Drivetrain's view of it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._name = accelerator.device_type
        self._is_host = self._name == "cpu"
        self.BFloat16Tensor = self._typed(torch.bfloat16)
        self.ByteTensor = self._typed(torch.uint8)
        self.DoubleTensor = self._typed(torch.float64)
        self.FloatTensor = self._typed(torch.float32)
        self.HalfTensor = self._typed(torch.float16)
        self.IntTensor = self._typed(torch.int32)
        self.LongTensor = self._typed(torch.int64)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        module = torch.get_device_module(self._name)
        if hasattr(module, name):
            return getattr(module, name)
        raise AttributeError(
            f"the accelerator {self._name!r} has no {name!r}, nor has torch.{self._name}"
        )

    # -- devices --------------------------------------------------------------------------------

    def device_name(self, device_index: int | None = None) -> str:
        """``"cuda"`` or ``"cuda:0"``; a CPU has no index."""
        return (
            self._name if self._is_host or device_index is None else f"{self._name}:{device_index}"
        )

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """Context in which a device is the current one."""
        if self._is_host or device_index is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._module().device(device_index)
        return context

    def set_device(self, device_index: int) -> None:
        """Make a device the current one."""
        if not self._is_host:
            self._module().set_device(device_index)

    def current_device(self) -> int | str:
        """Index of the current device; ``"cpu"`` on a CPU."""
        return self._name if self._is_host else int(self._module().current_device())

    def current_device_name(self) -> str:
        """The current device, as torch names it."""
        return self._name if self._is_host else f"{self._name}:{self.current_device()}"

    def device_count(self) -> int:
        """Number of devices that this process sees; of a host's CPU, that of the ranks on it."""
        if self._is_host and (ranks := os.environ.get("LOCAL_SIZE", "")).isdecimal():
            return int(ranks)
        return self._accelerator.device_count()

    def is_available(self) -> bool:
        """Whether it works here."""
        return self._accelerator.probe() is None

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on this kind of device."""
        return tensor.device.type == self._name

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for all work queued on the current device."""
        self._accelerator.synchronize()

    def is_synchronized_device(self) -> bool:
        """Whether work is done by the time that a call returns."""
        return self._is_host

    def communication_backend_name(self) -> str:
        """Backend of ``torch.distributed`` for this device."""
        return self._accelerator.communication_backend()

    # -- dtypes ---------------------------------------------------------------------------------

    def supported_dtypes(self) -> list[torch.dtype]:
        """Floating dtypes that matrix products run in."""
        return list(self._accelerator.supported_dtypes())

    def is_bf16_supported(self) -> bool:
        """Whether bfloat16 is one of them."""
        return torch.bfloat16 in self._accelerator.supported_dtypes()

    def is_fp16_supported(self) -> bool:
        """Whether float16 is one of them."""
        return torch.float16 in self._accelerator.supported_dtypes()

    # -- memory, in bytes -----------------------------------------------------------------------

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Memory of tensors that are alive; of the process, on a CPU."""
        return self._accelerator.memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most that this was."""
        return self._accelerator.max_memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Begin a new peak."""
        self._accelerator.reset_peak_memory()

    reset_max_memory_allocated = reset_peak_memory_stats

    def total_memory(self, device_index: int | None = None) -> int:
        """Memory of the device."""
        return self._accelerator.total_memory()

    def available_memory(self, device_index: int | None = None) -> int:
        """Memory of the device that no tensor of this process has."""
        return self.total_memory() - self.memory_allocated()

    def empty_cache(self) -> None:
        """Give cached memory back to the system."""
        if not self._is_host:
            self._module().empty_cache()

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """A page-locked copy of a host tensor; the tensor itself where that means nothing."""
        return self._accelerator.pin_memory(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is page-locked."""
        return tensor.is_pinned()

    # -- random numbers -------------------------------------------------------------------------

    def random(self) -> Any:
        """Torch's module of random numbers."""
        return torch.random

    def manual_seed(self, seed: int) -> Any:
        """Seed the generator of the current device."""
        return torch.manual_seed(seed) if self._is_host else self._module().manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        """Seed the generators of all devices."""
        return torch.manual_seed(seed) if self._is_host else self._module().manual_seed_all(seed)

    def initial_seed(self) -> int:
        """The seed of the current device's generator."""
        return int(torch.initial_seed() if self._is_host else self._module().initial_seed())

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """State of the current device's generator."""
        if self._is_host:
            return torch.get_rng_state()
        return self._module().get_rng_state(*self._given(device_index))  # type: ignore[no-any-return]

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Set the state of the current device's generator."""
        if self._is_host:
            torch.set_rng_state(new_state)
        else:
            self._module().set_rng_state(new_state, *self._given(device_index))

    # -- streams; a CPU has none ----------------------------------------------------------------

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Context in which work is queued on a stream."""
        return self._accelerator.on_stream(stream)

    def Stream(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - DeepSpeed's name
        """A new stream; ``None`` on a CPU."""
        return None if self._is_host else self._module().Stream(*args, **kwargs)

    def Event(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - DeepSpeed's name
        """A new event; ``None`` on a CPU."""
        return None if self._is_host else self._module().Event(*args, **kwargs)

    def current_stream(self, device_index: int | None = None) -> Any:
        """The current stream; ``None`` on a CPU."""
        return None if self._is_host else self._module().current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        """The default stream; ``None`` on a CPU."""
        return None if self._is_host else self._module().default_stream(device_index)

    def range_push(self, msg: str, *_: Any) -> None:
        """Accepted; the profiler's ranges are those of the engine."""

    def range_pop(self, *_: Any) -> None:
        """Accepted, see :meth:`range_push`."""

    # -- kernels --------------------------------------------------------------------------------

    def create_op_builder(self, class_name: str) -> Any:
        """An object of the builder that is called so; ``None`` if there is none."""
        builder = self.get_op_builder(class_name)
        return None if builder is None else builder()

    def get_op_builder(self, class_name: str) -> Any:
        """The builder that is called so; ``None`` if there is none."""
        from deepspeed._parts import op_builder

        return getattr(op_builder, class_name, None)

    def op_builder_dir(self) -> str:
        """The module of builders."""
        return "deepspeed.ops.op_builder"

    def get_compile_backend(self) -> str:
        """The backend that ``engine.compile()`` takes by default."""
        return "inductor"

    def visible_devices_envs(self) -> list[str]:
        """Environment variables that select devices."""
        variable = self._accelerator.visible_devices_variable
        return [] if variable is None else [variable]

    def _module(self) -> Any:
        return torch.get_device_module(self._name)

    def _typed(self, dtype: torch.dtype) -> Any:
        def make(data: Any = (), **options: Any) -> torch.Tensor:
            sizes = isinstance(data, int)
            maker = torch.empty if sizes else torch.tensor
            return maker(data, dtype=dtype, device=self.current_device_name(), **options)

        return make

    @staticmethod
    def _given(device_index: int | None) -> tuple[int, ...]:
        return () if device_index is None else (device_index,)


@lru_cache(maxsize=1)
def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator that Drivetrain chooses here; see ``DRIVETRAIN_ACCELERATOR``."""
    return DeepSpeedAccelerator(choose_accelerator())


def is_current_accelerator_supported() -> bool:
    """True: no other accelerator is chosen than one that a package serves."""
    return True
