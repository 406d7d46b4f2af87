"""How fast rounded weights and packed codes are made: native kernels beside torch.

    python benchmarks/codes.py --threads 2

Each figure is the least of several runs, in milliseconds, on 4096 x 4096 numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from drivetrain_kernels import fake_quantize, pack_codes, unpack_codes
from drivetrain_kernels.ops.codes import PACK_CODES, UNPACK_CODES
from drivetrain_kernels.ops.fake_quantize import FAKE_QUANTIZE

SIZE = 4096


def least(run: Callable[[], object], times: int) -> float:
    """Milliseconds of the quickest of some runs, after one that is not counted."""
    run()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found) * 1e3


def line(name: str, native: Callable[[], object], torch_: Callable[[], object]) -> None:
    """Measure and print both."""
    mine, others = least(native, 5), least(torch_, 2)
    print(f"{name:32} {mine:8.1f} ms  torch {others:8.1f} ms  {others / mine:6.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        given = weight.to(dtype)
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "asymmetric"
            line(
                f"fake_quantize, {str(dtype)[6:]}, {kind}",
                lambda x=given, s=symmetric: fake_quantize(x, 4, symmetric=s),  # type: ignore[misc]
                lambda x=given, s=symmetric: FAKE_QUANTIZE.reference(x, 4, s),  # type: ignore[misc]
            )
    for bits in (3, 4, 8):
        codes = torch.randint(0, 1 << bits, (SIZE, SIZE), dtype=torch.uint8)
        words = pack_codes(codes, bits)
        line(
            f"pack_codes, {bits} bits",
            lambda c=codes, b=bits: pack_codes(c, b),  # type: ignore[misc]
            lambda c=codes, b=bits: PACK_CODES.reference(c, b),  # type: ignore[misc]
        )
        line(
            f"unpack_codes, {bits} bits",
            lambda w=words, b=bits: unpack_codes(w, b, SIZE),  # type: ignore[misc]
            lambda w=words, b=bits: UNPACK_CODES.reference(w, b, SIZE),  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
