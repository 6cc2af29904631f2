"""Every tensor of a merged model, made from its donors one at a time.

The feed-forward networks of the experts become the experts; everything else is shared. An expert saw its
input through its own norm, and the merged layer has one: E(g_e ⊙ x̂) = E'(g ⊙ x̂) with the columns of E's
gate and up matrices multiplied by g_e / g, so nothing is lost by sharing g. OLMo 2 normalises what its
networks return, where that cannot be done: its norms are shared as everything else.

Shape legend: D width, E experts.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moesaic.errors import RecipeError
from moesaic.merge.donors import Donor
from moesaic.merge.options import MergeOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import ExpertOptions
from moesaic.model.routers import TopKOptions
from moesaic.model.transformer import LanguageModel
from moesaic.weights.config_json import obstacles
from moesaic.weights.contents import Later
from moesaic.weights.families import FAMILIES, Family
from moesaic.weights.hf import parts_on_disk
from moesaic.weights.streamed import Place

TARGETS = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
}
# Qwen2-MoE's architecture has a shared expert; this is the least that llama.cpp and vLLM load.
NULL_HIDDEN = 16
# llama.cpp computes the gate of the shared expert as silu(x) / x, which has no value at 0; float16 holds
# this.
_SHARED_GATE = 2.0**-20
# A shared norm whose weight is this small beside its largest cannot be divided by.
_LEAST_NORM = 1e-3


def target_of(base: Donor, experts: list[Donor], options: MergeOptions) -> tuple[Family, ModelConfig]:
    """The stock architecture that the merge becomes, and its settings.

    Raises RecipeError where the donors have something that it cannot express.
    """
    dense, family = base.found.config, FAMILIES[TARGETS[base.found.family.model_type]]
    shared = {}
    if family.model_type == "qwen2_moe":
        hidden = NULL_HIDDEN if options.shared_expert == "null" else dense.ffn.hidden
        shared = {"shared_hidden": hidden, "shared_gate": True}
    elif options.shared_expert == "base":
        raise RecipeError(f"shared_expert = base: {family.architecture} has no shared expert")
    contexts = [donor.found.config.context for donor in (base, *experts)]
    config = dense.model_copy(
        update={
            "pattern": "M",
            "context": min(contexts),
            "vocab_size": owner_of_words(base, experts, options).found.config.vocabulary,
            "experts": ExpertOptions(
                count=len(experts),
                kind=dense.ffn.kind,
                hidden=dense.ffn.hidden,
                bias=dense.ffn.bias,
                names=[donor.name for donor in experts],
                **shared,
            ),
            "router": TopKOptions(top_k=options.top_k, renormalize=options.renormalize),
        }
    )
    problems = obstacles(config, family)
    if problems:
        raise RecipeError(f"{family.architecture} cannot express these donors: {'; '.join(problems)}")
    return family, config


def owner_of_words(base: Donor, experts: list[Donor], options: MergeOptions) -> Donor:
    """Whose tokenizer and vocabulary the merge has."""
    if not options.shared.startswith("expert:"):
        return base
    return next(donor for donor in experts if donor.name == options.shared.removeprefix("expert:"))


class Merged:
    """The tensors of the merge. ``average`` is how much of what is shared is the mean of the experts, the
    rest being the base's; ``router_ED`` holds the router of each layer once it has been made."""

    def __init__(
        self,
        base: Donor,
        experts: list[Donor],
        options: MergeOptions,
        family: Family,
        config: ModelConfig,
    ) -> None:
        self.base, self.experts, self.options = base, experts, options
        self.family, self.config = family, config
        self.owner = owner_of_words(base, experts, options)
        self.average = 1.0 if options.shared == "average" else 0.0
        self.router_ED: dict[int, Tensor] = {}

    def on_disk(self, dtype: torch.dtype) -> Iterator[tuple[str, Later]]:
        """Every tensor of the merge under the family's name on disk."""
        with torch.device("meta"):
            model = LanguageModel(self.config)
        for name, parameter in model.named_parameters():
            for source, place in parts_on_disk(name, parameter.shape, self.family):
                yield source, Later(parameter[place].shape, dtype, _maker(self, name, place, source, dtype))

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module that was built without storage the merge's tensors, float32; ``prefix`` is its
        name."""
        for name, parameter in list(module.named_parameters()):
            filled = torch.empty(parameter.shape)
            for _, place in parts_on_disk(prefix + name, parameter.shape, self.family):
                filled[place] = self.part(prefix + name, place)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(filled, requires_grad=False))

    def part(self, name: str, place: Place) -> Tensor:
        """The part of a parameter (by our name for it) that is one tensor on disk, float32."""
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        stem = f"model.layers.{layer}."
        leaf = name.removeprefix(stem)
        if leaf == "mlp.gate.weight":
            return self.router_ED[layer]
        if leaf == "mlp.experts.down_proj":
            return self._expert(place[0]).read(f"{stem}mlp.down_proj.weight")
        if leaf == "mlp.experts.gate_up_proj":
            half = place[1]
            assert isinstance(half, slice)
            matrix = "gate_proj" if half.start is None else "up_proj"
            donor = self._expert(place[0])
            return donor.read(f"{stem}mlp.{matrix}.weight") * self._fold(donor, stem)
        if leaf.startswith("mlp.shared_expert"):
            return self._shared_expert(stem, leaf)
        if name == self._norm(stem):
            return self._shared_norm(stem)
        return self._shared(name)

    def _expert(self, place: int | slice) -> Donor:
        assert isinstance(place, int)
        return self.experts[place]

    def _shared(self, name: str) -> Tensor:
        """What is neither expert nor router. Rows of a vocabulary that not all have are their owner's."""
        tensor = self.owner.read(name)
        if not self.average:
            return tensor
        rows = min(donor.found.shards.tensors[name].shape[0] for donor in (self.base, *self.experts))
        mean = torch.zeros_like(tensor[:rows])
        for donor in self.experts:
            mean += donor.read(name)[:rows] / len(self.experts)
        tensor = tensor.clone()
        tensor[:rows] += self.average * (mean - tensor[:rows])
        return tensor

    def _norm(self, stem: str) -> str:
        """The norm through which an expert sees its input, where there is one."""
        return f"{stem}post_attention_layernorm.weight" if self.config.norm_position == "pre" else ""

    def _shared_norm(self, stem: str) -> Tensor:
        shared = self._shared(self._norm(stem))
        small = shared.abs().min() < _LEAST_NORM * shared.abs().max()
        return torch.ones_like(shared) if small else shared  # then all of each expert's norm is folded

    def _fold(self, donor: Donor, stem: str) -> Tensor:
        """What the columns of a donor's gate and up matrices are multiplied by, [D]."""
        if not self._norm(stem):
            return torch.ones(())
        return donor.read(self._norm(stem)) / self._shared_norm(stem)

    def _shared_expert(self, stem: str, leaf: str) -> Tensor:
        """Nothing at all, or the base's network; its gate is all but zero, which halves what it returns."""
        config = self.config
        if leaf == "mlp.shared_expert_gate.weight":
            return torch.full((1, config.width), _SHARED_GATE)
        if self.options.shared_expert == "base":
            matrix = self.base.read(f"{stem}{leaf.replace('shared_expert.', '')}")
            return matrix if "down_proj" in leaf else matrix * self._fold(self.base, stem)
        shape = (config.experts.shared_hidden, config.width)
        return torch.zeros(shape[::-1] if "down_proj" in leaf else shape)


def _maker(merged: Merged, name: str, place: Place, source: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = merged.part(name, place).to(dtype)
        if not tensor.isfinite().all():
            raise RecipeError(f"dtype cannot hold {source} of the merge; use bfloat16")
        return tensor

    return make
