"""Encoders with decoders, and models of images and text, train over parts of sequences as whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial, wraps
from importlib.util import find_spec
from itertools import chain
from typing import Any

import pytest
import torch
from sequence_composites import ROWS, SOURCE, STEPS, WIDTHS, alone, composite, examples
from sequence_models import engine_of, tiny
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed


def again(model: Any) -> Any:
    """The model, in which a script has all of an encoder or of towers recomputed in backward."""
    part = getattr(model.model, "encoder", model.model)
    run = part.forward

    @wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    part.forward = forward
    return model


def gradients(name: str, train: Callable[[Any], Any]) -> list[torch.Tensor]:
    """What a step of SGD with rate 0.05 was given."""
    model = again(composite(name))
    before = [p.detach().clone() for p in model.parameters()]
    train(model)
    return [(x - p.detach()) / 0.05 for x, p in zip(before, model.parameters(), strict=True)]


def alone_once(name: str, model: Any) -> None:
    model(**examples(name, 0)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def shared_once(name: str, model: Any) -> None:
    engine = engine_of(model, sequence_parallel_size=2)
    engine.backward(engine(**examples(name, 0)).loss)
    engine.step()
    engine.destroy()


def recomputed() -> list[list[torch.Tensor]]:
    return [gradients(name, partial(shared_once, name)) for name in ("bart", "llava")]


def test_what_is_recomputed_as_a_whole_knows_its_places() -> None:
    expected = [gradients(name, partial(alone_once, name)) for name in ("bart", "llava")]
    for found in run_distributed(recomputed, 2):
        for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


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


AGAIN: dict[str, Any] = (
    {"activation_checkpointing": {"recompute": "all"}}
    if find_spec("drivetrain_activation_checkpointing")
    else {}
)
SHARED: dict[str, Any] = {"sequence_parallel": {"towers": "shared"}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("t5", {}),
    ("bart", {}),
    ("llava", {}),
    ("qwen", {}),
    ("qwen3", {}),
    ("gemma3", SHARED),
    ("t5", AGAIN),
    ("llava", {**AGAIN, "sequence_parallel": {"loss_tile": 5, "chunk": 6, "towers": "shared"}}),
]
RINGS = [(name, {"sequence_parallel": {"ring_size": 2}}) for name in ("bart", "llava", "qwen")]
IMAGES = [
    *(("llava", {**AGAIN, **SHARED}), ("gemma3", {}), ("qwen3", AGAIN)),
    *(
        (name, {"sequence_parallel": {"loss_tile": 5, "chunk": 6, "towers": towers}})
        for name, towers in (("gemma3", "shared"), ("qwen3", "whole"))
    ),
    *((name, {"sequence_parallel": {"ring_size": 2}}) for name in ("qwen3", "gemma3")),
]


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [*CASES, *RINGS]),
        pytest.param(2, IMAGES, marks=pytest.mark.long),
        pytest.param(3, [CASES[0], *CASES[2:6]], marks=pytest.mark.long),
        pytest.param(4, [CASES[0], *RINGS[1:]], marks=pytest.mark.long),
    ],
    ids=["2", "images", "3", "4"],
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


def patches_of_a_rank() -> list[int]:
    """How many patches go through a layer of a tower at a time, of 4 and a token for all."""
    model, seen = composite("llava"), list[int]()
    engine = engine_of(model, sequence_parallel_size=2, **SHARED)
    tower = model.model.vision_tower
    tower.encoder.layers[1].mlp.register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    engine.backward(engine(**examples("llava", 0)).loss)
    first, seen[:] = seen[:], []
    with torch.no_grad():
        tower(pixel_values=examples("llava", 0)["pixel_values"])  # a script's own call
    engine.destroy()
    with torch.no_grad():
        tower(pixel_values=examples("llava", 0)["pixel_values"])
    return [*first, *seen]


def test_ranks_compute_their_part_of_a_tower() -> None:
    for found in run_distributed(patches_of_a_rank, 2):
        # Whole and in parts for the comparison; then the step, a script's call, and no engine.
        assert found == [5, 3, 3, 5, 5]


def with_own_mask() -> Any:
    """A model that makes the mask of its language model, as some do for images."""
    model = composite("qwen")

    def masked(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["inputs_embeds"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": {"full_attention": mask}}

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


def finding(name: str) -> Any:
    """A model that finds where an answer begins and ends in a text."""
    import transformers

    widths = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    bart = {**widths, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config: dict[str, Any] = {
        "Bert": {**WIDTHS, "num_hidden_layers": 1},
        "Bart": {**bart, "decoder_ffn_dim": 16},
        "Llama": {**WIDTHS, "num_hidden_layers": 1},
    }[name]
    made = getattr(transformers, f"{name}Config")(vocab_size=40, **config)
    return getattr(transformers, f"{name}ForQuestionAnswering")(made)


def refused() -> list[str]:
    """What is said of models and batches that cannot be shared out."""
    source = torch.ones(ROWS, SOURCE, dtype=torch.int64)
    found = []
    places = torch.tensor([3, 15])
    found_at = {"input_ids": source, "start_positions": places, "end_positions": places + 2}
    engines: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: composite("t5"), {"sequence_parallel": {"ring_size": 2}}),
        (lambda: composite("bart"), {"sequence_parallel": {"chunk": 4}}),
        (lambda: composite("t5"), {"sequence_parallel": {"loss_tile": 4}}),
        (lambda: composite("t5"), {"sequence_parallel": {"inputs": "whole"}}),
        (clip, {}),
        (lambda: tiny("llama"), SHARED),
        (lambda: composite("llava"), {"sequence_parallel": {"towers": "shared", "ring_size": 2}}),
    ]
    batches: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: composite("t5"), {"input_ids": source}),
        (lambda: composite("bart"), {"decoder_input_ids": source}),
        (lambda: composite("bart"), {"input_ids": torch.ones(1, 40).long(), "labels": source}),
        (lambda: composite("t5"), {"encoder_outputs": (source,), "labels": source}),
        (with_own_mask, examples("qwen", 0)),
        (partial(finding, "Bert"), found_at),
        (partial(finding, "Bart"), {**found_at, "decoder_input_ids": source}),
        (partial(finding, "Llama"), found_at),
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
    return found + [
        refused_tower(make) for make in (mixing, unseen, silent, lambda: composite("qwen"))
    ]


class Neighbours(torch.nn.Module):
    """Looks at the patch before without attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class Nothing(torch.nn.Module):
    """Stands where attention would."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def mixing() -> Any:
    model = composite("llava")
    layer = model.model.vision_tower.encoder.layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, Neighbours())
    return model


def unseen() -> Any:
    """A model whose tower returns something of a block's patches, beside what is right."""
    model, kept = composite("llava"), list[Any]()
    tower = model.model.vision_tower

    def pool(module: Any, args: Any, output: Any) -> None:
        output["pooler_output"] = pytree.tree_leaves(kept.pop())[0].mean(1)

    tower.encoder.layers[0].register_forward_hook(lambda *given: kept.append(given[2]))
    tower.register_forward_hook(pool)
    return model


