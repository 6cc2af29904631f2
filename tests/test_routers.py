"""Every router against its oracle: the decision and every gradient.

Shape legend: T tokens, E experts, K choices, D width.
"""

from typing import Any

import pytest
import reference as ref
import reference_losses as ref_losses
import torch
from router_oracles import (
    ORACLES,
    choices_of,
    draw,
    kept_weights,
    oracle_leaves,
    random_router,
    router_options,
)
from torch import Tensor

from moesaic.analysis.routing import dropped_share
from moesaic.losses import balance_loss, entropy_bonus, z_loss
from moesaic.model.routers import ROUTERS, Router
from moesaic.routing import Routing

torch.set_num_threads(1)

WIDTH = 6
SHAPES = [(9, 5, 3), (7, 5, 1), (6, 5, 5), (1, 5, 3), (1, 4, 1), (8, 1, 1)]  # T, E, K
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ROUTERS),
    ("top_k", {"score": "sigmoid"}),
    ("top_k", {"score": "sigmoid", "renormalize": True}),
    ("top_k", {"renormalize": True}),
    ("top_k", {"softmax_after": True}),
    ("loss_free", {"renormalize": False}),
    ("loss_free", {"score": "softmax"}),
    ("smart", {"mass": 1.0}),
    ("smart", {"mass": 0.3, "min_k": 1}),
    ("smart", {"jitter": 0.0}),
]


def tokens(number: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def run_both(
    router: Router, x_TD: Tensor, real_T: Tensor | None = None
) -> tuple[Routing, ref.Routed, Tensor, Tensor, dict[str, Tensor]]:
    """The router on ``x_TD`` and its oracle on the real tokens only, from the same random numbers."""
    x = x_TD.clone().requires_grad_()
    torch.manual_seed(5)
    routing = router(x, real_T)
    torch.manual_seed(5)
    options, real = router.options, slice(None) if real_T is None else real_T
    drawn = draw(options, *x_TD.shape, router.num_experts, router.training)
    leaves = oracle_leaves(router)
    x_exact = x_TD.double().requires_grad_()
    drawn = None if drawn is None else drawn[real]
    routed = ORACLES[options.kind](options, leaves, x_exact[real], drawn, router.training)
    return routing, routed, x, x_exact, leaves


def scalar(weights: list[dict[int, Tensor]], experts: int) -> Tensor:
    coefficient_TE = tokens(len(weights), experts, seed=2).double()
    parts = [coefficient_TE[t, e] * w for t, gates in enumerate(weights) for e, w in gates.items()]
    return torch.stack(parts).sum()


def compare(router: Router, x_TD: Tensor, real_T: Tensor | None = None) -> None:
    routing, routed, x, x_exact, leaves = run_both(router, x_TD, real_T)
    real = slice(None) if real_T is None else real_T
    close = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    assert routing.weight_TK.dtype == routing.logits_TE.dtype == routing.probs_TE.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE[real], routed["logits"], **close)
    torch.testing.assert_close(routing.probs_TE[real], routed["probs"], **close)
    of_all = kept_weights(routing)
    kept = of_all if real_T is None else [of_all[t] for t in real_T.nonzero().flatten().tolist()]
    assert [list(gates) for gates in kept] == choices_of(routed)
    for ours, theirs in zip(kept, routed["weights"], strict=True):
        torch.testing.assert_close(list(ours.values()), list(theirs.values()), **close)

    layer = ref_losses.Layer(probs=routed["probs"], logits=routed["logits"], choices=choices_of(routed))
    ours = scalar(kept, router.num_experts) + 0.7 * balance_loss([routing])
    ours = ours + 0.3 * z_loss([routing]) + 0.5 * entropy_bonus([routing])
    theirs = scalar(routed["weights"], router.num_experts) + 0.7 * ref_losses.balance_loss([layer], "olmoe")
    theirs = theirs + 0.3 * ref_losses.z_loss([layer], "olmoe") + 0.5 * ref_losses.entropy_bonus([layer])
    torch.testing.assert_close(ours, theirs, **close)
    torch.autograd.backward([ours, theirs])
    torch.testing.assert_close(x.grad, x_exact.grad, **close)
    for name, parameter in router.named_parameters():
        expected = leaves[name].grad
        if expected is None:  # noise parameters outside training
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected, **close)


def test_every_router_has_an_oracle_and_no_oracle_is_left_over() -> None:
    assert set(ORACLES) == set(ROUTERS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_router_equals_its_oracle_in_values_and_gradients(
    kind: str, training: bool, bias: bool, shape: tuple[int, int, int]
) -> None:
    T, E, K = shape
    router = random_router(router_options(kind, K, bias), WIDTH, E).train(training)
    compare(router, tokens(T))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "changed"), VARIANTS, ids=str)
