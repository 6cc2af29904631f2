"""The sparse optimizer against PyTorch's AdamW on every expert at every step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.model.config import ModelConfig
from moesaic.model.transformer import LanguageModel
from moesaic.offload.catch_up import AdamW, History
from moesaic.offload.optimizer import SparseExpertAdamW

STEPS, HIT = 400, 0.12


def rate_of(step: int) -> float:
    """Warm-up over 40 steps, then a cosine to nothing."""
    return 3e-4 * min(1.0, step / 40) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def both(
    steps: int, hit: float, mode: str = "exact", dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor, SparseExpertAdamW]:
    """One stack under both optimizers with the same gradients; and where it began."""
    draw = torch.Generator().manual_seed(3)
    begun = (torch.randn(16, 12, 20, generator=draw) * 0.02).to(dtype)
    sparse, dense = nn.Parameter(begun.clone()), nn.Parameter(begun.clone())
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **more}
    ours = SparseExpertAdamW([sparse], mode=mode, **settings)
    theirs = torch.optim.AdamW([dense], **settings)
    for step in range(1, steps + 1):
        active = torch.rand(16, generator=draw) < hit
        size = torch.rand(16, 1, 1, generator=draw) * 0.1
        gradient = (torch.randn(16, 12, 20, generator=draw) * size * active[:, None, None]).to(dtype)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = rate_of(step)
        ours.use(sparse, active.nonzero()[:, 0].tolist())
        if mode == "exact":  # what a forward pass would read
            torch.testing.assert_close(sparse[active], dense[active], rtol=1e-4, atol=2e-6)
        sparse.grad, dense.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    return sparse, dense, begun, ours


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_exact_is_dense_adamw(eps: float, weight_decay: float) -> None:
    sparse, dense, begun, ours = both(STEPS, HIT, eps=eps, weight_decay=weight_decay)
    ours.catch_up_all()
    moved = (dense - begun).detach().norm()
    assert float((sparse - dense).detach().norm() / moved) < 1e-5  # of the way they went, not of the weights


def test_an_expert_that_is_never_active_decays() -> None:
    sparse, dense, begun, ours = both(50, 0.02)
    never = ours.state[sparse]["row"] < 0
    assert 0 < int(never.sum()) < 16
    assert torch.equal(sparse[never], begun[never])
    ours.catch_up_all()
    torch.testing.assert_close(sparse[never], dense[never])
    assert not torch.equal(sparse[never], begun[never])


def test_state_exists_only_for_experts_that_were_active() -> None:
    sparse, _, _, ours = both(10, 0.02)
    state = ours.state[sparse]
    used = int((state["row"] >= 0).sum())
    assert 0 < used < 8
    assert used <= len(state["exp_avg"]) < 2 * used
    assert state["exp_avg"].shape[1:] == sparse.shape[1:]


def test_always_active_it_is_adamw_bit_for_bit_up_to_the_order_of_operations() -> None:
    sparse, dense, _, _ = both(60, 1.1, dtype=torch.float64)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


def test_lazy_counts_an_experts_own_steps() -> None:
    sparse, _, begun, ours = both(30, 0.3, mode="lazy")
    draw = torch.Generator().manual_seed(3)
    torch.randn(16, 12, 20, generator=draw)
    alone = [nn.Parameter(begun[e].clone()) for e in range(16)]
    each = [torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0) for p in alone]
    for step in range(1, 31):
        active = torch.rand(16, generator=draw) < 0.3
        size = torch.rand(16, 1, 1, generator=draw) * 0.1
        gradient = torch.randn(16, 12, 20, generator=draw) * size * active[:, None, None]
        for e in range(16):
            alone[e].data.mul_(1 - rate_of(step) * 0.1)  # decay, active or not
            if active[e]:
                each[e].param_groups[0]["lr"] = rate_of(step)
                alone[e].grad = gradient[e]
                each[e].step()
    ours.catch_up_all()
    torch.testing.assert_close(sparse, torch.stack(list(alone)), rtol=1e-4, atol=1e-6)


def test_a_model_whose_banks_are_watched_trains_as_under_adamw() -> None:
    config = ModelConfig.model_validate(
        {"vocab_size": 11, "width": 8, "layers": 2, "context": 16, "attention": {"heads": 2},
         "experts": {"count": 12, "hidden": 6}, "router": {"kind": "top_k", "top_k": 1}}
    )  # fmt: skip
    torch.manual_seed(0)
    ours = LanguageModel(config).double()
    theirs = copy.deepcopy(ours)
    first_weights = [p.detach().clone() for p in ours.parameters()]
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = []
    for model, kind in ((ours, SparseExpertAdamW), (theirs, torch.optim.AdamW)):
        stacks = [p for name, p in model.named_parameters() if ".experts." in name]
        rest = [p for name, p in model.named_parameters() if ".experts." not in name]
        optimizers.append([kind(stacks, **settings), torch.optim.AdamW(rest, **settings)])
    sparse = optimizers[0][0]
    assert isinstance(sparse, SparseExpertAdamW)
    sparse.watch(ours)
    draw = torch.Generator().manual_seed(1)
    for _ in range(40):
        ids = torch.randint(0, 11, (1, 5), generator=draw)
        losses = []
        for model, (first, second) in zip((ours, theirs), optimizers, strict=True):
            logits = model(ids[:, :-1]).logits_BTV
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            model.zero_grad(set_to_none=False)
            loss.backward()
            first.step()
            second.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    idle = sum(int((state["stamp"] < 40).sum()) for state in sparse.state.values())
    assert idle > 0
    sparse.catch_up_all()
    for a, b, begun in zip(ours.parameters(), theirs.parameters(), first_weights, strict=True):
        assert float(((a - b).norm() / (b - begun).norm()).detach()) < 1e-4


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(mode: str) -> None:
    whole, _, _, _ = both(60, HIT, mode=mode)
    draw = torch.Generator().manual_seed(9)
    first, _, _, ours = both(30, HIT, mode=mode)
    other = nn.Parameter(first.detach().clone())
    loaded = SparseExpertAdamW([other], lr=1.0, mode=mode)
    loaded.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert loaded.state[other]["rates"].dtype == torch.float64
    for _ in range(20):
        gradient = torch.randn(first.shape, generator=draw) * (torch.rand(16, 1, 1, generator=draw) < HIT)
        for parameter, optimizer in ((first, ours), (other, loaded)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(first, other)
    assert not torch.equal(first, whole)


def test_what_makes_no_sense_is_refused() -> None:
    stack = nn.Parameter(torch.zeros(2, 3))
    for wrong in (
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"mode": "fast"},
    ):
        with pytest.raises(ValueError, match=r"AdamW with|are the modes"):
            SparseExpertAdamW([stack], **wrong)
    with pytest.raises(ValueError, match="is no stack of experts"):
        SparseExpertAdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="keeps nothing of a weight"):
        History(AdamW(0.9, 0.95, 1e-8, 10.0)).add(0.2)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.98), (0.0, 0.99), (0.9, 0.9999999)])
@pytest.mark.parametrize("idle", [1, 2, 3, 4, 7, 20, 170, 900])
def test_three_terms_are_the_sum_over_all_idle_steps(betas: tuple[float, float], idle: int) -> None:
    """At every size of the second moment's root, far below epsilon and far above."""
    c, stamp = AdamW(*betas, 1e-8, 0.1), 50
    rates = [1e-3 * min(1, (n + 1) / 100) for n in range(stamp + idle)]
    by = History(c, rates).since(stamp)
    for root in (0.0, *(1e-8 * 10.0**k for k in range(-3, 6))):
        wanted, weight = 0.0, 1.0
        for n in range(1, idle + 1):
            j, weight = stamp + n, weight * c.beta1 / math.sqrt(c.beta2)
            decay = math.prod(1 - rate * c.weight_decay for rate in rates[j:])
            scale = math.sqrt(1 - c.beta2**j) / (1 - c.beta1**j)
            eps = c.eps * math.sqrt((1 - c.beta2**j) / c.beta2**n)
            wanted += rates[j - 1] * scale * weight * decay / (root + eps)
        found = sum(push / (root + eps) for push, eps in by.pushes)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert len(by.pushes) <= 3


def test_a_transposed_stack_is_trained_like_any_other() -> None:
    begun, gradient = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    plain, turned = nn.Parameter(begun.clone()), nn.Parameter(begun.mT.contiguous().mT)
    assert not turned.is_contiguous()
    for parameter in (plain, turned):
        optimizer = SparseExpertAdamW([parameter])
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(plain, turned)
    assert not torch.equal(plain, begun)
