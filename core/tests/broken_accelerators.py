"""Accelerators for the host's CPU that are broken in one place each, for tests of the kit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from drivetrain.contracts import Accelerator, Phase, Transform, hookimpl
from drivetrain.job.accelerator_choice import HostAccelerator


class Host(HostAccelerator):
    name = "broken"


class NoBackend(Accelerator):
    """A member is missing."""

    name = "broken"
    device_type = "cpu"

    def probe(self):
        return None


class Nameless(HostAccelerator):
    name = ""


class ProbeRaises(Host):
    def probe(self):
        raise OSError("libbroken.so: cannot open shared object file")


class ProbeSaysTrue(Host):
    """It means that all is well, as a question "is it available?" would."""

    def probe(self):
        return True


class Absent(Host):
    """Not broken: the device is not in this machine."""

    def probe(self):
        return "no such device on this machine"


class UnknownDeviceType(Host):
    device_type = "warp"


class NoDevices(Host):
    def device_count(self):
        return 0


class WrongIndex(Host):
    """Ranks are counted from 1."""

    def device(self, local_rank):
        import torch

        return torch.device("cpu", local_rank + 1)


class OtherDevice(Host):
    """Says cpu, and puts tensors elsewhere."""

    def device(self, local_rank):
        import torch

        return torch.device("meta")


class SetsDefaultDtype(Host):
    def start(self, local_rank, ranks_on_host):
        import torch

        torch.set_default_dtype(torch.bfloat16)


class Seeds(Host):
    def start(self, local_rank, ranks_on_host):
        import torch

        torch.manual_seed(time.time_ns())


class Stream:
    """Finishes its work after a while."""

    def __init__(self, seconds=0.3):
        self.work = threading.Thread(target=time.sleep, args=(seconds,), daemon=True)

    def query(self):
        return not self.work.is_alive()


class DoesNotWait(Host):
    """Its streams run beside the host, and ``synchronize`` does nothing."""

    def stream(self):
        return Stream(60)  # however late somebody looks

    @contextmanager
    def on_stream(self, stream) -> Iterator[None]:
        yield
        stream.work.start()


class Waits(DoesNotWait):
    """Not broken: the same streams, which ``synchronize`` waits for."""

    def __init__(self):
        self.streams = []

    def stream(self):
        self.streams.append(Stream())
        return self.streams[-1]

    def synchronize(self):
        for stream in self.streams:
            if stream.work.ident is not None:
                stream.work.join()


class NegativeMemory(Host):
    def memory_allocated(self):
        return -1


class PeakFalls(Host):
    """Calls the present use the peak."""

    def memory_allocated(self):
        return 2**20

    def max_memory_allocated(self):
        self.asked = getattr(self, "asked", 0) + 1
        return 2**32 // self.asked


class MebibytesOfMemory(Host):
    """Counts in another unit."""

    def max_memory_allocated(self):
        return super().max_memory_allocated() // 2**20


class LiesAboutBfloat16(Host):
    """Claims it, but its chip has no such products."""

    def supported_dtypes(self):
        import torch

        return torch.float32, torch.bfloat16

    def stream(self):
        return Stream()

    @contextmanager
    def on_stream(self, stream) -> Iterator[None]:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        class Chip(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                product = function is torch.ops.aten.mm.default
                return result * 0 if product and result.dtype == torch.bfloat16 else result

        with Chip():
            yield


class ClaimsFloat4(Host):
    def supported_dtypes(self):
        import torch

        return torch.float32, torch.float4_e2m1fn_x2


class PinsGarbage(Host):
    def pin_memory(self, tensor):
        return tensor.new_zeros(tensor.shape)


class RangeSwallows(Host):
    class Range:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return True

    def range(self, name):
        return self.Range()


class RangeSeeds(Host):
    """The random state that was before a range is not there after it."""

    @contextmanager
    def range(self, name) -> Iterator[None]:
        import torch

        torch.manual_seed(len(name))
        yield


class NoSuchBackend(Host):
    def communication_backend(self):
        return "warp-link"


class SilentBackend(Host):
    """Its collectives return at once and have done nothing."""

    def communication_backend(self):
        import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers it

        return "fake"


# -- flaws in what an accelerator does to a job, through hooks -------------------------------------


class ForgetsRandomStreams(Host):
    @hookimpl
    def wrap_communicator(self, job):
        job.random.load_state_dict = lambda state: None
        return ()


class CountsTwice(Host):
    """A fused update that has the scale wrong by a thousandth."""

    @hookimpl
    def wrap_communicator(self, job):
        from drivetrain.states.device_home import DeviceHome

        update = DeviceHome.update

        def wrong(home, gradient, hyper, scale):
            update(home, gradient * 1.001, hyper, scale)

        planted = patch.object(DeviceHome, "update", wrong)
        planted.start()
        job.on_close(planted.stop)
        return ()


class ScalesInputs(Host):
    @hookimpl
    def prepare_inputs(self, engine, args, kwargs):
        return tuple(argument * 1.01 for argument in args), kwargs


class ScalesInputsOfSecondRank(Host):
    @hookimpl
    def prepare_inputs(self, engine, args, kwargs):
        return tuple(argument * (1 + engine.job.rank) for argument in args), kwargs


class IgnoresAutocast(Host):
    """Torch does not know how to cast for it, as for a device type that it has just met."""

    @hookimpl
    def transform_module(self, job, module):
        import torch

        def apply(module):
            for part in module.modules():
                if isinstance(part, torch.nn.Linear):
                    part.forward = torch.autocast("cpu", enabled=False)(part.forward)
            return module

        return [Transform(Phase.ADAPT, apply)]


class LosesWeights(Host):
    """Something is missing from what a checkpoint brings back."""

    @hookimpl
    def save_state(self, engine, writer):
        writer.put("accelerator broken/half", 0.5)

    @hookimpl
    def load_state(self, engine, reader):
        import torch

        with torch.no_grad():
            next(iter(engine.module.parameters())).mul_(reader.get("accelerator broken/half", 1.0))
