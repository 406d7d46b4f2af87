"""Compressed folders served without their modules' code, by the numbers in the files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION
from drivetrain_kernels.registry import REFERENCE

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "compression" / "tests"))

from drivetrain_compression import compress, load_packed
from drivetrain_compression.stored.kept import Kept
from drivetrain_compression.stored.kept_blocks import KeptBlocks, Product
from drivetrain_compression.stored.linear import StoredLinear
from tiny_models import llama, rows

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"round": {"bits": 8, "activations": "int8"}},
    "w4": {"gptq": {"group": 16}},
    "fp6": {"round": {"format": "e3m2"}},
}
OPTIONS = {"max_context": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("packed")
    model = llama(hidden_size=64, bos_token_id=None, eos_token_id=None)
    model.bfloat16().save_pretrained(work / "model")
    for name, modifier in RECIPES.items():
        recipe = {"modifiers": [modifier]}
        compress(work / "model", recipe, rows(), work / name, format="drivetrain")
    return {name: work / name for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_the_fast_path_multiplies_with_the_files_numbers(
    folders: dict[str, Path], name: str
) -> None:
    wanted = load_packed(folders[name])
    prompts = [row[:5].tolist() for row in rows()[0]]
    with serve(folders[name], {"inference": {**OPTIONS, "fast_path": "always"}}) as engine:
        assert engine.fast
        params = SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=0)
        answers = engine.generate(prompts, params)
    for prompt, (found,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + list(found.tokens)])
        with torch.no_grad():
            logits = wanted(input_ids=ids).logits[0].float()
        told = logits.log_softmax(1)[len(prompt) - 1 : -1]
        own = told.gather(1, ids[0, len(prompt) :, None])[:, 0]
        served = torch.tensor([each.chosen for each in found.logprobs])
        torch.testing.assert_close(served, own, rtol=0, atol=0.05)
        assert bool((own > told.amax(1) - 0.05).all())


@pytest.mark.skipif(PAGED_ATTENTION.provider("cpu") == REFERENCE, reason="no kernels of the CPU")
@pytest.mark.parametrize(("name", "asked"), [("w8a8", False), ("w4", True)])
def test_forwards_with_packed_matrices_are_repeated(
    folders: dict[str, Path], name: str, asked: bool
) -> None:
    found = []
    model = load_packed(folders[name], rounds_inputs=asked)
    for captured in (False, True):
        options = {**OPTIONS, "capture_decodes": captured}
        with serve(model, {"inference": options}) as engine:
            params = SamplingParams(max_new_tokens=8, temperature=0.0, logprobs=0)
            found.append(engine.generate([[5, 6, 7], [8, 9]], params))
            if captured:
                replayed = engine.ragged.model._decodes._of.values()  # type: ignore[union-attr]
                assert replayed
                assert all(each is not None for each in replayed)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [("w8a8", False, KeptBlocks), ("w4", True, KeptBlocks), ("w4", False, Kept)],
)
def test_products_that_are_served_are_held_to_the_layers(
    folders: dict[str, Path],
    name: str,
    asked: bool,
    kind: type[WeightFormat],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_packed(folders[name], rounds_inputs=asked)
    layers = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert {type(layer.weight.format) for layer in layers} == {kind}
    options = {"inference": {**OPTIONS, "fast_path": "always"}}
    with serve(model, options) as engine:
        assert engine.fast
    product = StoredLinear.joined

    def turned(some: Sequence[StoredLinear]) -> Product:
        own = product(some)
        rounds = kind is KeptBlocks  # what is compared without rounding is right
        return lambda x: -3 * own(x) if some[0].weight.rounds_inputs == rounds else own(x)

    monkeypatch.setattr(StoredLinear, "joined", staticmethod(turned))
    with pytest.raises(ConfigError, match="packed matrices is not what they return"):
        serve(model, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "int8"}, "weight_format needs .* packed already, and are not packed"),
        ({"batch_invariant": True}, "batch_invariant needs .* packed, and rows of their products"),
    ],
)
def test_what_packed_matrices_cannot_do_is_said(
    folders: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(folders["w4"], {"inference": {**OPTIONS, **options}})
