"""ZeRO++ and MiCS in training: losses, traffic, what stays exact, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.states.whole import whole
from drivetrain.testing import assert_trains_like_reference, data, models, run_distributed
from drivetrain.testing.models import TinyGPT

RANKS = 4
BATCH = 8
# Shared memory needs no gathers at stage 3, and what crosses hosts is the subject here.
SEPARATE = {"cpu": {"shared_memory": False}} if find_spec("drivetrain_cpu") else {}
LOCO = {"err_beta": 0.8, "reset_T": 1000}
QUANTISED = {"zero_quantized_weights": True, "zero_quantized_gradients": True}

# Numbers of TinyGPT(): 2 blocks of 12 width^2 + 13 width, the rest in the root; per rank rounded
# up to 16.
BLOCK_NUMEL = 4 * 3184
ROOT_NUMEL = 2 * 64 * 32 + 32 * 32 + 2 * 32
MODEL_NUMEL = 2 * BLOCK_NUMEL + ROOT_NUMEL


def config(zero: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    section = {"stage3_param_persistence_threshold": 0, **zero}
    base = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": section,
    }
    return base | SEPARATE | keys


def build(settings: dict[str, Any], model: Callable[[], nn.Module] = models.tiny_gpt) -> Engine:
    module = model()
    trained = [p for p in module.parameters() if p.requires_grad]
    return drivetrain.initialize(model=module, model_parameters=trained, config=settings)[0]


def train(engine: Engine, steps: range) -> list[float]:
    """This rank's mean loss in each of ``steps``."""
    world, rank = engine.job.world_size, engine.job.rank
    inputs, targets = data.tokens(steps.stop * BATCH)
    losses = []
    for step in steps:
        mine = range(step * BATCH + rank, (step + 1) * BATCH, world)
        total = 0.0
        for at in mine:
            loss = engine(inputs[at : at + 1], targets[at : at + 1])
            engine.backward(loss)
            engine.step()
            total += loss.item()
        losses.append(total / len(mine))
    return losses


def sent(engine: Engine) -> dict[str, float]:
    """Bytes that this rank has sent, by purpose."""
    log = engine.job.byte_log
    return {p.value: log.total(p).sent_bytes for p in (Purpose.WEIGHT, Purpose.GRADIENT)}


