"""What a device must do when nothing but its accelerator is asked; each runs on a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.testing.check import expect

if TYPE_CHECKING:
    from drivetrain.contracts.world.accelerator import Accelerator

MIB = 2**20

SLACK = MIB
"""Bytes by which a system may miscount a process's memory, which it counts in batches."""


def start_leaves_torch_alone(accelerator: Accelerator) -> None:
    """Starting selects the device and changes no other setting of torch."""
    before = _settings()
    accelerator.start(0, 1)
    for name, value in _settings().items():
        expect(
            value == before[name],
            f"start to leave torch's {name} at {before[name]}",
            value,
            "delete what sets it from start()",
        )
    device = accelerator.device(0)
    if device.type != "cpu":
        current = torch.get_device_module(device.type).current_device()
        advice = "call set_device in start()"
        expect(current == device.index, f"{device} to be current after start", current, advice)


def random_state_is_left_alone(accelerator: Accelerator) -> None:
    """Looking at a device draws no random numbers, and seeds nothing."""
    device = accelerator.device(0)
    before = random_states(device)
    for name, call in _looks(accelerator):
        call()
        expect(
            all(map(torch.equal, before, random_states(device))),
            f"{name} to leave the random state as it was",
            "another state",
            "draw from a torch.Generator of your own, or not at all: a run could not be repeated",
        )


def synchronize_waits(accelerator: Accelerator) -> None:
    """Work that was queued on any stream is done when ``synchronize`` returns."""
    device, stream = accelerator.device(0), accelerator.stream()
    with accelerator.on_stream(stream):
        values = torch.ones(512, 512, device=device)
        for _ in range(20):
            values = values @ values / 512
    accelerator.synchronize()
    busy = stream is not None and not stream.query()
    done = "stream.query() to be true after synchronize()"
    expect(not busy, done, "false", "wait for every stream of the device in synchronize()")
    found = set(values.cpu().flatten().tolist())
    expect(
        found == {1.0},
        "products of ones that were queued on a stream, over 512, to be ones",
        sorted(found)[:5],
        "check on_stream() and synchronize()",
    )


def memory_figures_fit(accelerator: Accelerator) -> None:
    """Figures are bytes, the peak is one, and it is kept until it is reset."""
    device = accelerator.device(0)
    before, peak = _memory(accelerator)
    held = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    accelerator.synchronize()
    now, high = _memory(accelerator)
    expect(
        high + SLACK >= max(now, held.nbytes),
        f"max_memory_allocated() to be at least the {max(now, held.nbytes)} bytes in use",
        high,
        "count the same memory in both figures",
    )
    if device.type != "cpu":
        advice = "count tensors on the current device in memory_allocated()"
        wanted = f"memory_allocated() to rise by the {held.nbytes} bytes of a new tensor"
        expect(now - before >= held.nbytes, wanted, now - before, advice)
    del held
    later = _memory(accelerator)[1]
    expect(
        later + SLACK >= high >= peak - SLACK,
        "max_memory_allocated() not to fall until it is reset",
        f"{peak}, then {high}, then {later}",
        "keep the peak until reset_peak_memory()",
    )
    accelerator.reset_peak_memory()
    now, high = _memory(accelerator)
    wanted = f"the peak to start again at memory_allocated(), {now}"
    expect(high + SLACK >= now, wanted, high, "do so in reset_peak_memory()")


