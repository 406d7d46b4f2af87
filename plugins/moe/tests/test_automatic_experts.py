"""Experts of models of Transformers, found by structure and shared out: forward and training."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from drivetrain_moe import find_experts
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

transformers = pytest.importorskip("transformers")

RATE, STEPS, VOCABULARY = 0.5, 2, 64

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FOUR = {"num_local_experts": 4}
NAMED = {"num_experts": 4, "moe_intermediate_size": 12}
DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", FOUR),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt_oss": ("GptOssForCausalLM", {**FOUR, "head_dim": 8, "sliding_window": 16}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**NAMED, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**NAMED, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", FOUR),
    "phimoe": ("PhimoeForCausalLM", FOUR),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": VOCABULARY,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "greedy"}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**DEEPSEEK, "head_dim": 8}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**NAMED, "layer_types": ["full_attention", "conv"], "num_dense_layers": 0},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {**FOUR, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
    ),
}
MODELS |= {
    # Experts that take a block of rows each, and scores on what goes into them.
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **FOUR,
            "head_dim": 8,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 1,
            "moe_layers": [0, 1],
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
        },
    ),
    # Experts in dictionaries of modules.
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "num_experts": 4,
            "expert_capacity": 7,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "dropout_rate": 0.0,
            "router_jitter_noise": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "num_experts": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "moe_token_dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "second_expert_policy": "all",
            "decoder_start_token_id": 0,
        },
    ),
}
OTHERS = (
    "AriaTextForCausalLM",
    "AfmoeForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "FlexOlmoForCausalLM",
    "Cohere2MoeForCausalLM",
    "Dots1ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Qwen3NextForCausalLM",
    "ExaoneMoeForCausalLM",
    "SolarOpenForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "MellumForCausalLM",
    "LagunaForCausalLM",
    "DeepseekV32ForCausalLM",
)
"""Models that are made of what they know of :data:`EVERYTHING`."""
EVERYTHING = {
    **SMALL,
    **FOUR,
    **NAMED,
    **DEEPSEEK,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "head_dim": 8,
    "moe_num_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 12,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 8,
    "ffn_hidden_size": 24,
    "zero_expert_num": 0,
    "decoder_sparse_step": 1,
    "sliding_window": 16,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "num_layers": 2,
    "shared_intermediate_size": 8,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_head_dim": 8,
    "index_topk": 4,
    "rotary_dim": 8,
}
MODELS |= {name: (name, {}) for name in OTHERS}
NOISY = ("phimoe",)
"""Whose routers draw random numbers in training."""

ORDINARY = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "switch_transformers")


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small model with random parameters, among them those that are zeros by default."""
    name, changes = MODELS[family]
    kind = getattr(transformers, name)
    own = changes if family == "dbrx" else {**SMALL, **changes}
    if family in OTHERS:
        own = known_of(kind)
    config = kind.config_class(**own)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    for part in model.modules():  # some routers compute in this dtype, whatever the model's
        if vars(part).get("dtype") is torch.float32:
            part.dtype = dtype
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (noise / parameter.shape[-1] ** 0.5).to(dtype)
    return model


def known_of(kind: Any) -> dict[str, Any]:
    """What of :data:`EVERYTHING` the config of ``kind`` knows, and two layers with experts."""
    plain = kind.config_class()
    known = {**vars(plain), **vars(kind.config_class)}
    own = {key: value for key, value in EVERYTHING.items() if key in known}
    if layers := getattr(plain, "layer_types", None):
        own["layer_types"] = (list(dict.fromkeys(layers)) * 2)[:2]
    if getattr(plain, "mlp_layer_types", None):
        own["mlp_layer_types"] = ["sparse", "sparse"]
    return own


def batch(step: int, shard: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + shard)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    return {"input_ids": ids, "labels": ids}