def silent() -> Any:
    model = composite("llava")
    model.model.vision_tower.encoder.layers[1].self_attn = Nothing()
    return model


def refused_tower(make: Callable[[], Any]) -> str:
    """What is said of a tower whose patches ranks cannot share."""
    model = make()
    name = "qwen" if "Qwen" in type(model).__name__ else "llava"
    engine = engine_of(model, sequence_parallel_size=2, **SHARED)
    with pytest.raises((ConfigError, TrainingError)) as error:
        engine(**examples(name, 0))
    engine.destroy()
    return str(error.value)


def test_composite_models_that_cannot_be_shared_are_refused_by_name() -> None:
    expected = [
        "adds a bias to its scores, which is not computed by blocks of keys",
        "keys of another sequence have no chunks: leave out sequence_parallel.chunk",
        "sequence_parallel.loss_tile: T5ForConditionalGeneration has an encoder and a decoder",
        "sequence_parallel.inputs: whole: T5ForConditionalGeneration has an encoder",
        "CLIPModel takes image and text, and has no language model that is given inputs_embeds",
        "LlamaForCausalLM has no towers of images that ranks (sequence_parallel_size) could share",
        "towers are shared by ranks that exchange heads: leave out sequence_parallel.ring_size",
        "has no sequence for the decoder; it has input_ids",
        "a batch without input_ids or inputs_embeds cannot be cut",
        "sequences of 40 tokens (made a multiple of 2 for sequence_parallel_size) are longer than",
        "encoder_outputs are of whole sequences",
        "makes the attention mask of its language model itself, and not as functions of indices",
        *(
            f"start_positions and end_positions: the loss of {name}ForQuestionAnswering is a choice"
            for name in ("Bert", "Bart", "Llama")
        ),
        *["model.vision_tower, a CLIPVisionModel, computes something else when ranks share its"]
        * 2,
        "model.vision_tower.encoder.layers.0, a CLIPEncoderLayer, calls no attention that plugins",
        "model.visual.blocks.0, a Qwen2VLVisionBlock, takes something else than patches [images,",
    ]
    for found in run_distributed(refused, 2):
        for said, begin in zip(found, expected, strict=True):
            assert begin in said, said
