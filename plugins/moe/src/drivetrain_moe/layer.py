"""The layer ``MoE``: a router, experts, and what holds between them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_moe.cache import ExpertCache, FusedCache, ModuleCache
from drivetrain_moe.exchange import HERE, of_all_shares, through_experts, way_of
from drivetrain_moe.experts import ExpertList, GroupedMLP
from drivetrain_moe.load import Load
from drivetrain_moe.routing import Priority, Routed, Routing, Score, jittered, route, router_logits

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes
    from drivetrain_moe.section import MoESection


class MoE(nn.Module):
    """A mixture of experts in place of a feed-forward layer.

    Outside of a job it has all experts and is an ordinary module. In a job, ``ep_size`` ranks
    share them out: tokens travel. The names of parameters stay those of the whole layer.

    Args:
        hidden_size: width d of tokens.
        expert: a module from [n, d] to [n, d], of which each expert is a copy; or a
            :class:`GroupedMLP` with all of them.
        num_experts: E.
        ep_size: ranks that share out the experts; divides their number.
        k: experts of a token.
        capacity_factor: in training, of the even share of an expert.
        eval_capacity_factor: in evaluation.
        min_capacity: tokens that an expert takes at least.
        use_residual: add a dense expert, both weighed by a learnt softmax (PR-MoE, Rajbhandari et
            al. 2022, "DeepSpeed-MoE").
        noisy_gate_policy: ``"Jitter"`` or ``"RSample"``.
        drop_tokens: whether experts take no more than their capacity; otherwise all tokens are
            computed, without padding.
        use_rts: for k = 1, whether it is random which tokens stay; otherwise the first do.
        use_tutel: accepted; there is one implementation.
        enable_expert_tensor_parallelism: only ``False``: an expert is whole on its rank.
        top2_2nd_expert_sampling: Gumbel noise on the second choice in training, for k = 2.
        score: ``"softmax"``, or ``"sigmoid"`` with a correction bias, as in DeepSeek-V3.
        normalise: whether weights of a token add up to 1; by default for k > 1.
        scale: of the weights.
        groups: (groups of experts, groups that a token uses).
        priority: who stays where an expert has too many tokens, for k > 1.
        chooses: ``"expert"``: each expert chooses as many tokens as it has room for.
        shared_expert: a module that computes all tokens, added to the result.
        balance_loss: weight of the balancing loss, which then enters the loss by itself.
        z_loss: weight of the z-loss, likewise.
        bias_update_rate: with sigmoid scores, step of the correction bias towards equal load.

    Raises:
        ConfigError: arguments that do not fit together.
    """

    drivetrain_plugin = "moe"
    bias: torch.Tensor | None
    cache: ExpertCache | None = None
    """Of weights of experts, where these lie in host memory."""
    serves = False
    """Whether the module is that of an engine that does not train."""
    _ranks = 1
    """Over which experts have been shared out, and are still."""

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        score: Score = "softmax",
        normalise: bool | None = None,
        scale: float = 1.0,
        groups: tuple[int, int] = (1, 1),
        priority: Priority | None = None,
        chooses: Literal["token", "expert"] = "token",
        shared_expert: nn.Module | None = None,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        bias_update_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if priority is None and k == 1 and not use_rts:
            priority = "position"
        self.routing = Routing(
            *(num_experts, k, score, normalise, scale, *groups, drop_tokens),
            *(capacity_factor, min_capacity, priority),
            noise=None if noisy_gate_policy in (None, "None") else noisy_gate_policy,  # type: ignore[arg-type]
            second_noise=top2_2nd_expert_sampling,
            chooses=chooses,
        )
        self._check(expert, ep_size, enable_expert_tensor_parallelism, bias_update_rate)
        self.eval_routing = replace(self.routing, capacity_factor=eval_capacity_factor)
        self.drivetrain_wish = ep_size
        self.ep_size, self.num_experts = ep_size, num_experts
        self._build(hidden_size, expert, use_residual)
        self.shared_expert = shared_expert
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.bias_update_rate = bias_update_rate
        self.load: Load | None = None
        self.way = HERE
        self._name = type(self).__name__

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute tokens.

        Args:
            hidden_states: [..., d].
            used_token: [...], 0 for tokens that no expert computes.

        Returns:
            The output [..., d]; the balancing loss, for the script to add to its own, or without a
            graph if ``balance_loss`` adds it already; tokens that chose each expert, [E].

        Raises:
            TrainingError: logits are not finite; names the layer.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.routing if self.training else self.eval_routing
        jitters = self.training and routing.noise == "Jitter"
        logits = router_logits(jittered(x) if jitters else x, self.gate.weight)
        if x.device.type == "cpu" and not bool(torch.isfinite(logits).all()):
            raise TrainingError(f"the router of {self._name} has logits that are not finite")
        options: dict[str, Any] = {"bias": self.bias, "used": used_token}
        if self.way.alike is not None:
            options["together"] = partial(of_all_shares, alike=self.way.alike)
        routed = route(logits, routing, training=self.training, **options)
        out = self._through_experts(x, routed)
        balance = routed.balance
        if self.load is not None and self.training:
            self.load.add(routed.wanted, routed.dropped, balance)
            out = self.load.job.losses.add(out, balance, self.balance_loss)
            out = self.load.job.losses.add(out, routed.z, self.z_loss)
        if self.balance_loss:
            balance = balance.detach()
        return out.reshape(hidden_states.shape), balance, routed.wanted

    def _through_experts(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """The answers of all experts, also of those that compute every token, [S, d]."""
        dense = [one for one in (self.shared_expert, self.residual) if one is not None]
        compute = self.experts if self.cache is None else self.cache.around(self.experts)
        mixed = through_experts(
            *(x, routed, self.num_experts, compute, self.way),
            # Modules are called without tokens as well: where each is gathered by itself (ZeRO's
            # third stage), ranks come to the same ones, whatever their tokens chose.
            answers=() if isinstance(self.experts, ExpertList) else self.experts.parameters(),
            meanwhile=[partial(_one_output, one, x) for one in dense],
        )
        out, beside = mixed.output, iter(mixed.beside)
        shared = next(beside) if self.shared_expert is not None else None
        if self.residual is not None and self.coefficient is not None:
            share = self.coefficient(x).softmax(-1)
            out = out * share[:, :1] + next(beside) * share[:, 1:]
        return out if shared is None else out + shared

    def join(self, job: Job, name: str, axes: ExpertAxes, section: MoESection) -> None:
        """Take part in a job: share out experts, report under ``name``.

        Raises:
            ConfigError: their number does not divide, or a job before has left only some here.
        """
        if self._ranks > 1:
            raise ConfigError(
                f"{name} has only a part of its {self.num_experts} experts, which an engine before "
                f"has shared out over {self._ranks} ranks: build the model again"
            )
        self._name = name
        self.load = Load(job, name, self.num_experts, reports=section.report)
        self.load.follows = self.bias_update_rate > 0
        if axes.size > 1:
            if self.num_experts % axes.size:
                raise ConfigError(
                    f"{name}: {self.num_experts} experts cannot be shared out over "
                    f"ep_size = {axes.size} ranks: {self.num_experts} / {axes.size} leaves "
                    f"{self.num_experts % axes.size}"
                )
            self.way = way_of(job, name, axes, self.experts, halves=section.halves)
            self.experts.keep(job, axes)
            self._ranks = axes.size

    def cached(self, job: Job, room: int) -> ExpertCache:
        """Keep weights of experts in host memory, and ``room`` of them on the device."""
        if isinstance(self.experts, ExpertList):
            self.cache = ModuleCache(job, list(self.experts.values()), room)
        else:
            size = 1 if self.way.experts is None else self.way.experts.size
            self.cache = FusedCache(job, self.experts, self.num_experts // size, room)
        return self.cache

    def leave(self) -> None:
        """Forget the job; weights in host memory are parameters again."""
        if self.cache is not None:
            self.cache.release()
        self.load, self.way, self.cache = None, HERE, None

    def _build(self, hidden_size: int, expert: nn.Module, use_residual: bool) -> None:
        self.gate = nn.Linear(hidden_size, self.num_experts, bias=False)
        grouped = isinstance(expert, GroupedMLP)
        self.experts: Any = expert if grouped else ExpertList(expert, self.num_experts)
        self.residual = copy.deepcopy(expert) if use_residual else None
        self.coefficient = nn.Linear(hidden_size, 2) if use_residual else None
        bias = torch.zeros(self.num_experts) if self.routing.score == "sigmoid" else None
        self.register_buffer("bias", bias)

    def _check(self, expert: nn.Module, ep_size: int, tensor: bool, rate: float) -> None:
        r = self.routing
        count, given = r.experts, expert.count if isinstance(expert, GroupedMLP) else r.experts
        groups = r.groups
        reasons = (
            (not 1 <= r.k <= count, f"k = {r.k} is not from 1 to num_experts = {count}"),
            (given != count, f"the GroupedMLP has {given} experts, num_experts is {count}"),
            (ep_size < 1 or count % ep_size, f"{count} experts do not divide by ep_size {ep_size}"),
            (tensor, "enable_expert_tensor_parallelism is not there: an expert is whole on a rank"),
            (
                r.noise not in (None, "Jitter", "RSample"),
                f"noisy_gate_policy {r.noise!r} is not 'Jitter' or 'RSample'",
            ),
            (count % groups, f"{count} experts do not divide by {groups} groups"),
            (not 1 <= r.groups_used <= groups, f"{r.groups_used} of {groups} groups are used"),
            (
                r.drops and not (r.capacity_factor > 0 and math.isfinite(r.capacity_factor)),
                f"capacity_factor {r.capacity_factor} leaves no room for a token",
            ),
            (r.drops and r.min_capacity < 1, f"min_capacity {r.min_capacity} is below one token"),
            (rate and r.score != "sigmoid", "bias_update_rate is for score='sigmoid'"),
            (
                r.k > (count // groups) * r.groups_used,
                f"k = {r.k} experts are not in {r.groups_used} groups of {count // groups}",
            ),
        )
        for wrong, reason in reasons:
            if wrong:
                raise ConfigError(f"MoE: {reason}")


def _one_output(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an expert returns; some return a bias beside it."""
    output = module(x)
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
