"""Towers and merges of images that scripts cut themselves compute what one process does."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from drivetrain_sequence.autosp_scripts import (
    UlyssesSPViTAttention,
    auto_wrap_model_for_sp,
    detect_model_sp_info,
)
from drivetrain_sequence.fusion_scripts import (
    InternVLFusionAdapter,
    LlavaFusionAdapter,
    ModalityFusionSPAdapter,
    Qwen2VLFusionAdapter,
)
from drivetrain_sequence.group import GroupLine
from sequence_composites import WIDTHS, composite
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

ROWS, PATCHES, WIDTH = 2, 7, 16
COUNTS = (4, 3)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def tower(class_token: bool) -> nn.Module:
    """The layers of a vision tower."""
    import transformers

    torch.manual_seed(0)
    kind = "CLIP" if class_token else "Siglip"
    config = getattr(transformers, f"{kind}VisionConfig")(
        **WIDTHS, num_hidden_layers=2, image_size=8, patch_size=4
    )
    found: nn.Module = getattr(transformers, f"{kind}VisionModel")(config).double()
    return found


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    encoder: Any = model.get_submodule("encoder")
    for layer in encoder.layers:
        x = layer(x, None)
        x = x[0] if isinstance(x, tuple) else x
    return x


def in_parts() -> list[Any]:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), list[Any]()
    for class_token in (False, True):
        model = auto_wrap_model_for_sp(tower(class_token), None)
        first, x = randn(ROWS, 1, WIDTH, seed=1), randn(ROWS, PATCHES, WIDTH)
        own = x.detach().split(COUNTS, 1)[rank].requires_grad_()
        gather = GroupLine.all_gather
        with mock.patch.object(GroupLine, "all_gather", autospec=True, side_effect=gather) as asked:
            output = run(model, torch.cat([first, own], 1) if class_token else own)
        (output * output.detach().cos()).sum().backward()
        found.append((output.detach(), own.grad, first.grad, asked.call_count))
    with pytest.raises(TrainingError, match="an attention_mask is of the patches of one rank"):
        UlyssesSPViTAttention(nn.Identity(), None)(x, attention_mask=x)
    found.append([fused(name, rank, 2) for name in ADAPTERS])
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """Of both ranks."""
    return run_distributed(in_parts, 2)


def test_towers_over_two_ranks_are_those_of_one(results: list[Any]) -> None:
    for number, class_token in enumerate((False, True)):
        x, firsts = randn(ROWS, PATCHES, WIDTH), [randn(ROWS, 1, WIDTH, seed=1) for _ in range(2)]
        outputs, total = [], torch.zeros((), dtype=torch.float64)
        for rank, first in enumerate(firsts):  # the sum of what both ranks have for a loss
            whole = run(tower(class_token), torch.cat([first, x], 1) if class_token else x)
            skipped = whole[:, int(class_token) :].split(COUNTS, 1)[rank]
            output = torch.cat([whole[:, : int(class_token)], skipped], 1)
            outputs.append(output.detach())
            total = total + (output * output.detach().cos()).sum()
        total.backward()
        assert x.grad is not None
        for rank, found in enumerate(results):
            output, gradient, _, asked = found[number]
            assert asked == 2  # of each layer, for numbers of patches
            torch.testing.assert_close(output, outputs[rank])
            torch.testing.assert_close(gradient, x.grad.split(COUNTS, 1)[rank])
    # Ranks have copies of the token for the whole image, whose gradients add up.
    ours, theirs = (found[1][2] for found in results)
    torch.testing.assert_close(ours + theirs, firsts[0].grad + firsts[1].grad)


IMAGE, BEGIN, END = 39, 37, 36
ADAPTERS = ("llava", "intern", "qwen")


def tokens_of(name: str) -> torch.Tensor:
    """Two rows: with two images of two patches, and with one of four (LLaVA) or of three."""
    if name == "llava":
        return torch.tensor([[1, IMAGE, 2, IMAGE, 3, 4, 5], [IMAGE, 1, 2, 3, 4, 5, 6]])
    one = [BEGIN, IMAGE, IMAGE, END, BEGIN, IMAGE, IMAGE, END, 1]
    other = [1, 2, BEGIN, IMAGE, IMAGE, IMAGE, END, 3, 4]
    return torch.tensor([one, other])


def adapter_of(name: str) -> ModalityFusionSPAdapter:
    projection = nn.Linear(5, WIDTH).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in projection.parameters():
        nn.init.normal_(parameter, generator=generator)
    if name == "qwen":
        return Qwen2VLFusionAdapter(projection, None, BEGIN, END)
    kind = LlavaFusionAdapter if name == "llava" else InternVLFusionAdapter
    return kind(projection, None, IMAGE)


def fused(name: str, rank: int, size: int) -> list[torch.Tensor | None]:
    """This rank's part, and gradients: of its features, of all text, and of the projection."""
    tokens, adapter = tokens_of(name), adapter_of(name)
    text = randn(*tokens.shape, WIDTH, seed=3)
    features = randn(ROWS, 4, 5, seed=4).detach().split([3, 1] if size > 1 else [4], 1)[rank]
    features.requires_grad_()
    output = adapter(features, text, tokens)
    (output * output.detach().cos()).sum().backward()
    found = [text.grad, *(p.grad for p in adapter.parameters())]
    for gradient in found if size > 1 else []:
        dist.all_reduce(gradient)
    return [output.detach(), features.grad, *found]


