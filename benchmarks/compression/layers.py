"""Where rounding loses what: errors of single layers of a real model, on tokens not calibrated on.

    python benchmarks/compression/layers.py FOLDER     # of model.py

Inputs of some blocks' layers are taken from rows of the calibration data; three quarters of the
tokens calibrate, the others are what errors are measured on: the mean over tokens of the size of
what the output is off by, over its own. Printed are, for 8 bits, inputs or weights alone, both, and
both after SmoothQuant's search; for 4 bits in groups of 64, rounding to the nearest and GPTQ by
damping, and what an independent GPTQ in float64 makes of the same (ranges not cut).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from drivetrain_compression.calibrated.gptq import Order, gptq, invert
from drivetrain_compression.calibrated.grids import (
    Integers,
    fit,
    fit_by_error,
    round_to,
    stored,
    weight_of,
)
from drivetrain_compression.calibrated.results import rounded_tokens
from safetensors.torch import load_file

INPUTS = {
    "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.up_proj": ("up_proj", "gate_proj"),
    "mlp.down_proj": ("down_proj",),
}
"""The layer that is watched, and those that get the same input."""

GROUP, DAMPINGS = 64, (0.01, 0.03, 0.1, 0.3)


def captured(
    folder: Path, blocks: list[int], rows: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [tokens, in], in a random order, and weights [out, in], by block and layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    weights = {}
    for number in blocks:
        block = model.model.layers[number]
        for name, others in INPUTS.items():
            key, layer = f"{number}.{name}", block.get_submodule(name)
            prefix = name.rpartition(".")[0]
            parts = [block.get_submodule(f"{prefix}.{other}").weight for other in others]
            weights[key] = torch.cat([part.detach() for part in parts]).float()
            layer.register_forward_pre_hook(
                lambda _, args, key=key: seen.setdefault(key, []).append(args[0].flatten(0, 1))
            )
    with torch.inference_mode():
        for part in load_file(folder / "rows")["calibration"][:rows].split(2):
            model.model(input_ids=part)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(torch.cat(next(iter(seen.values())))), generator=generator)
    return {key: (torch.cat(x)[order].float(), weights[key]) for key, x in seen.items()}


def off(x: torch.Tensor, near: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over tokens of how far ``x near^T`` is from ``wanted``, relative to each token's."""
    errors = (x @ near.T - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-20)
    return float(errors.mean())


def eight_bits(x: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Errors of W8A8: ``x`` are all tokens, of which the last quarter is measured."""
    fitted, held = x[: -len(x) // 4], x[-len(x) // 4 :]
    wanted = held @ weight.T

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scales = fit(values, Integers(8))
        return weight_of(round_to(values, Integers(8), scales), scales)

    found = {
        "inputs": off(rounded_tokens(held, "int8"), weight, wanted),
        "weights": off(held, rounded(weight), wanted),
        "both": off(rounded_tokens(held, "int8"), rounded(weight), wanted),
    }
    top, own = fitted.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    ways = []
    for step in range(11):
        by = top.pow(step / 10) / own.pow(1 - step / 10)
        near = rounded(weight * by)
        part = fitted[:512]
        ways.append((off(rounded_tokens(part / by, "int8"), near, part @ weight.T), by))
    by = min(ways, key=lambda way: way[0])[1]
    return found | {
        "smoothed": off(rounded_tokens(held / by, "int8"), rounded(weight * by), wanted)
    }


def four_bits(x: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Errors of 4 bits in groups, by damping."""
    fitted, held = x[: -len(x) // 4], x[-len(x) // 4 :]
    wanted, grid = held @ weight.T, Integers(4)
    hessian = 2 * fitted.T @ fitted / len(fitted)
    whole = stored(fit(weight, grid, GROUP), torch.bfloat16)
    cut = stored(fit_by_error(weight, grid, GROUP, hessian), torch.bfloat16)
    order = Order.by_activity(hessian)

    def ours(share: float) -> torch.Tensor:
        inverse = invert(order.of(hessian, 0, 1), share)
        return weight_of(gptq(weight, inverse, grid, cut, order=order), cut)

    made: dict[str, Callable[[], torch.Tensor]] = {
        "nearest": lambda: weight_of(round_to(weight, grid, whole), whole),
        "float64": lambda: as_published(weight, hessian, whole.scale),
    }
    made |= {f"damping {share}": lambda share=share: ours(share) for share in DAMPINGS}
    return {name: off(held, make(), wanted) for name, make in made.items()}


def as_published(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323) with large activations first and a damping of 0.01, in float64."""
    left, near = weight.double(), hessian.double()
    order = torch.argsort(near.diagonal(), descending=True)
    near = near + 0.01 * near.diagonal().mean() * torch.eye(len(near), dtype=torch.float64)
    left, group = left[:, order].clone(), (torch.arange(len(near)) // GROUP)[order]
    upper = torch.linalg.cholesky(torch.linalg.inv(near[order][:, order]), upper=True)
    found = torch.zeros_like(left)
    for at in range(len(near)):
        step = scale[:, group[at]].double()
        found[:, at] = torch.round(left[:, at] / step).clamp(-8, 7) * step
        error = (left[:, at] - found[:, at]) / upper[at, at]
        left[:, at:] -= torch.outer(error, upper[at, at:])
    return found[:, torch.argsort(order)].float()


def main() -> None:
    """Print a table as JSON: errors by layer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 9, 20])
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    table = {}
    for key, (x, weight) in captured(options.folder, options.blocks, options.rows).items():
        table[key] = {"w8a8": eight_bits(x, weight), "w4": four_bits(x, weight)}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
