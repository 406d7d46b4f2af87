"""Tiny models of two sequences or two modalities, their batches, and training in one piece."""

from __future__ import annotations

from typing import Any

import torch

ROWS, SOURCE, TARGET, IMAGE = 2, 21, 14, 39
STEPS = {"t5": 20, "bart": 20, "llava": 5, "qwen": 5, "qwen3": 3, "gemma3": 3}
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
    elif name == "gemma3":
        vision = {**WIDTHS, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
        words = {**WIDTHS, **common, "num_hidden_layers": 2, "num_key_value_heads": 2}
        words |= {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 7}
        words |= {"layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3Config(
            text_config={**words, "max_position_embeddings": 32}, vision_config=vision,
            mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=37, eoi_token_index=36,
        )  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
        # Zeros at first, of which a norm would make gradients that are mostly rounding.
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    elif name == "qwen3":
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1, "intermediate_size": 24}
        vision |= {"out_hidden_size": 16, "num_position_embeddings": 16}
        vision |= {"deepstack_visual_indexes": [0, 1], "initializer_range": 0.2}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
        words = {**WIDTHS, **common, "num_hidden_layers": 2, "num_key_value_heads": 2}
        config = transformers.Qwen3VLConfig(
            vision_config=vision, text_config={**words, "head_dim": 4, "rope_parameters": rope},
            image_token_id=IMAGE, video_token_id=38, vision_start_token_id=37,
            vision_end_token_id=36,
        )  # fmt: skip
        model = transformers.Qwen3VLForConditionalGeneration(config)
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
    if name in ("llava", "gemma3"):
        images = torch.rand(count, 3, 8, 8, generator=generator).double()
        # Tokens of an image see each other in both directions, if they are said to be of one.
        kinds = {"token_type_ids": (source == IMAGE).long()} if name == "gemma3" else {}
        return {**found, **kinds, "pixel_values": images}
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