def test_every_option_equals_the_oracle(kind: str, changed: dict[str, Any], training: bool) -> None:
    router = random_router(router_options(kind, 3, True, **changed), WIDTH, 7, seed=3).train(training)
    compare(router, tokens(12))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_padding_is_never_kept_and_the_real_tokens_route_as_if_alone(kind: str, training: bool) -> None:
    real_T = torch.tensor([False, True, True, False, True, True, True, True, False])
    router = random_router(router_options(kind, 2, True), WIDTH, 5).train(training)
    x_TD = tokens(9)
    x_TD[~real_T] *= 3  # padding that every expert would want, were it allowed to take part
    compare(router, x_TD, real_T)
    routing = router(x_TD, real_T)
    assert not routing.keep_TK[~real_T].any()
    assert not routing.wanted_TK[~real_T].any()
    assert routing.real_tokens() == 6
    x_TD.requires_grad_()
    routing = router(x_TD, real_T)
    losses = balance_loss([routing]) + z_loss([routing]) + entropy_bonus([routing])
    (gradient_TD,) = torch.autograd.grad(losses, x_TD)
    assert gradient_TD[~real_T].abs().max() == 0
    assert gradient_TD[real_T].abs().amin(1).min() > 0


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_batch_of_nothing_but_padding_routes_nothing(kind: str) -> None:
    router = random_router(router_options(kind, 2), WIDTH, 5).train()
    routing = router(tokens(4), torch.zeros(4, dtype=torch.bool))
    assert int(routing.keep_TK.sum()) == 0
    assert dropped_share([routing]) == 0
    for loss in (balance_loss([routing]), z_loss([routing]), entropy_bonus([routing])):
        assert loss.item() == 0


@pytest.mark.parametrize("kind", ROUTERS)
def test_router_arithmetic_stays_float32_under_autocast_and_with_bf16_tokens(kind: str) -> None:
    router = random_router(router_options(kind, 2, True), WIDTH, 5).eval()
    x_TD = tokens(9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = router(x_TD)
    plain = router(x_TD.float())
    for name in ("weight_TK", "logits_TE", "probs_TE"):
        assert torch.equal(getattr(under, name), getattr(plain, name))
        assert getattr(under, name).dtype == torch.float32


@pytest.mark.parametrize("kind", ["noisy_top_k", "smart"])
def test_noise_acts_in_training_only(kind: str) -> None:
    router = random_router(router_options(kind, 2), WIDTH, 5).train()
    x_TD = tokens(9)
    assert not torch.equal(router(x_TD).probs_TE, router(x_TD).probs_TE)
    router.eval()
    assert torch.equal(router(x_TD).probs_TE, router(x_TD).probs_TE)


def test_loss_free_bias_moves_the_choice_and_not_the_weight() -> None:
    router = random_router(router_options("loss_free", 2, renormalize=False), WIDTH, 5)
    x_TD = tokens(9)
    router.e_score_correction_bias.zero_()
    before = router(x_TD)
    router.e_score_correction_bias[4] = 10.0
    after = router(x_TD)
    assert not (before.expert_TK == 4).any(1).all()
    assert (after.expert_TK[:, 0] == 4).all()
    assert torch.equal(after.weight_TK[:, 0], after.probs_TE[:, 4])
    assert torch.equal(after.probs_TE, before.probs_TE)
    assert "e_score_correction_bias" in router.state_dict()
    assert "e_score_correction_bias" not in dict(router.named_parameters())


def test_loss_free_after_step_equals_its_oracle() -> None:
    router = random_router(router_options("loss_free", 2, update_rate=0.25), WIDTH, 5)
    before = router.e_score_correction_bias.clone()
    counts_E = torch.tensor([4, 4, 0, 9, 3])  # two experts at the mean stay where they are
    router.after_step(counts_E)
    expected = ref.loss_free_update(before, counts_E, 0.25)
    assert torch.equal(router.e_score_correction_bias, expected)
    assert (expected == before).tolist() == [True, True, False, False, False]


def test_loss_free_updates_even_out_a_lopsided_load() -> None:
    router = random_router(router_options("loss_free", 2, update_rate=0.02), WIDTH, 5)
    router.e_score_correction_bias.zero_()
    x_TD = tokens(400) + 1.0
    first = router(x_TD).counts_E().max()
    for _ in range(100):
        router.after_step(router(x_TD).counts_E(wanted=True))
    assert router(x_TD).counts_E().max() < 1.15 * 160 < first


@pytest.mark.parametrize("kind", [k for k in ROUTERS if k != "loss_free"])
def test_after_step_of_the_other_routers_changes_nothing(kind: str) -> None:
    router = random_router(router_options(kind, 2), WIDTH, 5)
    before = {name: t.clone() for name, t in router.state_dict().items()}
    router.after_step(torch.tensor([9, 0, 0, 0, 1]))
    assert all(torch.equal(t, before[name]) for name, t in router.state_dict().items())


def test_expert_choice_gives_every_expert_its_share_in_training_and_is_causal_outside() -> None:
    router = random_router(router_options("expert_choice", 2), WIDTH, 4).train()
    x_TD = tokens(10)
    assert router(x_TD).counts_E().tolist() == [5, 5, 5, 5]
    router.eval()
    alone = router(x_TD[:3])
    together = router(x_TD)
    assert torch.equal(together.expert_TK[:3], alone.expert_TK)
    assert together.keep_TK.sum(1).tolist() == [2] * 10


def test_smart_keeps_between_min_k_and_top_k_experts() -> None:
    options = router_options("smart", 4, min_k=2, mass=0.7)
    routing = random_router(options, WIDTH, 6).eval()(tokens(200))
    kept_T = routing.keep_TK.sum(1)
    assert set(kept_T.tolist()) == {2, 3, 4}
    torch.testing.assert_close((routing.weight_TK * routing.keep_TK).sum(1), torch.ones(200))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ROUTERS)
def test_parameter_count_of_options_equals_the_module(kind: str, bias: bool) -> None:
    options = router_options(kind, 2, bias)
    router = random_router(options, WIDTH, 5)
    assert options.parameters(WIDTH, 5) == sum(p.numel() for p in router.parameters())
