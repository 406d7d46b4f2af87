"""A script in the manner of ALST, with DeepSpeed's names, trains as one process does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "sequence" / "tests"))

from sequence_models import LENGTH, ROWS, STEPS, batch, tiny


def data(rank: int, kind: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for step in range(STEPS):
        own = batch(10 * rank + step, kind)
        own.setdefault("position_ids", torch.arange(LENGTH).expand(ROWS, -1))
        found.append(own)
    return found


def script(kind: str, key_heads: int, loop: str) -> Any:
    """Losses and weights of a training in the words of DeepSpeed's documentation.

    With the loop that is packed in a class, the groups are those of DeepSpeed's module, too.
    """
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
        UlyssesSPFwdLossBwdWithLogits,
    )
    from deepspeed.utils import groups
    from torch.distributed.nn.functional import all_gather

    deepspeed.init_distributed("gloo")
    mpu: Any = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path="a/model",
        core_attn_implementation="sdpa",
        sequence_parallel_size=2,
        micro_batch_size=ROWS,
        seq_length_is_variable=True,
    )
    if loop == "packed":
        parallel_state_sp.initialize_sequence_parallel(2)
        mpu = parallel_state_sp
        assert mpu.get_model_parallel_world_size() == 2
        assert mpu.get_sequence_data_parallel_rank() == dist.get_rank()
    model = tiny("llama", num_key_value_heads=key_heads)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "sequence_parallel_size": 2,
    }
    engine, *_ = deepspeed.initialize(
        config=config, model=model, model_parameters=model.parameters(), mpu=mpu
    )
    sp_group = groups.get_sequence_parallel_group()
    loader = UlyssesSPDataLoaderAdapter(
        data(dist.get_rank(), kind),
        sp_rank=groups.get_sequence_parallel_rank(),
        sp_group=sp_group,
        sp_world_size=groups.get_sequence_parallel_world_size(),
        device=engine.device,
    )
    assert len(loader) == 2 * STEPS
    losses = []
    if loop == "packed":
        whole = UlyssesSPFwdLossBwdWithLogits(engine, model, engine.device, 3)
        for part in loader:
            losses.append(whole.sp_fwd_loss_bwd(part).item())
            engine.step()
        loader = []
    for part in loader:
        labels = part.pop("shift_labels")
        logits = engine(**part, use_cache=False).logits
        loss = engine.module.loss_function(
            logits=logits,
            labels=None,
            shift_labels=labels,
            vocab_size=engine.module.config.vocab_size,
        )
        counts = all_gather((labels != -100).sum(), group=sp_group)
        parts = all_gather(loss, group=sp_group)
        total = sum(a * n for a, n in zip(parts, counts, strict=True)) / sum(counts)
        engine.backward(total)
        engine.step()
        losses.append(total.item())
    return losses, [p.detach().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize(
    ("kind", "key_heads", "loop"),
    [
        ("packed", 1, "packed"),
        pytest.param("plain", 4, "open", marks=pytest.mark.long),
    ],
)
def test_a_script_of_alst_trains_as_one_process(kind: str, key_heads: int, loop: str) -> None:
    model = tiny("llama", num_key_value_heads=key_heads)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = []
    for pair in zip(data(0, kind), data(1, kind), strict=True):
        for one in pair:
            loss = model(**one, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    for losses, weights in run_distributed(script, 2, kind, key_heads, loop):
        assert losses == pytest.approx(expected, rel=1e-6)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def refusals() -> list[str]:
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed("gloo")
    found = []

    def register(**changes: Any) -> None:
        given: dict[str, Any] = {
            "model_name_or_path": tiny("llama"),
            "core_attn_implementation": "sdpa",
            "sequence_parallel_size": 2,
            "micro_batch_size": ROWS,
        }
        UlyssesSPAttentionHF.register_with_transformers(**(given | changes))

    for changes in (
        {"core_attn_implementation": "eager"},
        {"core_attn_implementation": "flash_attention_9"},
        {"sequence_parallel_size": 3},
        {"seq_length_is_variable": False},
    ):
        with pytest.raises(ConfigError) as raised:
            register(**changes)
        found.append(str(raised.value))
    for call in (
        lambda: parallel_state_sp.get_sequence_parallel_rank(),
        lambda: parallel_state_sp.initialize_sequence_parallel(1),
        lambda: parallel_state_sp.initialize_sequence_parallel(3),
        lambda: parallel_state_sp.initialize_sequence_parallel(2),
        lambda: parallel_state_sp.initialize_sequence_parallel(2),
    ):
        try:
            call()
            said = ""
        except ConfigError as error:
            said = str(error)
        found.append(said)
    register()
    padded = batch(0, "padded")
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with pytest.raises(TrainingError) as refused:
        tiny("llama")(**padded, position_ids=positions, use_cache=False)
    found.append(str(refused.value))
    model = tiny("llama")
    states = torch.zeros(ROWS, LENGTH, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(states, positions)
    with pytest.raises(TrainingError) as unplaced:
        model.model.layers[0].self_attn(states, angles, None)
    found.append(str(unplaced.value))
    return found


def test_what_scripts_of_alst_ask_wrongly_is_refused_by_name() -> None:
    expected = [
        "eager attention has all scores in memory",
        "Transformers knows no attention 'flash_attention_9'",
        "sequence_parallel_size 3 does not divide the number of ranks, 2",
        "seq_length is needed",
        "there are no groups of ranks that share sequences: call initialize_sequence_parallel",
        "sequence_parallel_size 1: at least 2 ranks share a sequence",
        "sequence_parallel_size 3 does not divide the number of ranks, 2",
        "",
        "groups of 2 ranks that share sequences are made already",
        "a mask hides tokens from others",
        "position_ids are needed: the places of this rank's tokens",
    ]
    for found in run_distributed(refusals, 2):
        for said, begin in zip(found, expected, strict=True):
            assert begin in said


def test_parts_for_chunks_are_those_that_the_engine_cuts() -> None:
    from deepspeed.sequence.fpdt_layer import FPDT_InputConstruct

    tokens = torch.arange(2 * 24).view(2, 24)
    args = SimpleNamespace(ds_sequence_parallel_fpdt_chunk_size=8)
    for rank in range(2):
        made = FPDT_InputConstruct(tokens, tokens, None, None, tokens[:1], args, 2, rank)
        own, labels, loss_mask, mask, positions = made.generate()
        expected = tokens.view(2, 3, 2, 4)[:, :, rank].flatten(1)  # rank's part of every chunk
        assert torch.equal(own, expected)
        assert torch.equal(labels, expected)
        assert torch.equal(positions, expected[:1])
        assert loss_mask is None
        assert mask is None
    args.ds_sequence_parallel_fpdt_chunk_size = 7
    with pytest.raises(ConfigError, match="24 tokens in chunks of 7"):
        FPDT_InputConstruct(tokens, None, None, None, None, args, 2, 0)


def test_names_of_towers_are_in_the_module_and_above_it() -> None:
    import deepspeed.sequence
    from deepspeed.sequence.auto_sp import auto_wrap_model_for_sp
    from deepspeed.sequence.autosp_fusion import LlavaFusionAdapter

    assert deepspeed.sequence.auto_wrap_model_for_sp is auto_wrap_model_for_sp
    assert deepspeed.sequence.LlavaFusionAdapter is LlavaFusionAdapter
