"""Routers: which experts a token goes to, and with what weight.

Every router is one frozen options class, one small module and one line in ``ROUTERS`` at the end.
Recipes, the command line, the tests and the docs read that dict, so adding a router touches this
file alone (docs/extending.md walks through it). All router arithmetic is float32, whatever the
precision of the rest: a bf16 softmax over 64 experts cannot tell close experts apart.

Shape legend: T tokens (batch and positions flattened), D width, E experts, K choices per token.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moesaic.config import Options
from moesaic.routing import Routing


class BaseRouterOptions(Options):
    """What every router knows: ``top_k`` experts per token (exactly, on average or at most)."""

    kind: str
    top_k: int = Field(2, ge=1)
    bias: bool = False

    def parameters(self, width: int, num_experts: int) -> int:
        """Number of trainable parameters of one such router."""
        return num_experts * width + (num_experts if self.bias else 0)

    def multiply_adds(self, width: int, num_experts: int) -> int:
        """Multiply-adds of one token's scores."""
        return num_experts * width

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether the weights of a token's experts always do; with one expert, its weight is then
        the constant 1, and the language-model loss has no gradient for the router."""
        return False


class TokenChoiceOptions(BaseRouterOptions):
    """Routers where tokens choose; each expert may be limited to a capacity.

    With a capacity factor c an expert carries out at most floor(c·T·top_k/E) choices of one call and drops
    the later ones, in arrival order. Evaluation and generation drop nothing unless ``eval_capacity_factor``
    says so: a text's probability would depend on what else shares its batch, and decoding on its cache.
    """

    capacity_factor: float | None = Field(None, gt=0)
    eval_capacity_factor: float | None = Field(None, gt=0)


class Router(nn.Module):
    """Base of all routers: a linear layer from a token to one logit per expert, in float32.

    A router whose state ``follows_load`` is told the load after each optimizer step.
    """

    follows_load = False

    def __init__(self, options: Any, width: int, num_experts: int) -> None:
        super().__init__()
        self.options = options
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.empty(num_experts)) if options.bias else None

    def forward(self, x_TD: Tensor, real_T: Tensor | None = None) -> Routing:
        """Route the tokens ``x_TD`` (any float dtype); ``real_T`` is False at padding."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.route(x_TD.float(), real_T)

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        raise NotImplementedError(f"{type(self).__name__} does not say how it routes")

    def linear(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight.float(), None if self.bias is None else self.bias.float())

    def after_step(self, counts_E: Tensor) -> None:
        """Called once after each optimizer step with the choices each expert was asked for."""

    def choose(
        self,
        weight_TK: Tensor,
        expert_TK: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        real_T: Tensor | None,
        wanted_TK: Tensor | None = None,
    ) -> Routing:
        """Assemble the routing of a token-choice router, padding and capacity applied."""
        wanted_TK = torch.ones_like(expert_TK, dtype=torch.bool) if wanted_TK is None else wanted_TK
        if real_T is not None:
            wanted_TK = wanted_TK & real_T[:, None]
        keep_TK = wanted_TK
        options = self.options
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        if factor is not None:
            tokens = len(expert_TK) if real_T is None else int(real_T.sum())
            capacity = int(factor * tokens * options.top_k / self.num_experts)
            if not self.training:  # a single token, as in cached decoding, is never dropped
                capacity = max(1, capacity)
            keep_TK = within_capacity(expert_TK, wanted_TK, self.num_experts, capacity)
        return Routing(weight_TK, expert_TK, keep_TK, logits_TE, probs_TE, wanted_TK, real_T)


