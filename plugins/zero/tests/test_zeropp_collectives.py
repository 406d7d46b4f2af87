"""Quantised collectives on real ranks: what arrives, and how many bytes travel where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain_zero.compressed.block_codec import BlockCodec
from drivetrain_zero.compressed.error_feedback import ErrorFeedback

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import CommunicationError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

RANKS = 4
SHARD = 1000
MESSAGE = {"int8": 1024, "int4": 528}
"""4 scales of 4 bytes; 1000 or 500 bytes of codes; up to a multiple of 16."""


def job_of(**zero: Any) -> Job:
    return Job.open(Plan.build({"train_batch_size": 8, "zero_optimization": {"stage": 1, **zero}}))


def gradients(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What every rank has: [RANKS, RANKS * SHARD], of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(RANKS, RANKS * SHARD, generator=generator)
    return (values * torch.logspace(-3, 3, RANKS * SHARD)).to(dtype)


def reduced(zero: dict[str, Any], dtype: torch.dtype, asynchronous: bool) -> dict[str, Any]:
    with job_of(zero_quantized_gradients=True, **zero) as job:
        mine = gradients(dtype)[job.rank].clone()
        outputs = [torch.empty(SHARD, dtype=dtype) for _ in range(2)]
        job.byte_log.reset()
        handles = [
            job.communicator.reduce_scatter(
                output,
                mine,
                "data",
                Tag(Purpose.GRADIENT, f"b{number}"),
                asynchronous=asynchronous,
            )
            for number, output in enumerate(outputs)
        ]
        for handle in handles:
            handle.wait()
            handle.wait()
        assert torch.equal(outputs[0], outputs[1])
        sent = {  # of the last
            str(call.axis): traffic.sent_bytes
            for call, traffic in job.byte_log.items()
            if call.purpose is Purpose.GRADIENT
        }
        return {"output": outputs[0], "sent": sent}


def half_steps(blocks: torch.Tensor) -> torch.Tensor:
    """Largest rounding error of each number in flat ``blocks`` as int4, as float64."""
    edge = torch.zeros_like(blocks)
    for start in range(0, blocks.numel(), 256):
        edge[start : start + 256] = blocks[start : start + 256].abs().max() / 14
    return edge


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_sums_are_within_the_rounding_of_each_contribution(dtype, asynchronous):
    answers = run_distributed(reduced, RANKS, {}, dtype, asynchronous)
    parts = gradients(dtype).double().view(RANKS, RANKS, SHARD)
    for rank, answer in enumerate(answers):
        exact = parts[:, rank].sum(0)
        bound = sum(half_steps(part) for part in parts[:, rank])
        error = (answer["output"].double() - exact).abs()
        assert (error <= bound * 1.001 + exact.abs() * torch.finfo(dtype).eps).all()
        assert error.max() > 0
        # 3 of 4 messages leave this rank: an eighth of float32, a quarter of bfloat16.
        assert answer["sent"] == {"data": 3 * MESSAGE["int4"]}


def test_across_nodes_only_sums_travel():
    answers = run_distributed(reduced, RANKS, {"zero_ranks_per_node": 2}, torch.float32, False)
    parts = gradients().double().view(2, 2, RANKS, SHARD)
    for rank, answer in enumerate(answers):
        by_node = parts[:, :, rank].sum(1)
        exact = by_node.sum(0)
        first = sum(half_steps(part) for part in parts[:, :, rank].reshape(4, SHARD))
        # The second hop rounds the sums of what the first has rounded.
        second = sum(half_steps(node.abs() + first) for node in by_node)
        error = (answer["output"].double() - exact).abs()
        assert (error <= (first + second) * 1.001).all()
        inside, across = sorted(answer["sent"].values(), reverse=True)
        # Two of four messages stay in the node; of the two sums, one crosses.
        assert (inside, across) == (2 * MESSAGE["int4"], MESSAGE["int4"])


def spoiled() -> tuple[int, int]:
    with job_of(zero_quantized_gradients=True, zero_ranks_per_node=2) as job:
        mine = torch.ones(RANKS * SHARD, dtype=torch.float16)
        if job.rank == 3:
            mine[5] = float("inf")
        output = torch.empty(SHARD, dtype=torch.float16)
        job.communicator.reduce_scatter(output, mine, "data", Tag(Purpose.GRADIENT, "b"))
        return int((~output.isfinite()).sum()), int((output == 4).sum())


def test_overflow_is_still_seen_after_two_hops():
    bad = [answer[0] for answer in run_distributed(spoiled, RANKS)]
    assert bad == [256, 0, 0, 0]  # the block of the shard that it belongs to


def left_alone() -> dict[str, Any]:
    with job_of(zero_quantized_gradients=True, zero_quantized_weights=True) as job:
        communicator, ranks = job.communicator, RANKS
        whole = torch.arange(ranks * SHARD, dtype=torch.float32)
        part = torch.empty(SHARD)
        job.byte_log.reset()
        communicator.reduce_scatter(part, whole, "data", Tag(Purpose.STATE, "b"))
        communicator.reduce_scatter(part, whole, "data", Tag(Purpose.GRADIENT, "b"), op=Op.MAX)
        communicator.all_gather(whole, part, "data", Tag(Purpose.STATE, "b"))
        exact = bool(torch.equal(part, torch.arange(SHARD) + job.rank * SHARD))
        integers = torch.arange(SHARD) * 1000
        gathered = torch.empty(ranks * SHARD, dtype=torch.int64)
        communicator.all_gather(gathered, integers, "data", Tag(Purpose.WEIGHT, "b"))
        few = torch.empty(ranks * 2)
        communicator.all_gather(few, torch.tensor([1e-3, 1e3]), "data", Tag(Purpose.WEIGHT, "b"))
        misfit = ""
        try:
            communicator.all_gather(few, part, "data", Tag(Purpose.WEIGHT, "b"))
        except CommunicationError as error:
            misfit = str(error)
        return {
            "exact": exact,
            "integers": bool(torch.equal(gathered, integers.repeat(ranks))),
            "few": few.tolist() == torch.tensor([1e-3, 1e3] * ranks).tolist(),
            "misfit": misfit,
        }


def test_what_is_no_sum_of_gradients_and_no_weight_travels_as_it_is():
    for answer in run_distributed(left_alone, RANKS):
        assert answer["exact"]
        assert answer["integers"]
        assert answer["few"]
        assert "do not fit: expected 4 ranks x 1000" in answer["misfit"]


def gathered(dtype: torch.dtype) -> dict[str, Any]:
    with job_of(zero_quantized_weights=True) as job:
        shard = gradients(dtype)[job.rank][:SHARD].clone()
        wholes = [torch.empty(RANKS * SHARD, dtype=dtype) for _ in range(2)]
        job.byte_log.reset()
        tag = Tag(Purpose.WEIGHT, "b")
        job.communicator.all_gather(wholes[0], shard, "data", tag)
        sent = job.byte_log.total(Purpose.WEIGHT).sent_bytes
        # As at stages 1 and 2, where the shard may be a slice of the whole.
        slice_ = wholes[1].view(RANKS, SHARD)[job.rank]
        slice_.copy_(shard)
        job.communicator.all_gather(wholes[1], slice_, "data", tag, asynchronous=True).wait()
        return {"wholes": wholes, "sent": sent}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_gather_the_same_rounded_weights(dtype):
    answers = run_distributed(gathered, RANKS, dtype)
    exact = gradients(dtype)[:, :SHARD].double()
    for answer in answers:
        for whole in answer["wholes"]:
            assert torch.equal(whole, answers[0]["wholes"][0])
            error = (whole.double().view(RANKS, SHARD) - exact).abs()
            for row, values in zip(error, exact, strict=True):
                bound = half_steps(values) * 14 / 254
                assert (row <= bound * 1.001 + values.abs() * torch.finfo(dtype).eps).all()
        assert answer["sent"] == 3 * MESSAGE["int8"]  # instead of 3 * 2000 in bfloat16


def a_thousand_ranks_on_meta() -> dict[str, float]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=777, world_size=1000)
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    settings = {"train_batch_size": 1000, "zero_optimization": {**zero, "zero_ranks_per_node": 8}}
    with Job.open(Plan.build(settings, world_size=1000)) as job:
        part = torch.empty(1024, dtype=torch.bfloat16, device="meta")
        whole = torch.empty(1000 * 1024, dtype=torch.bfloat16, device="meta")
        job.communicator.all_gather(whole, part, "data", Tag(Purpose.WEIGHT, "b"))
        job.communicator.reduce_scatter(part, whole, "data", Tag(Purpose.GRADIENT, "b"))
        return {
            f"{call.purpose.value} of {job.mesh.size(call.axis)}": traffic.sent_bytes
            for call, traffic in job.byte_log.items()
            if call.purpose in (Purpose.WEIGHT, Purpose.GRADIENT)
        }


def test_traffic_of_a_thousand_ranks():
    (found,) = run_distributed(a_thousand_ranks_on_meta, 1)
    assert found == {
        "weight of 1000": 999 * 1040,  # plain bfloat16: 999 * 2048
        "gradient of 8": 7 * 125 * 528,
        "gradient of 125": 124 * 528,  # leaves the node; plain: 999 * 2048, of which 7 stay
    }


# -- error feedback, without ranks -----------------------------------------------------------


def send_200_times(feedback: ErrorFeedback | None) -> torch.Tensor:
    """How far the sum of what was sent is from the sum of gradients, as float64."""
    codec = BlockCodec("int4")
    steady = torch.rand(256, generator=torch.Generator().manual_seed(1)) * 0.06
    drift = torch.zeros(256, dtype=torch.float64)
    message = torch.zeros(1, codec.message_bytes(256), dtype=torch.uint8)
    for step in range(200):
        gradient = steady.clone()
        gradient[0] = 1.0 if step % 2 else -1.0
        if feedback is None:
            codec.encode(gradient, message[0])
        else:
            errors = feedback.of("b", 1, 256, gradient.device)
            feedback.encode([gradient], codec, message, errors.messages)
        drift += codec.decode(message[0], 256).double() - gradient.double()
    return drift


def test_error_feedback_bounds_the_drift_of_200_steps():
    # Below half a step of 1 / 7 everything is rounded away, every time.
    assert send_200_times(None).abs().max() > 200 * 0.05
    drift = send_200_times(ErrorFeedback(0.8, 10**6, lambda: 1))
    # |e_last| / beta is at most half a step over beta; errors themselves are kept as int8.
    assert drift.abs().max() < 1 / 14 / 0.8 * 1.5


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_any_weight_of_the_newest_error_bounds_the_drift(beta):
    drift = send_200_times(ErrorFeedback(beta, 10**6, lambda: 1))
    assert drift.abs().max() < 1 / 14 / beta * 1.5


def test_errors_are_forgotten_after_as_many_steps_as_asked_for():
    done = [0]
    feedback = ErrorFeedback(1.0, 3, lambda: done[0])
    device, codec = torch.device("cpu"), BlockCodec("int4")
    forgotten = []
    for done[0] in range(8):
        for key in ("a", "b"):  # two buckets, each reduced twice in a step
            for again in range(2):
                kept = feedback.of(key, 1, 256, device)
                if again == 0:
                    forgotten.append(not kept.messages.any())
                message = torch.zeros(1, codec.message_bytes(256), dtype=torch.uint8)
                feedback.encode([torch.linspace(0, 1, 256)], codec, message, kept.messages)
                assert kept.messages.any()
    assert forgotten[::2] == forgotten[1::2]
    assert [step for step in range(8) if forgotten[2 * step]] == [0, 3, 6]


def test_a_window_with_infinite_gradients_leaves_no_trace_in_the_errors():
    codec = BlockCodec("int4")
    feedback = ErrorFeedback(0.8, 10**6, lambda: 1)
    message = torch.zeros(1, codec.message_bytes(512), dtype=torch.uint8)
    for value in (1.0, float("inf"), 1.0):
        gradient = torch.full((512,), 0.3)
        gradient[0] = value
        errors = feedback.of("b", 1, 512, gradient.device)
        feedback.encode([gradient], codec, message, errors.messages)
    assert codec.decode(message[0], 512).isfinite().all()
