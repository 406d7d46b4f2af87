"""Encoders with decoders, and models of images and text, train over parts of sequences as whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequence_models import engine_of

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

ROWS, SOURCE, TARGET, IMAGE = 2, 21, 14, 39
STEPS = {"t5": 20, "bart": 20, "llava": 5, "qwen": 5}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


def composite(name: str, **changes: Any) -> Any:
    """A model in float64 with large weights, so that every token matters."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 40, "initializer_range": 0.2}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=12,
            decoder_start_token_id=0, **changes,
        )  # fmt: skip
        model: Any = transformers.T5ForConditionalGeneration(config)
    elif name == "bart":
        config = transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, dropout=0.0,
            encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, init_std=0.2, max_position_embeddings=32, **changes,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    elif name == "llava":
        vision = transformers.CLIPVisionConfig(
            **WIDTHS, num_hidden_layers=2, image_size=8, patch_size=4, initializer_range=0.2
        )
        text = transformers.LlamaConfig(
            **WIDTHS, **common, num_hidden_layers=2, num_key_value_heads=2
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE
        )
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1, "mlp_ratio": 2}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
        words = {**WIDTHS, **common, "num_hidden_layers": 2, "num_key_value_heads": 2}
        config = transformers.Qwen2VLConfig(
            vision_config=vision, text_config={**words, "rope_parameters": rope},
            image_token_id=IMAGE, video_token_id=38, vision_start_token_id=37,
            vision_end_token_id=36,
        )  # fmt: skip
        model = transformers.Qwen2VLForConditionalGeneration(config)
    return model.double()


def examples(name: str, step: int) -> dict[str, torch.Tensor]:
    """A batch whose lengths no number of ranks divides, some of it padded."""
    generator = torch.Generator().manual_seed(step)
    source = torch.randint(1, 36, (ROWS, SOURCE), generator=generator)
    real = torch.ones_like(source)
    real[0, -3:] = 0
    if name in ("t5", "bart"):
        labels = torch.randint(1, 36, (ROWS, TARGET), generator=generator)
        labels[1, -4:] = -100
        found = {"input_ids": source, "labels": labels}
        # Every other step has no padding, so that masks are flags there.
        return found if step % 2 else {**found, "attention_mask": real}
    source[:, 3:7] = IMAGE
    source[1, 12:16] = IMAGE
    labels = source.masked_fill((source == IMAGE) | (real == 0), -100)
    found = {"input_ids": source, "labels": labels, "attention_mask": real}
    count = 3
    if name == "llava":
        return {**found, "pixel_values": torch.rand(count, 3, 8, 8, generator=generator).double()}
    pixels = torch.rand(count * 16, 3 * 4 * 4, generator=generator).double()
    grids = torch.tensor([[1, 4, 4]] * count)
    kinds = (source == IMAGE).int()
    return {**found, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def alone(name: str) -> tuple[list[float], list[torch.Tensor]]:
    model = composite(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS[name]):
        loss = model(**examples(name, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


def shared(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    found = []
    world = int(os.environ["WORLD_SIZE"])
    for name, config in cases:
        engine = engine_of(composite(name), sequence_parallel_size=world, **config)
        losses = []
        for step in range(STEPS[name]):
            loss = engine(**examples(name, step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        whole = [p.detach().clone() for p in engine.module.parameters()]
        found.append((losses, whole))
        engine.destroy()
    return found


AGAIN: dict[str, Any] = {"activation_checkpointing": {"recompute": "all"}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("t5", {}),
    ("bart", {}),
    ("llava", {}),
    ("qwen", {}),
    ("t5", AGAIN),
    ("llava", {**AGAIN, "sequence_parallel": {"loss_tile": 5, "chunk": 6}}),
]
RINGS = [(name, {"sequence_parallel": {"ring_size": 2}}) for name in ("bart", "llava", "qwen")]


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [*CASES, *RINGS]),
        pytest.param(3, [CASES[0], *CASES[2:4]], marks=pytest.mark.long),
        pytest.param(4, [CASES[0], *RINGS[1:]], marks=pytest.mark.long),
    ],
    ids=["2", "3", "4"],
)
def test_composite_models_train_as_in_one_process(
    world: int, cases: list[tuple[str, dict[str, Any]]]
) -> None:
    expected = {name: alone(name) for name in {name for name, _ in cases}}
    for found in run_distributed(shared, world, cases):
        for (losses, weights), (name, config) in zip(found, cases, strict=True):
            wanted, known = expected[name]
            assert losses == pytest.approx(wanted, rel=1e-5), (name, config)
            for ours, theirs in zip(weights, known, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def with_own_mask() -> Any:
    """A model that makes the mask of its language model, as some do for images."""
    model = composite("qwen")

    def masked(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": {"full_attention": None}}

    model.model.language_model.register_forward_pre_hook(masked, with_kwargs=True)
    return model


def clip() -> Any:
    """Towers of images and of text, which meet in no language model."""
    import transformers

    tower = {**WIDTHS, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 40},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )
    return transformers.CLIPModel(config).double()


def refused() -> list[str]:
    """What is said of models and batches that cannot be shared out."""
    source = torch.ones(ROWS, SOURCE, dtype=torch.int64)
    found = []
    engines: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: composite("t5"), {"sequence_parallel": {"ring_size": 2}}),
        (lambda: composite("bart"), {"sequence_parallel": {"chunk": 4}}),
        (lambda: composite("t5"), {"sequence_parallel": {"loss_tile": 4}}),
        (lambda: composite("t5"), {"sequence_parallel": {"inputs": "whole"}}),
        (clip, {}),
    ]
    batches: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: composite("t5"), {"input_ids": source}),
        (lambda: composite("bart"), {"decoder_input_ids": source}),
        (lambda: composite("bart"), {"input_ids": torch.ones(1, 40).long(), "labels": source}),
        (lambda: composite("t5"), {"encoder_outputs": (source,), "labels": source}),
        (with_own_mask, examples("qwen", 0)),
    ]
    for make, config in engines:  # before the run
        with pytest.raises(ConfigError) as raised:
            engine_of(make(), sequence_parallel_size=2, **config)
        found.append(str(raised.value))
    for make, inputs in batches:
        engine = engine_of(make(), sequence_parallel_size=2)
        with pytest.raises(TrainingError) as error:
            engine(**inputs)
        found.append(str(error.value))
        engine.destroy()
    return found


def test_composite_models_that_cannot_be_shared_are_refused_by_name() -> None:
    expected = [
        "adds a bias to its scores, which is not computed by blocks of keys",
        "keys of another sequence have no chunks: leave out sequence_parallel.chunk",
        "sequence_parallel.loss_tile: T5ForConditionalGeneration has an encoder and a decoder",
        "sequence_parallel.inputs: whole: T5ForConditionalGeneration has an encoder",
        "CLIPModel takes image and text, and has no language model that is given inputs_embeds",
        "has no sequence for the decoder; it has input_ids",
        "a batch without input_ids or inputs_embeds cannot be cut",
        "sequences of 40 tokens (made a multiple of 2 for sequence_parallel_size) are longer than",
        "encoder_outputs are of whole sequences",
        "Qwen2VLForConditionalGeneration makes the attention mask of its language model itself",
    ]
    for found in run_distributed(refused, 2):
        for said, begin in zip(found, expected, strict=True):
            assert begin in said, said