def run_all(settings: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Losses, and traffic of the last step, of one job after another."""
    answers = []
    for each in settings:
        engine = build(each)
        losses = train(engine, range(steps - 1))
        engine.job.byte_log.reset()
        losses += train(engine, range(steps - 1, steps))
        answers.append({"losses": losses, "sent": sent(engine)})
        engine.job.close()
    return answers


def by_setting(settings: Sequence[dict[str, Any]], steps: int = 8) -> list[dict[str, Any]]:
    """For each setting the losses, mean over ranks, and rank 0's traffic."""
    answers = run_distributed(run_all, RANKS, settings, steps)
    merged = []
    for of_ranks in zip(*answers, strict=True):
        losses = torch.tensor([answer["losses"] for answer in of_ranks]).mean(0)
        merged.append({"losses": losses, "sent": of_ranks[0]["sent"]})
    return merged


PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
}


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), (1, "fp16"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (3, "fp16")],
)
def test_quantised_training_stays_near_the_plain_one_for_less_traffic(stage, precision):
    keys = PRECISIONS[precision]
    plain, weights, gradients, all_of_it = by_setting(
        [
            config({"stage": stage}, **keys),
            config({"stage": stage, "zero_quantized_weights": True}, **keys),
            config({"stage": stage, "zero_quantized_gradients": True}, **keys),
            config(
                {
                    "stage": stage,
                    **QUANTISED,
                    "zeropp_loco_param": LOCO,
                    "zero_ranks_per_node": 2,
                    "overlap_comm": True,
                    **({"zero_hpz_partition_size": 2} if stage == 3 else {}),
                },
                **keys,
            ),
        ]
    )
    assert plain["losses"][-1] < 0.99 * plain["losses"][0]  # it learns
    for run, bound in ((weights, 3e-3), (gradients, 1e-2), (all_of_it, 1e-2)):
        difference = (run["losses"] / plain["losses"] - 1).abs().max()
        assert 0 < difference < bound
    width = 4 if precision == "fp32" else 2
    int8, int4 = (1 + 4 / 256) / width, (0.5 + 4 / 256) / width
    ratio = {
        name: [run["sent"][name] / plain["sent"][name] for run in (weights, gradients)]
        for name in ("weight", "gradient")
    }
    assert ratio["weight"] == pytest.approx([int8, 1.0], rel=0.02)
    wire = 4 if precision == "fp32" else 2
    assert ratio["gradient"] == pytest.approx([1.0, int4 * width / wire], rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_mics_trains_like_the_reference(stage):
    settings = config({"stage": stage, "mics_shard_size": 2}, gradient_clipping=0.1)
    assert_trains_like_reference(settings, RANKS, model="gpt", steps=8, rtol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_hpz_trains_like_the_reference(overlap):
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "overlap_comm": overlap}
    settings = config(zero, gradient_clipping=0.1)
    assert_trains_like_reference(settings, RANKS, model="gpt", steps=8, rtol=1e-5)


# -- who communicates with whom --------------------------------------------------------------


def traffic(settings: dict[str, Any], model: Callable[[], nn.Module]) -> dict[str, Any]:
    engine = build(settings, model)
    train(engine, range(1))
    engine.job.byte_log.reset()
    train(engine, range(1, 2))
    found: dict[str, float] = {}
    for call, count in engine.job.byte_log.items():
        if call.purpose in (Purpose.WEIGHT, Purpose.GRADIENT):
            part = "frozen " if "frozen" in call.key else ""
            name = f"{part}{call.purpose.value} {call.op} {call.axis}"
            found[name] = found.get(name, 0) + count.payload_bytes
    elements = sum(bucket.shard.numel() for bucket in engine.states._buckets)
    wholes = [bucket.whole for bucket in engine.states._buckets]
    second = [whole._secondary for whole in wholes if whole._secondary is not None]
    seconds = sum(shard.shard.numel() for shard in second)
    engine.job.close()
    return {"payload": found, "shards": elements, "second shards": seconds}


def test_hpz_gathers_over_all_ranks_once_a_window():
    settings = config({"stage": 3, "zero_hpz_partition_size": 2})
    plain = run_distributed(traffic, RANKS, config({"stage": 3}), models.tiny_gpt)
    for hpz, one in zip(
        run_distributed(traffic, RANKS, settings, models.tiny_gpt), plain, strict=True
    ):
        over_all, inside = "weight all_gather data", "weight all_gather zero_secondary"
        assert hpz["payload"][over_all] == 4 * MODEL_NUMEL
        # The same gathers take place as without, but all others in groups of two: in each of two
        # micro-batches, one of the root and of the last block, and two of the other.
        total = hpz["payload"][over_all] + hpz["payload"][inside]
        assert total == one["payload"][over_all] == 4 * (2 * ROOT_NUMEL + 6 * BLOCK_NUMEL)
        assert hpz["shards"] == MODEL_NUMEL // 4
        assert hpz["second shards"] == MODEL_NUMEL // 2  # the extra memory of M / k
        assert one["second shards"] == 0


def half_frozen() -> nn.Module:
    module = models.tiny_gpt()
    module.blocks[0].requires_grad_(requires_grad=False)
    return module


def test_frozen_parameters_leave_their_group_never_again():
    settings = config({"stage": 3, "zero_hpz_partition_size": 2})
    for answer in run_distributed(traffic, RANKS, settings, half_frozen):
        payload = answer["payload"]
        assert "frozen weight all_gather zero_secondary" in payload
        assert "frozen weight all_gather data" not in payload
        assert payload["weight all_gather data"] == 4 * (BLOCK_NUMEL + ROOT_NUMEL)


def test_only_frozen_parameters_are_rounded_where_that_is_asked_for():
    settings = config({"stage": 3, "zero_quantized_nontrainable_weights": True})
    plain = run_distributed(traffic, RANKS, config({"stage": 3}), half_frozen)[0]["payload"]
    rounded = run_distributed(traffic, RANKS, settings, half_frozen)[0]["payload"]
    frozen, trained = "frozen weight all_gather data", "weight all_gather data"
    assert rounded[trained] == plain[trained]
    message = 4 * 13 + 3184 + 12  # scales of 13 blocks, codes, alignment
    assert rounded[frozen] / plain[frozen] == message / (4 * 3184)


def test_mics_sums_replicas_once_a_window():
    def settings(**zero: Any) -> dict[str, Any]:
        return config({"stage": 2, "mics_shard_size": 2, **zero})

    for answer in run_distributed(traffic, RANKS, settings(), models.tiny_gpt):
        numel = answer["shards"] * 2  # halves, whatever the world
        assert MODEL_NUMEL - 64 <= numel <= MODEL_NUMEL + 64
        assert answer["payload"] == {
            "gradient reduce_scatter zero_shard": 2 * 4 * numel,  # two micro-batches
            "gradient all_reduce zero_replica": 4 * numel / 2,
            "weight all_gather zero_shard": 4 * numel,
        }
    boundary = run_distributed(
        traffic, RANKS, settings(gradient_reduction="boundary"), models.tiny_gpt
    )[0]
    assert boundary["payload"]["gradient reduce_scatter zero_shard"] == 4 * numel


# -- what stays exact ------------------------------------------------------------------------


def exactness(zero: dict[str, Any]) -> dict[str, Any]:
    still = {"type": "SGD", "params": {"lr": 0.0}}
    engine = build(config({**zero, "zero_quantized_weights": True}, optimizer=still))
    module, parameter = engine.module, engine.module.blocks[0].up.weight
    seen: list[torch.Tensor] = []
    hook = module.blocks[0].up.register_forward_pre_hook(
        lambda *_: seen.append(parameter.detach().clone())
    )
    train(engine, range(2))
    hook.remove()
    with whole(module):
        values = {name: p.detach().clone() for name, p in module.named_parameters()}
    with whole([parameter], write_rank=1):
        if engine.job.rank == 1:
            parameter.data[3, 5] = 0.25
    train(engine, range(2, 3))
    with whole(module):
        written = parameter.detach().clone()
    engine.job.close()
    return {"seen": seen, "values": values, "written": written}


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
        {"stage": 3, "stage3_param_persistence_threshold": 10**6},
        {"stage": 3, "zero_hpz_partition_size": 2},
    ],
)
def test_all_ranks_compute_with_the_same_rounded_weights_and_keep_exact_ones(zero):
    answers = run_distributed(exactness, RANKS, zero)
    original = models.tiny_gpt()
    parameter = original.blocks[0].up.weight.detach()
    for answer in answers:
        for seen in answer["seen"]:
            assert torch.equal(seen, answers[0]["seen"][0])
            error = (seen - parameter).abs().max()
            assert 0 < error < parameter.abs().max() / 254 * 6  # blocks hold norms of 1 too
        for name, values in original.named_parameters():
            assert torch.equal(answer["values"][name], values)
        # Writing one number does not round the others.
        expected = parameter.clone()
        expected[3, 5] = 0.25
        assert torch.equal(answer["written"], expected)


