"""Time kernels and collectives against torch's in one run, and print ratios.

    python benchmarks/kernels.py adam --threads 2
    python benchmarks/kernels.py adam --device cuda
    python benchmarks/kernels.py ops --device cuda
    python benchmarks/kernels.py rules --threads 2
    python benchmarks/kernels.py collectives --ranks 2
    python benchmarks/kernels.py build

Contenders take turns, round after round, so that all see the same machine at the same time. A
ratio is the median of the per-round ratios, with the middle eighty percent beside it. DeepSpeed's
CPUAdam takes part where ``deepspeed`` can be imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from kernels_worker import Clock, Contenders, take_turns, time_collectives

from drivetrain.testing import run_distributed


def spread(values: Iterable[float]) -> str:
    """Median, and the middle eighty percent."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return f"{statistics.median(ordered):5.2f} ({ordered[cut]:.2f} .. {ordered[-1 - cut]:.2f})"


def show(
    title: str, times: Mapping[str, list[float]], moved: Mapping[str, float], stream: str = ""
) -> None:
    """One line a contender; ratios are speed relative to the first.

    Args:
        title: above the table.
        times: seconds by contender and round.
        moved: bytes that a contender moves.
        stream: the contender that measures bandwidth; others are shown as a share of its rate.
    """
    head = f"{'ratio (middle 80 %)':22} {'share of bandwidth' if stream else ''}"
    print(f"\n{title}\n  {'':34} {'median':>11} {'best':>11}   {head}")
    base = next(iter(times.values()))
    for name, own in times.items():
        line = f"  {name:34} {statistics.median(own) * 1e3:8.3f} ms {min(own) * 1e3:8.3f} ms   "
        line += f"{spread(first / second for first, second in zip(base, own, strict=True)):22}"
        if stream and name in moved:
            factor = moved[name] / moved[stream]
            shares = (factor * s / t for s, t in zip(times[stream], own, strict=True))
            line += f" {spread(shares)}"
        print(line)


# -- fused updates -------------------------------------------------------------------------------


def turns(
    device: str, contenders: Contenders, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds by contender; on a device that works aside, several calls are waited for at once."""
    if device == "cpu":
        return take_turns(contenders, rounds, clock=clock)
    synchronize = torch.get_device_module(device).synchronize
    return take_turns(contenders, rounds, before=synchronize, finish=synchronize, calls=20)


def adam(device: str, elements: int, rounds: int, clock: Clock) -> None:
    """Adam in several storage dtypes against torch's fused AdamW, and memory bandwidth."""
    from drivetrain_kernels import adam as fused_adam

    weights, gradient, m, v = (torch.rand(elements, device=device) for _ in range(4))
    low, out = gradient.bfloat16(), torch.empty(elements, dtype=torch.bfloat16, device=device)
    low_m, low_v, low_weights = m.bfloat16(), v.bfloat16(), weights.bfloat16()
    parameter = torch.nn.Parameter(weights)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    step: dict[str, Any] = {"step": 10, "lr": 1e-3, "weight_decay": 0.01}

    def separate_casts() -> None:
        gradient.copy_(low)
        optimizer.step()
        out.copy_(weights)

    stream = "in-place add (bandwidth)"
    # Name -> what runs, and bytes per element that it reads and writes.
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "torch fused AdamW": (optimizer.step, 28),
        "adam": (lambda: fused_adam(weights, gradient, m, v, **step), 28),
        stream: (lambda: m.add_(v), 12),
        "torch fused AdamW and casts": (separate_casts, 40),
        "bf16 gradient and copy": (lambda: fused_adam(weights, low, m, v, out=out, **step), 28),
        "bf16 states and gradient": (lambda: fused_adam(weights, low, low_m, low_v, **step), 18),
        "bf16 states, gradient and copy": (
            lambda: fused_adam(weights, low, low_m, low_v, out=out, **step),
            20,
        ),
        "all bf16": (lambda: fused_adam(low_weights, low, low_m, low_v, **step), 14),
        "all bf16, stochastic": (
            lambda: fused_adam(low_weights, low, low_m, low_v, seed=1, **step),
            14,
        ),
    }
    peer = deepspeed_adam(parameter) if device == "cpu" else None
    if peer is not None:
        contenders["DeepSpeed CPUAdam"] = (peer, 28)
    runs = {name: run for name, (run, _) in contenders.items()}
    times = turns(device, runs, rounds, clock)
    moved = {name: float(each * elements) for name, (_, each) in contenders.items()}
    size = f"Adam, {elements >> 20} Mi elements on {where(device)}"
    show(f"{size}, against torch's fused AdamW", times, moved, stream)
    casts = "torch fused AdamW and casts"
    low_precision = {
        name: times[name] for name in (casts, *times) if "bf16" in name or name == casts
    }
    show(f"{size}, against torch's fused AdamW between casts", low_precision, {})


def deepspeed_adam(parameter: torch.nn.Parameter) -> Callable[[], object] | None:
    """DeepSpeed's optimizer over the same parameter, if it is there; compiles at first use."""
    try:
        peer = importlib.import_module("deepspeed.ops.adam")
    except ImportError:
        return None
    run: Callable[[], object] = peer.DeepSpeedCPUAdam([parameter], lr=1e-3, weight_decay=0.01).step
    return run