def by_hand(name: str) -> list[torch.Tensor | None]:
    """Of both ranks, row by row and token by token."""
    tokens, adapter = tokens_of(name), adapter_of(name)
    text, features = randn(*tokens.shape, WIDTH, seed=3), randn(ROWS, 4, 5, seed=4)
    rows = []
    for row, words, patches in zip(
        tokens.tolist(), text, adapter.projection(features), strict=True
    ):
        each, left = list[torch.Tensor](), list(patches)
        images = 4 // row.count(IMAGE) if name == "llava" else 1
        for token, word in zip(row, words, strict=True):
            if token == IMAGE:
                each += [left.pop(0) for _ in range(images)]
            else:
                each.append(word)
        rows.append(torch.stack(each))
    whole = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    whole = nn.functional.pad(whole, (0, 0, 0, whole.shape[1] % 2))
    (whole * whole.detach().cos()).sum().backward()
    return [whole.detach(), features.grad, text.grad, *(p.grad for p in adapter.parameters())]


def test_images_come_where_text_says_over_two_ranks(results: list[Any]) -> None:
    for number, name in enumerate(ADAPTERS):
        whole, features, *others = by_hand(name)
        parts = [found[-1][number] for found in results]
        torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), whole)
        torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), features)
        for part in parts:
            torch.testing.assert_close(part[2:], others)


def test_a_tower_in_one_piece_is_itself() -> None:
    for name in ADAPTERS:
        whole, *others = by_hand(name)
        assert whole is not None
        part, *gradients = fused(name, 0, 1)
        assert part is not None
        torch.testing.assert_close(part, whole[:, : part.shape[1]])
        torch.testing.assert_close(gradients, others)


def test_attentions_are_found_and_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = composite("llava")
    info = detect_model_sp_info(model)
    assert [name for name, _ in info.vit_attn_modules] == [
        f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(2)
    ]
    assert [name for name, _ in info.llm_attn_modules] == [
        f"model.language_model.layers.{i}.self_attn" for i in range(2)
    ]
    assert info.vision_projection_module is not None
    assert info.vision_projection_module[0] == "model.multi_modal_projector"
    with caplog.at_level(logging.WARNING, "drivetrain.sequence"):
        assert auto_wrap_model_for_sp(model, None) is model
    assert isinstance(model.model.vision_tower.encoder.layers[0].self_attn, UlyssesSPViTAttention)
    said = caplog.text
    assert "2 other attentions, such as model.language_model.layers.0.self_attn, stay" in said
    assert "model.multi_modal_projector makes embeddings of patches" in said
    with pytest.raises(ConfigError, match="Linear has no attention"):
        auto_wrap_model_for_sp(nn.Linear(2, 2), None)


def test_images_that_do_not_match_their_places_are_refused() -> None:
    features, text = randn(ROWS, 3, 5), randn(ROWS, 9, WIDTH)
    odd = torch.full((ROWS, 9), IMAGE)
    with pytest.raises(TrainingError, match="9 tokens of a row stand for images, which have 3"):
        adapter_of("intern")(features, text, odd)
    odd[:, 2:] = 1
    with pytest.raises(TrainingError, match="2 tokens of a row stand for images, which have 3"):
        adapter_of("intern")(features, text, odd)
    with pytest.raises(TrainingError, match="3 embeddings of images are not equally many for each"):
        adapter_of("llava")(features, text, odd)
    odd[:, 0] = BEGIN
    with pytest.raises(
        TrainingError, match="tokens 37 and 36, which begin and end images, are not"
    ):
        adapter_of("qwen")(features, text, odd)
    with pytest.raises(NotImplementedError, match="override _splice_visual_into_text"):
        ModalityFusionSPAdapter(nn.Identity(), None)(text, text, odd)