# -- error feedback in a whole job -----------------------------------------------------------


class Linear(nn.Module):
    """Its gradient is the mean of its inputs, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(512))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.weight).mean()


def drifts(settings: Sequence[dict[str, Any]]) -> list[float]:
    """Largest distance to the exact weights after 200 steps of gradient descent at rate 1."""
    found = []
    for each in settings:
        engine = build(each, Linear)
        steady = torch.rand(512, generator=torch.Generator().manual_seed(1)) * 0.06
        exact = torch.zeros(512, dtype=torch.float64)
        for step in range(200):
            inputs = steady.clone()
            inputs[0] = inputs[256] = 1.0 if step % 2 else -1.0
            engine.backward(engine(inputs[None], inputs))
            engine.step()
            exact -= inputs.double()
        with whole(engine.module):
            drift = (engine.module.weight.detach().double() - exact).abs().max()
        found.append(float(drift))
        engine.job.close()
    return found


def test_error_feedback_bounds_the_drift_of_a_job():
    def settings(**loco: Any) -> dict[str, Any]:
        return config(
            {"stage": 3, "zero_quantized_gradients": True, **loco},
            train_batch_size=2,
            gradient_clipping=0.0,
            optimizer={"type": "SGD", "params": {"lr": 1.0}},
        )

    (lost, kept), *others = run_distributed(
        drifts, 2, [settings(), settings(zeropp_loco_param=LOCO)]
    )
    assert all(other == [lost, kept] for other in others)
    assert lost > 200 * 0.05  # all below half a step of 1 / 7 is rounded away, every time
    assert kept < 1 / 14 / 0.8 * 1.5


# -- checkpoints -----------------------------------------------------------------------------


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of this rank, and the parameters as they are shown."""
    return {
        f"{fragment.kind}/{fragment.name}/{number}": fragment.read().clone()
        for number, fragment in enumerate(engine.states.fragments())
        if fragment.kind != "gradient"
    }