def within_capacity(expert_TK: Tensor, wanted_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Keep each expert's first ``capacity`` wanted choices, in arrival order; bool [T, K]."""
    # Unwanted choices go to an extra expert E, so they take nobody's place.
    expert_N = torch.where(wanted_TK, expert_TK, num_experts).flatten()
    order_N = expert_N.argsort(stable=True)
    first_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
    first_E[1:] = torch.bincount(expert_N, minlength=num_experts + 1).cumsum(0)[:-1]
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_E[expert_N[order_N]]
    return wanted_TK & (rank_N < capacity).view_as(wanted_TK)


class TopKOptions(TokenChoiceOptions):
    """Top-k of a softmax or sigmoid.

    OLMoE: softmax, not renormalised. Mixtral: softmax, renormalised. ``softmax_after`` takes the
    softmax over the k chosen logits only, which is the renormalised softmax written another way.
    """

    kind: Literal["top_k"] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    softmax_after: bool = False
    renormalize: bool = False

    @property
    def weights_sum_to_one(self) -> bool:
        return self.renormalize or self.softmax_after

    @model_validator(mode="after")
    def _one_softmax(self) -> "TopKOptions":
        if self.softmax_after and self.score != "softmax":
            raise ValueError("softmax_after = true needs score = 'softmax'")
        return self


class TopK(Router):
    """The k experts of highest score (Shazeer et al. 2017, arXiv 1701.06538; OLMoE 2409.02060 eq. 1)."""

    options: TopKOptions

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        logits_TE = self.linear(x_TD)
        probs_TE = logits_TE.sigmoid() if self.options.score == "sigmoid" else logits_TE.softmax(-1)
        if self.options.softmax_after:
            chosen_TK, expert_TK = logits_TE.topk(self.options.top_k, dim=-1)
            weight_TK = chosen_TK.softmax(-1)
        else:
            weight_TK, expert_TK = probs_TE.topk(self.options.top_k, dim=-1)
            if self.options.renormalize:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return self.choose(weight_TK, expert_TK, logits_TE, probs_TE, real_T)


class NoisyTopKOptions(TokenChoiceOptions):
    """makeMoE's router: learned noise while training, softmax over the chosen logits."""

    kind: Literal["noisy_top_k"] = "noisy_top_k"

    def parameters(self, width: int, num_experts: int) -> int:
        return 2 * super().parameters(width, num_experts)

    def multiply_adds(self, width: int, num_experts: int) -> int:
        return 2 * super().multiply_adds(width, num_experts)

    @property
    def weights_sum_to_one(self) -> bool:
        return True


class NoisyTopK(Router):
    """Top-k of logits + normal noise · softplus(noise logits) (Shazeer et al. 2017, eq. 3–5).

    Without noise outside training, so that an evaluation or an answer can be repeated.
    """

    options: NoisyTopKOptions

    def __init__(self, options: NoisyTopKOptions, width: int, num_experts: int) -> None:
        super().__init__(options, width, num_experts)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, width))
        self.noise_bias = nn.Parameter(torch.empty(num_experts)) if options.bias else None

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        logits_TE = self.linear(x_TD)
        noisy_TE = logits_TE
        if self.training:
            noise_bias = None if self.noise_bias is None else self.noise_bias.float()
            spread_TE = F.softplus(F.linear(x_TD, self.noise_weight.float(), noise_bias))
            noisy_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        chosen_TK, expert_TK = noisy_TE.topk(self.options.top_k, dim=-1)
        return self.choose(chosen_TK.softmax(-1), expert_TK, logits_TE, noisy_TE.softmax(-1), real_T)


class ExpertChoiceOptions(BaseRouterOptions):
    """Experts choose tokens while training; ``top_k`` is the mean number of experts per token."""

    kind: Literal["expert_choice"] = "expert_choice"