def dtypes_work(accelerator: Accelerator) -> None:
    """Products of every claimed dtype, and their gradients, are near those in float64."""
    claimed = tuple(accelerator.supported_dtypes())
    floating = all(d.is_floating_point for d in claimed) and len(set(claimed)) == len(claimed)
    expect(
        torch.float32 in claimed and floating,
        "supported_dtypes() to name torch.float32 and other floating dtypes, each once",
        claimed,
        "list what matrix products run in",
    )
    for dtype in claimed:
        try:
            _product_is_right(accelerator, dtype)
        except (RuntimeError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
            advice = "leave the dtype out of supported_dtypes()"
            expect(False, f"products of the claimed {dtype} to work", text, advice)


def pinned_memory_holds_its_values(accelerator: Accelerator) -> None:
    """Pinning copies a tensor within host memory; from there it reaches the device unharmed."""
    device, values = accelerator.device(0), torch.arange(1000.0)
    pinned = accelerator.pin_memory(values)
    advice = "return a page-locked copy, or the tensor itself, from pin_memory()"
    same = pinned.device.type == "cpu" and torch.equal(pinned, values)
    expect(same, "pin_memory() to keep values and host memory", pinned.cpu()[:4].tolist(), advice)
    if device.type != "cpu":
        expect(pinned.is_pinned(), "pin_memory() to lock pages", "ordinary memory", advice)
    there = pinned.to(device, non_blocking=True)
    accelerator.synchronize()
    arrived = torch.equal(there.cpu(), values)
    expect(arrived, "the copy on the device to be equal", there.cpu()[:4].tolist(), advice)


def ranges_nest(accelerator: Accelerator) -> None:
    """A range may hold another, and lets the errors of its block out."""
    escaped = False
    try:
        with accelerator.range("outer"), accelerator.range("inner"):
            raise KeyError("for the range")
    except KeyError:
        escaped = True
    advice = "return nothing in __exit__"
    expect(escaped, "range() to let an error of its block out", "none", advice)


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the host's default generator and of the device's."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.get_device_module(device.type).get_rng_state(device)


def _settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "random state": torch.get_rng_state().tolist(),
    }


def _looks(accelerator: Accelerator) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every member that a job calls while it trains."""
    for name in (
        *("device_count", "synchronize", "supported_dtypes", "memory_allocated"),
        *("max_memory_allocated", "reset_peak_memory", "total_memory", "stream"),
    ):
        yield f"{name}()", getattr(accelerator, name)
    yield "range()", lambda: _enter(accelerator.range("step"))
    yield "on_stream()", lambda: _enter(accelerator.on_stream(accelerator.stream()))
    yield "pin_memory()", lambda: accelerator.pin_memory(torch.ones(3))


def _enter(context: Any) -> None:
    with context:
        pass


def _memory(accelerator: Accelerator) -> tuple[int, int]:
    """Bytes in use and the peak, which are numbers of bytes within the device's."""
    total: object = accelerator.total_memory()
    figures = []
    for name in ("memory_allocated", "max_memory_allocated"):
        figure = getattr(accelerator, name)()
        expect(
            isinstance(figure, int) and isinstance(total, int) and 0 <= figure <= total,
            f"{name}() to be a number of bytes from 0 to total_memory(), {total!r}",
            repr(figure),
            "count bytes of memory in use",
        )
        figures.append(figure)
    return figures[0], figures[1]


def _product_is_right(accelerator: Accelerator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"left": (24, 40), "right": (40, 8), "weights": (24, 8)}
    exact = {n: torch.randn(s, generator=generator).to(dtype).double() for n, s in shapes.items()}
    with _queued(accelerator):
        there = {n: v.to(accelerator.device(0), dtype).requires_grad_() for n, v in exact.items()}
        product = there["left"] @ there["right"]
        torch.autograd.backward(product, there["weights"].detach())
    left, right, weights = exact.values()
    for name, found, one, other in (
        ("product", product, left, right),
        ("gradient by the left", there["left"].grad, weights, right.T),
        ("gradient by the right", there["right"].grad, left.T, weights),
    ):
        assert found is not None
        off = (found.detach().cpu().double() - one @ other).abs()
        # Rounding errors are relative to the terms, which may cancel.
        worst = float((off / (one.abs() @ other.abs())).max() / torch.finfo(dtype).eps)
        expect(
            worst <= 8 and found.dtype == dtype,
            f"the {name} in {dtype} within 8 rounding errors of float64's",
            f"{worst:.3g} of them in {found.dtype}",
            "leave the dtype out of supported_dtypes()",
        )


@contextmanager
def _queued(accelerator: Accelerator) -> Iterator[None]:
    """Queue work on a side stream, where there are such, and wait for it."""
    with accelerator.on_stream(accelerator.stream()):
        yield
    accelerator.synchronize()