def rules(elements: int, threads: int, rounds: int, clock: Clock) -> None:
    """``AdamW`` as a config names it, by core and by drivetrain-kernels, over one bucket."""
    from drivetrain_kernels import adam_rule

    from drivetrain.contracts import BucketSpec, Segment
    from drivetrain.optimization import factory
    from drivetrain.states.device_home import DeviceHome

    torch.set_num_threads(threads)
    fp32, bf16 = torch.float32, torch.bfloat16
    kinds = {
        "fp32": (fp32, fp32),
        "bf16 parameters and gradients, fp32 masters": (bf16, bf16),
        "bf16 parameters, fp32 gradients and masters": (bf16, fp32),
    }
    for title, (parameter_dtype, gradient_dtype) in kinds.items():
        gradient = torch.rand(elements).to(gradient_dtype)

        def updates(make: Any, dtypes: tuple[Any, Any], g: torch.Tensor) -> Callable[[], object]:
            rule = make({"lr": 1e-3, "weight_decay": 0.01}, None)
            spec = BucketSpec(
                key="bucket0",
                numel=elements,
                segments=(Segment("weight", (elements,), 0, elements, 0),),
                parameter_dtype=dtypes[0],
                gradient_dtype=dtypes[1],
                master_dtype=fp32,
                state_dtype=fp32,
                reduction="data",
                rule=rule,
                group=0,
                device=torch.device("cpu"),
            )
            home, originals = DeviceHome(spec), torch.rand(elements)
            home.adopt(originals.to(dtypes[0], copy=True), originals)
            return lambda: home.update(g, rule.defaults, 0.5)

        dtypes = (parameter_dtype, gradient_dtype)
        makers = {"core": factory.adamw, "drivetrain-kernels": adam_rule.adamw}
        contenders = {name: updates(make, dtypes, gradient) for name, make in makers.items()}
        times = take_turns(contenders, rounds, clock=clock)
        show(f"AdamW, {elements >> 20} Mi elements, {threads} threads: {title}", times, {})


# -- other operators ------------------------------------------------------------------------------


def operators(device: str, elements: int, rounds: int) -> None:
    """Norm, copies and block quantisation against torch or the references, with bandwidth."""
    import drivetrain_kernels as kernels
    from drivetrain_kernels.ops.quantize import DEQUANTIZE, QUANTIZE, REDUCE

    values = torch.randn(elements, device=device)
    low = torch.empty(elements, dtype=torch.bfloat16, device=device)
    cases: dict[str, tuple[float, Contenders]] = {
        "squared norm, float32": (
            4,
            {
                "torch": lambda: values.square().sum(),
                "ours": lambda: kernels.norm_squared([values]),
            },
        ),
        "float32 to bfloat16": (
            6,
            {"torch": lambda: low.copy_(values), "ours": lambda: kernels.cast_copy(low, values)},
        ),
    }
    for name, bits in (("int8", 8), ("int4", 4), ("fp8_e4m3", 8)):
        kind = (name, 256, True)
        codes, scales = kernels.quantize(values, name, block=256)
        many, many_scales = torch.stack([codes] * 4), torch.stack([scales] * 4)
        back = (codes, scales, *kind, elements, torch.float32)
        sums = (many, many_scales, *kind, elements, 0.25)
        for title, moved, op, call in (
            (f"quantize, {name}", 4 + bits / 8, QUANTIZE, (values, *kind)),
            (f"dequantize, {name}", 4 + bits / 8, DEQUANTIZE, back),
            (f"reduce of 4, {name}", 5 * bits / 8, REDUCE, sums),
        ):
            cases[title] = (
                moved,
                {
                    "reference": lambda op=op, call=call: op.reference(*call),
                    "ours": lambda op=op, call=call: op.call(*call),
                },
            )
    for title, (per_element, contenders) in cases.items():
        times = turns(device, contenders, rounds)
        moved_bytes = dict.fromkeys(contenders, per_element * elements)
        show(f"{title}, {elements >> 20} Mi elements on {where(device)}", times, moved_bytes)


def where(device: str) -> str:
    """The device in words."""
    if device == "cpu":
        return f"{torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name())


# -- collectives ----------------------------------------------------------------------------------


def collectives(elements: int, ranks: int, rounds: int) -> None:
    """Reduce-scatter, all-gather, all-reduce and latency against gloo."""
    from drivetrain_cpu.shared_memory import native_library

    native_library()
    found = run_distributed(time_collectives, ranks, elements, rounds, timeout=600)[0]
    for name, times in found.items():
        show(f"{name}, {elements * 4 >> 20} MiB float32, {ranks} ranks", times, {})


# -- builds --------------------------------------------------------------------------------------


def build() -> None:
    """First build of the CPU kernels, and the way from the cache."""
    from drivetrain_cpu.instruction_sets import selected
    from drivetrain_cpu.kernels import kernel_library

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DRIVETRAIN_CACHE"] = folder
        for attempt in ("first build", "from the cache"):
            began = time.perf_counter()
            path = kernel_library(selected()).ensure_built()
            print(f"{attempt} of {path.parent.name}: {time.perf_counter() - began:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("adam", "ops", "rules", "collectives", "build"))
    parser.add_argument(
        "--device", default="cpu", help="of adam and ops: cpu, cuda (and ROCm), xpu"
    )
    parser.add_argument("--elements", type=int, help="default: 64 Mi for adam, else 32 Mi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of adam and rules with one thread: what other jobs disturb less than the wall clock",
    )
    options = parser.parse_args()
    clock = time.thread_time if options.processor_time else time.perf_counter
    if options.processor_time:
        options.threads = 1
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{platform.machine()}, torch {torch.__version__}, load average {load}")
    torch.set_num_threads(options.threads)
    if options.what == "adam":
        adam(options.device, options.elements or 64 << 20, options.rounds, clock)
    elif options.what == "ops":
        operators(options.device, options.elements or 32 << 20, options.rounds)
    elif options.what == "rules":
        rules(options.elements or 32 << 20, options.threads, options.rounds, clock)
    elif options.what == "collectives":
        collectives(options.elements or 32 << 20, options.ranks, options.rounds)
    else:
        build()


if __name__ == "__main__":
    main()