class ExpertChoice(Router):
    """Each expert takes its T·top_k/E best tokens (Zhou et al. 2022, arXiv 2202.09368, section 3.2).

    Perfectly balanced, but whether a token is taken depends on later tokens, so the training loss is not a
    likelihood. Outside training each token takes its top_k experts by the same scores: causal, and honest.
    """

    options: ExpertChoiceOptions

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        logits_TE = self.linear(x_TD)
        probs_TE = logits_TE.softmax(-1)
        if not self.training:
            weight_TK, expert_TK = probs_TE.topk(self.options.top_k, dim=-1)
            keep_TK = torch.ones_like(expert_TK, dtype=torch.bool)
            keep_TK = keep_TK if real_T is None else keep_TK & real_T[:, None]
            return Routing(weight_TK, expert_TK, keep_TK, logits_TE, probs_TE, keep_TK, real_T)
        tokens = len(x_TD) if real_T is None else int(real_T.sum())
        each = min(max(1, tokens * self.options.top_k // self.num_experts), tokens)
        rank_TE = probs_TE if real_T is None else probs_TE.masked_fill(~real_T[:, None], -1.0)
        keep_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        keep_TE.scatter_(0, rank_TE.topk(each, dim=0).indices, True)
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(probs_TE)
        return Routing(probs_TE, expert_TE, keep_TE, logits_TE, probs_TE, keep_TE, real_T)


class LossFreeOptions(TokenChoiceOptions):
    """Balance without a loss: a bias steers the choice and is moved against the load."""

    kind: Literal["loss_free"] = "loss_free"
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    renormalize: bool = True
    update_rate: float = Field(0.001, ge=0)

    @property
    def weights_sum_to_one(self) -> bool:
        return self.renormalize


class LossFree(Router):
    """Top-k of score + bias, weighted by the score alone (Wang et al. 2024, arXiv 2408.15664,
    algorithm 1; DeepSeek-V3, arXiv 2412.19437, eq. 16). The bias has no gradient.
    """

    options: LossFreeOptions
    follows_load = True
    e_score_correction_bias: Tensor

    def __init__(self, options: LossFreeOptions, width: int, num_experts: int) -> None:
        super().__init__(options, width, num_experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        logits_TE = self.linear(x_TD)
        probs_TE = logits_TE.sigmoid() if self.options.score == "sigmoid" else logits_TE.softmax(-1)
        expert_TK = (probs_TE + self.e_score_correction_bias).topk(self.options.top_k, dim=-1).indices
        weight_TK = probs_TE.gather(1, expert_TK)
        if self.options.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return self.choose(weight_TK, expert_TK, logits_TE, probs_TE, real_T)

    @torch.no_grad()
    def after_step(self, counts_E: Tensor) -> None:
        load_E = counts_E.float()
        self.e_score_correction_bias += self.options.update_rate * torch.sign(load_E.mean() - load_E)


class SmartOptions(TokenChoiceOptions):
    """ARCHE3's router: between ``min_k`` and ``top_k`` experts, as many as reach ``mass``.

    With ``keys = "product"`` an expert's logit is the sum of two, of a key of the first half of the token and
    of one of the second: 128 keys stand for 4,096 experts and cost 1.6 % of scoring them all. ``budget``:
    while training, the tokens of one call share so many experts, drawn by the probability that they have from
    all tokens together, so that what is moved from disk is bounded and every expert has its turn; evaluation
    and generation know no budget. Its entropy bonus is the recipe key ``loss.entropy``, open to every router.
    """

    kind: Literal["smart"] = "smart"
    top_k: int = Field(4, ge=1)
    min_k: int = Field(2, ge=1)
    mass: float = Field(0.7, gt=0, le=1)
    jitter: float = Field(0.01, ge=0, lt=1)
    keys: Literal["full", "product"] = "full"
    budget: int | None = Field(None, ge=1)

    @property
    def weights_sum_to_one(self) -> bool:
        return True

    @model_validator(mode="after")
    def _ordered(self) -> "SmartOptions":
        if self.min_k > self.top_k:
            raise ValueError(f"min_k = {self.min_k} is above top_k = {self.top_k}")
        if self.budget is not None and self.budget < self.top_k:
            raise ValueError(f"budget = {self.budget} is below top_k = {self.top_k}")
        if self.keys == "product" and self.bias:
            raise ValueError("keys = 'product' has no bias; set it to false")
        return self

    def parameters(self, width: int, num_experts: int) -> int:
        if self.keys == "product":
            return sum(product_keys(num_experts)) * (width // 2) + 1
        return super().parameters(width, num_experts) + 1

    def multiply_adds(self, width: int, num_experts: int) -> int:
        if self.keys == "product":
            return sum(product_keys(num_experts)) * (width // 2)
        return super().multiply_adds(width, num_experts)


def product_keys(num_experts: int) -> tuple[int, int]:
    """How many keys of each half stand for so many experts: two factors as near to each other as can be."""
    first = next(n for n in range(math.isqrt(num_experts), 0, -1) if num_experts % n == 0)
    return first, num_experts // first


class Smart(Router):
    """A dynamic number of experts by probability mass (as in Huang et al. 2024, arXiv 2403.07652),
    with multiplicative input jitter while training (Switch, arXiv 2101.03961) and a learned
    temperature exp(``log_temperature``). Product keys are those of He 2024 (PEER, arXiv 2407.04153) and
    Lample et al. 2019, all sums of which are made here: the balance loss reads them."""

    options: SmartOptions

    def __init__(self, options: SmartOptions, width: int, num_experts: int) -> None:
        super().__init__(options, width, num_experts)
        if options.keys == "product":
            self.weight = nn.Parameter(torch.empty(sum(product_keys(num_experts)), width // 2))
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def route(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        jitter = self.options.jitter
        if self.training and jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        logits_TE = self._logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        if self.training and self.options.budget is not None and self.options.budget < self.num_experts:
            drawn_B = self._drawn(probs_TE.detach(), real_T)
            shown_TB = logits_TE[:, drawn_B]
            best_TK = shown_TB.topk(self.options.top_k, dim=-1).indices  # by logits: many probabilities are 0
            prob_TK, expert_TK = shown_TB.softmax(-1).gather(1, best_TK), drawn_B[best_TK]
        else:
            prob_TK, expert_TK = probs_TE.topk(self.options.top_k, dim=-1)
        before_TK = prob_TK.detach().cumsum(-1) - prob_TK.detach()
        wanted_TK = before_TK < self.options.mass
        wanted_TK[:, : self.options.min_k] = True
        weight_TK = prob_TK * wanted_TK
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return self.choose(weight_TK, expert_TK, logits_TE, probs_TE, real_T, wanted_TK)

    def _logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]; of product keys the sums of both halves': expert i · n2 + j has keys i and j."""
        temperature = self.log_temperature.float().exp()
        if self.options.keys == "full":
            return self.linear(x_TD) / temperature
        first, _ = product_keys(self.num_experts)
        half = self.weight.shape[1]
        one_TI = F.linear(x_TD[:, :half], self.weight[:first].float()) / temperature
        two_TJ = F.linear(x_TD[:, half : 2 * half], self.weight[first:].float()) / temperature
        return (one_TI[:, :, None] + two_TJ[:, None, :]).flatten(1)

    def _drawn(self, probs_TE: Tensor, real_T: Tensor | None) -> Tensor:
        """Which experts a call may use: the numbers of ``budget`` (B), without replacement, by their share of
        all probability (Gumbel top-k, Kool et al. 2019, arXiv 1903.06059). The most likely ones alone would
        stay so for ever, and the others never be seen."""
        mass_E = (probs_TE if real_T is None else probs_TE[real_T]).sum(0)
        gumbel_E = -torch.empty_like(mass_E).exponential_().log()
        return (mass_E.clamp_min(1e-20).log() + gumbel_E).topk(int(self.options.budget or 0)).indices


ROUTERS: dict[str, tuple[type[BaseRouterOptions], type[Router]]] = {
    "top_k": (TopKOptions, TopK),
    "noisy_top_k": (NoisyTopKOptions, NoisyTopK),
    "expert_choice": (ExpertChoiceOptions, ExpertChoice),
    "loss_free": (LossFreeOptions, LossFree),
    "smart": (SmartOptions, Smart),
}

if TYPE_CHECKING:
    RouterOptions = BaseRouterOptions
else:
    RouterOptions = Annotated[
        Union[tuple(options for options, _ in ROUTERS.values())],  # noqa: UP007
        Field(discriminator="kind"),
    ]


def build_router(options: BaseRouterOptions, width: int, num_experts: int) -> Router:
    """The router module that ``options`` describes."""
    return ROUTERS[options.kind][1](options, width, num_experts)