def resume(settings: dict[str, Any], folder: str) -> tuple[bool, int]:
    """Whether a resumed run ends like one without a break; and the kinds that were compared."""
    engine = build(settings)
    train(engine, range(2))
    engine.save_checkpoint(folder)
    losses = train(engine, range(2, 4))
    expected = state(engine)
    engine.job.close()
    engine = build(settings)
    train(engine, range(1))
    engine.load_checkpoint(folder)
    same = train(engine, range(2, 4)) == losses
    found = state(engine)
    engine.job.close()
    same = same and all(torch.equal(found[key], values) for key, values in expected.items())
    errors = [key for key in found if key.startswith("quantization_error")]
    return same, len(errors)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {"zero_quantized_weights": True}),
        (2, {**QUANTISED, "zeropp_loco_param": LOCO, "mics_shard_size": 2}),
        (3, {**QUANTISED, "zeropp_loco_param": LOCO, "zero_ranks_per_node": 2}),
        (3, {**QUANTISED, "zero_hpz_partition_size": 2}),
    ],
)
def test_a_resumed_run_ends_like_one_without_a_break(stage, zero, tmp_path):
    settings = config({"stage": stage, **zero}, bf16={"enabled": True})
    answers = run_distributed(resume, RANKS, settings, str(tmp_path))
    assert [same for same, _ in answers] == [True] * RANKS
    assert all(bool(errors) == ("zeropp_loco_param" in zero) for _, errors in answers)


def save(settings: dict[str, Any], folder: str) -> dict[str, torch.Tensor]:
    engine = build(settings)
    train(engine, range(2))
    engine.save_checkpoint(folder)
    with whole(engine.module):
        values = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.job.close()
    return values


def load(settings: dict[str, Any], folder: str) -> dict[str, torch.Tensor]:
    engine = build(settings)
    engine.load_checkpoint(folder)
    with whole(engine.module):
        values = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    train(engine, range(2, 3))
    engine.job.close()
    return values


LAYOUTS = [
    (RANKS, {"stage": 2, "mics_shard_size": 2}),
    (RANKS, {"stage": 3, **QUANTISED, "zeropp_loco_param": LOCO}),
    (2, {"stage": 3, "zero_hpz_partition_size": 2}),
]


@pytest.mark.parametrize(("first", "second"), list(pairwise([*LAYOUTS, LAYOUTS[0]])))
def test_checkpoints_load_in_other_layouts(first, second, tmp_path: Path):
    (ranks, zero), (others, other) = first, second
    saved = run_distributed(save, ranks, config(zero), str(tmp_path))
    for loaded in run_distributed(load, others, config(other), str(tmp_path)):
        for name, values in saved[0].items():
            assert torch.equal(loaded[name], values)


def overflow(settings: dict[str, Any]) -> list[Any]:
    engine = build(settings)
    train(engine, range(1))
    before = state(engine)
    inputs, targets = data.tokens(BATCH)
    for micro_batch in range(2):
        loss = engine(inputs[:1], targets[:1])
        bad = engine.job.rank == 3 and micro_batch == 1
        engine.backward(loss * float("inf") if bad else loss)
        engine.step()
    after = state(engine)
    kinds = ("parameter", "master", "exp_avg")
    same = all(torch.equal(after[k], v) for k, v in before.items() if k.startswith(kinds))
    skipped = engine.skipped_steps
    train(engine, range(1, 2))
    engine.job.close()
    return [same, skipped, engine.skipped_steps]


@pytest.mark.parametrize(
    "zero",
    [{"mics_shard_size": 2}, {**QUANTISED, "zeropp_loco_param": LOCO, "zero_ranks_per_node": 2}],
)
def test_one_ranks_overflow_is_seen_by_all_and_forgotten_by_the_errors(zero):
    settings = config({"stage": 2, **zero}, **PRECISIONS["fp16"])
    assert run_distributed(overflow, RANKS, settings) == [[True, 1, 1]] * RANKS


def norm(settings: dict[str, Any]) -> float:
    engine = build(settings)
    train(engine, range(1))
    found = float(engine.get_global_grad_norm())
    engine.job.close()
    return found


def test_mics_counts_every_parameter_once_in_the_norm():
    module = TinyGPT()
    module.load_state_dict(models.tiny_gpt().state_dict())
    inputs, targets = data.tokens(BATCH)
    module.double()(inputs, targets).backward()
    exact = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()]))
    for stage in (1, 3):
        for found in run_distributed(
            norm, RANKS, config({"stage": stage, "mics_shard_size": 2}, gradient_clipping=1.0)
        ):
            assert found == pytest.approx(float(exact), rel=1e-5)