def reference(family: str, shards: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, losses = build(family), []
    model.train(family not in NOISY)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        loss = torch.stack([model(**batch(step, s)).loss.double() for s in range(shards)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}


def train(families: list[str], ep: int, extra: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for family in families:
        engine, *_ = drivetrain.initialize(
            model=build(family),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": RATE}},
                "expert_parallel": {"enabled": True, "autoep_size": ep},
                **extra,
            },
        )
        engine.train(family not in NOISY)
        shard, losses = engine.job.mesh.coordinate("dp"), []
        for step in range(STEPS):
            loss = engine(**batch(step, shard)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        small = [p.shape[0] for n, p in engine.module.named_parameters() if ".experts.down" in n]
        with drivetrain.whole(engine.module):
            state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        found[family] = losses, state, small
        engine.destroy()
    return found


def claim(families: list[str], world: int, ep: int) -> None:
    ranks = run_distributed(train, world, families, ep, {})
    for family in families:
        losses, state = reference(family, world)
        assert set().union(*(found[family][1] for found in ranks)) == set(state)
        for losses_here, whole, small in (found[family] for found in ranks):
            assert len(losses_here) == STEPS
            assert all(count == 4 // ep for count in small)
            for name, value in whole.items():
                torch.testing.assert_close(
                    value, state[name], rtol=1e-4, atol=1e-6, msg=f"{family} {name}"
                )
        mean = sum(found[family][0][0] for found in ranks) / world
        assert mean == pytest.approx(losses[0], rel=1e-6)


def test_models_train_as_they_do_alone() -> None:
    claim(list(ORDINARY), 2, 2)


@pytest.mark.long
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4), (4, 2)])
def test_all_models_train_as_they_do_alone(world: int, ep: int) -> None:
    claim(list(MODELS), world, ep)


def test_experts_are_found_in_every_model() -> None:
    for family in ORDINARY:
        found = find_experts(build(family))
        assert found
        assert {experts.count for experts in found} == {4}


def test_a_model_with_all_its_experts_is_as_it_was_after_the_job() -> None:
    model = build("mixtral")
    config = {"train_batch_size": 2, "expert_parallel": {"enabled": True}}
    for _ in range(2):
        engine = drivetrain.initialize(model=model, config=config)[0]
        assert engine(**batch(0, 0)).loss > 0
        engine.destroy()
    assert not any("forward" in vars(part) for part in model.modules())


# -- lists of modules ------------------------------------------------------------------------------


class Listed(nn.Module):
    """A layer as models had it before Transformers 5: a loop over a list, which skips experts."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.drawn: list[torch.Tensor] = []
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        logits = self.router(flat)
        self.drawn.append(torch.rand_like(logits))
        weight, index = logits.softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number in range(len(self.experts)):
            token, place = torch.where(index == number)
            if len(token):
                rows = self.experts[number](flat[None, token].reshape(-1, flat.shape[-1]))
                out.index_add_(0, token, rows * weight[token, place, None])
        return out.reshape(x.shape), logits


class TwoLayers(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Listed(experts) for _ in range(2))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x.square().sum() / 24


def rows_of(shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shard)
    count = (6, 0, 1, 3)[shard]  # experts that no token of a rank has chosen, and no tokens at all
    return torch.randn(1, count, 8, generator=generator, dtype=torch.float64)


def train_listed(zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine, *_ = drivetrain.initialize(
        model=TwoLayers(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "expert_parallel": {"enabled": True, "autoep_size": 2},
            **zero,
        },
    )
    for _ in range(STEPS):
        engine.backward(engine(rows_of(engine.job.rank)))
        engine.step()
    drawn = [layer.drawn[:2] for layer in engine.module.layers]
    assert all(torch.equal(first, second) for first, second in drawn)
    assert engine.job.rank or not torch.equal(drawn[0][0], drawn[1][0])
    assert len(engine.module.layers[0].experts) == 2
    with drivetrain.whole(engine.module):
        found = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return found


def test_experts_in_a_list_train_as_they_do_alone() -> None:
    model = TwoLayers()
    assert [experts.name for experts in find_experts(model)] == [
        "layers.0.experts",
        "layers.1.experts",
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.stack([model(rows_of(shard)) for shard in range(2)]).mean().backward()
        optimizer.step()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    shards = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    for zero in ({}, shards) if find_spec("drivetrain_zero") else ({},):
        ranks = run_distributed(train_listed, 2, zero)
        seen = set()
        for found in ranks:
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=name)
            seen |= set(found)
        assert seen == set(expected)


# -- bad input -------------------------------------------------------------------------------------


def refused(model: nn.Module, **section: Any) -> str:
    config = {"train_batch_size": 2, "expert_parallel": {"enabled": True, **section}}
    plan = drivetrain.Plan.build(config)
    with drivetrain.Job.open(plan) as job, pytest.raises(ConfigError) as caught:
        job.engine(model)
    return str(caught.value)


def test_a_model_without_experts_says_what_was_looked_for() -> None:
    assert "no module that looks like the experts of a layer" in refused(nn.Linear(2, 2))


def test_a_pattern_that_names_something_else_says_what_it_is() -> None:
    text = refused(build("mixtral"), expert_pattern=r".*layers\.0\.mlp\.gate")
    assert "has no attribute of a number of experts" in text or "has a forward of" in text


def test_experts_of_different_shapes_are_named() -> None:
    model = TwoLayers()
    model.layers[1].experts[2] = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).double()
    text = refused(model)
    assert "layers.1.experts has experts of different shapes" in text
    assert "2 has {'0.weight': (6, 8)" in text


def test_a_list_without_a_router_says_what_was_found() -> None:
    model = TwoLayers()
    for layer in model.layers:
        layer.router = nn.Identity()
    text = refused(model)
    assert "layers.0.experts is a list of 4 modules without a router beside it" in text
    assert "expert_pattern" in text


def test_weights_that_are_not_finite_name_the_layer() -> None:
    model = build("mixtral")
    config = {"train_batch_size": 2, "expert_parallel": {"enabled": True}}
    engine = drivetrain.initialize(model=model, config=config)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"beside model.layers.1.mlp.experts gives weights"):
        engine(**batch(0, 0))
    engine.destroy()


def three_experts() -> None:
    model = build("mixtral")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": 3},
    }
    with pytest.raises(ConfigError, match=r"4 experts of .* cannot be shared out over 3 ranks"):
        drivetrain.initialize(model=model, config=config)


def test_experts_that_do_not_divide_are_refused() -> None:
    run_distributed(three_experts, 3)


def test_sections_are_checked() -> None:
    for section, message in (
        ({"load_balance_coeff": 0.1}, "load_balance_coeff must be null"),
        ({"autoep_sise": 2}, "did you mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            drivetrain.Plan.build({"expert_parallel": {"enabled": True, **section}})
    with pytest.raises(ConfigError, match="ep 3 does not nest in"):
        drivetrain.Plan.build(
            {"train_batch_size": 4, "expert_parallel": {"enabled": True, "autoep_size": 3}},
            world_size=4,
        )
