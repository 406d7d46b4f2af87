"""``eval_batch`` with the arguments of DeepSpeed's pipelines, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_pipeline_module import MICRO_BATCHES, data, engine_of, loss_fn, module

from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

SHARDS = 2


def evaluated(schedule: str) -> tuple[bool, int, dict[str, Any]]:
    config = {"pipeline": {"stages": 2, "schedule": schedule}}
    engine = engine_of(module(None), config)
    shard = engine.job.mesh.coordinate("dp")
    own = [micro[shard] for micro in data(1, SHARDS)[0]]
    inputs = [x for x, _ in own]
    call = engine.eval_micro_batches
    found = {
        "mean": call(iter(own)),
        "first two": call(iter(own), num_micro_batches=2),
        "here alone": call(iter(own), bcast_loss=False),
        "each": call(iter(own), reduce_output=None),
        "each, here alone": call(iter(own), reduce_output=None, bcast_loss=False),
        "logits": call(iter(own), return_logits=True),
        "logits of one": call(iter(own), True, num_micro_batches=1)[1],
        "outputs": call(iter(inputs), compute_loss=False, reduce_output=None),
        "mean output": call(iter(own), compute_loss=False),
        "trained": engine.train_batch(iter(own)).item(),
    }
    with pytest.raises(TrainingError, match="reduce_output is 'sum', expected avg or None"):
        call(iter(own), reduce_output="sum")
    with pytest.raises(TrainingError, match="num_micro_batches is 0, expected 1 or more"):
        call(iter(own), num_micro_batches=0)
    has_end = engine.is_last_stage()
    engine.destroy()
    return has_end, shard, found


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_losses_and_outputs_are_those_of_one_process(schedule: str) -> None:
    model, steps = module(1), data(1, SHARDS)[0]
    with torch.no_grad():
        logits = [[model(micro[shard][0]) for micro in steps] for shard in range(SHARDS)]
    losses = torch.tensor(
        [
            [loss_fn(logits[shard][m], steps[m][shard][1]) for m in range(MICRO_BATCHES)]
            for shard in range(SHARDS)
        ]
    )
    ends = 0
    for has_end, shard, found in run_distributed(evaluated, 2 * SHARDS, schedule):
        ends += has_end
        close(found["mean"], losses.mean())
        close(found["first two"], losses[:, :2].mean())
        close(torch.stack(found["each"]), losses[shard])
        close(found["logits"][0], losses.mean())
        assert found["trained"] == pytest.approx(losses.mean().item(), rel=1e-5)
        if has_end:
            close(found["here alone"], losses.mean())
            close(torch.stack(found["each, here alone"]), losses[shard])
            close(found["logits"][1], logits[shard])
            close(found["logits of one"], logits[shard][0])
            close(found["outputs"], logits[shard])
            close(found["mean output"], torch.stack([x for of in logits for x in of]).mean(0))
        else:
            for name in ("here alone", "each, here alone", "logits of one", "outputs"):
                assert found[name] is None, name
            assert found["logits"][1] is None
            assert found["mean output"] is None
    assert ends == SHARDS
