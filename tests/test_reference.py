"""The oracles themselves, on cases that can be worked out by hand or by an independent route."""

import math
from typing import Any, Literal

import pytest
import reference as ref
import reference_attention as ref_attention
import reference_losses as ref_losses
import torch
import torch.nn.functional as F
from torch import Tensor

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 97 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(probs: Tensor, choices: list[list[int]], real: list[bool] | None = None) -> ref_losses.Layer:
    made = ref_losses.Layer(probs=probs, logits=probs.log(), choices=choices)
    if real is not None:
        made["real"] = real
    return made


def routed_by_logits(logits: list[list[float]]) -> tuple[Tensor, Tensor]:
    """x and w for which x @ w.T is exactly ``logits``."""
    x = torch.tensor(logits, dtype=torch.float64)
    return x, torch.eye(x.shape[1], dtype=torch.float64)


# ---- routers ----------------------------------------------------------------------------------


def test_top_k_weights_of_each_variant_by_hand() -> None:
    x, w = routed_by_logits([[math.log(1.0), math.log(5.0), math.log(4.0)]])
    plain = ref.top_k(x, w, None, 2)
    assert list(plain["weights"][0]) == [1, 2]
    assert [v.item() for v in plain["weights"][0].values()] == pytest.approx([0.5, 0.4])
    renormalized = ref.top_k(x, w, None, 2, renormalize=True)["weights"][0]
    assert [v.item() for v in renormalized.values()] == pytest.approx([5 / 9, 4 / 9])
    after = ref.top_k(x, w, None, 2, softmax_after=True)["weights"][0]
    assert [v.item() for v in after.values()] == pytest.approx([5 / 9, 4 / 9])
    sigmoid = ref.top_k(x, w, None, 2, score="sigmoid")["weights"][0]
    assert [v.item() for v in sigmoid.values()] == pytest.approx([5 / 6, 4 / 5])


def test_ties_go_to_the_lower_index() -> None:
    x, w = routed_by_logits([[0.0, 1.0, 1.0, 1.0]])
    assert list(ref.top_k(x, w, None, 2)["weights"][0]) == [1, 2]


def test_selection_bias_moves_the_choice_and_not_the_weight() -> None:
    x, w = routed_by_logits([[math.log(1.0), math.log(5.0), math.log(4.0)]])
    bias = torch.tensor([0.9, 0.0, 0.0], dtype=torch.float64)
    chosen = ref.top_k(x, w, None, 1, selection_bias_E=bias)["weights"][0]
    assert list(chosen) == [0]
    assert chosen[0].item() == pytest.approx(0.1)


def test_softmax_after_refuses_sigmoid_scores() -> None:
    x, w = routed_by_logits([[0.0, 1.0]])
    with pytest.raises(ValueError, match="sigmoid"):
        ref.top_k(x, w, None, 1, score="sigmoid", softmax_after=True)


def test_gate_renormalised_over_one_choice_has_no_gradient() -> None:
    x, w = routed_by_logits([[0.0, 1.0]])
    w.requires_grad_()
    for renormalize, silent in ((True, True), (False, False)):
        gate = ref.top_k(x, w, None, 1, renormalize=renormalize)["weights"][0][1]
        (gradient,) = torch.autograd.grad(gate, w)
        assert (gradient.abs().max().item() < 1e-12) is silent


def test_loss_free_update_raises_the_starved_and_lowers_the_flooded() -> None:
    bias = ref.loss_free_update(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0, 2, 4]), 0.25)
    assert bias.tolist() == [0.75, 0.5, 0.25]


def test_noise_changes_the_choice_and_leaves_the_logits_clean() -> None:
    x, w = routed_by_logits([[2.0, 1.0, 0.0]])
    zero_w, one_b = torch.zeros_like(w), torch.full((3,), math.log(math.e - 1), dtype=torch.float64)
    noise = torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64)  # softplus(one_b) is 1
    quiet = ref.noisy_top_k(x, w, None, zero_w, one_b, None, 2)
    noisy = ref.noisy_top_k(x, w, None, zero_w, one_b, noise, 2)
    assert list(quiet["weights"][0]) == [0, 1]
    assert list(noisy["weights"][0]) == [2, 0]
    assert noisy["weights"][0][2].item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert torch.equal(noisy["logits"], x)
    assert noisy["probs"][0].tolist() == pytest.approx(torch.tensor([2.0, 1.0, 3.0]).softmax(0).tolist())


def test_expert_choice_fills_every_expert_to_capacity() -> None:
    x, w = routed_by_logits([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    chosen = [sorted(gates) for gates in ref.expert_choice(x, w, None, 1)["weights"]]
    assert chosen == [[0], [0], [1], [1]]
    tied = [sorted(g) for g in ref.expert_choice(torch.zeros_like(x), w, None, 1)["weights"]]
    assert tied == [[0, 1], [0, 1], [], []]
    single = [sorted(g) for g in ref.expert_choice(x[:1], w, None, 1)["weights"]]
    assert single == [[0, 1]]  # capacity is never below one


def test_smart_takes_experts_until_the_mass_is_reached() -> None:
    x, w = routed_by_logits([[math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]])
    cold = torch.zeros((), dtype=torch.float64)
    kept = [
        list(ref.smart(x, w, None, cold, None, low, high, mass)["weights"][0])
        for low, high, mass in ((1, 4, 0.4), (2, 4, 0.4), (1, 4, 0.6), (1, 2, 0.99), (1, 4, 0.8))
    ]
    assert kept == [[1], [1, 3], [1, 3], [1, 3], [1, 3, 2]]
    gates = ref.smart(x, w, None, cold, None, 1, 4, 0.6)["weights"][0]
    assert gates[1].item() == pytest.approx(2 / 3)


def test_smart_temperature_and_jitter_act_on_the_logits() -> None:
    x, w = routed_by_logits([[2.0, 4.0]])
    routed = ref.smart(x, w, None, torch.tensor(math.log(2.0)), torch.full_like(x, 3.0), 1, 2, 0.5)
    torch.testing.assert_close(routed["logits"], torch.tensor([[3.0, 6.0]], dtype=torch.float64))


def test_capacity_serves_choices_in_order_of_arrival() -> None:
    choices = [[0, 1], [0], [2, 0], [1, 2], [1]]
    assert ref.capacity_drop(choices, 3, 2) == [[True, True], [True], [True, False], [True, True], [False]]
    assert ref.capacity_drop(choices, 3, 0) == [[False] * len(row) for row in choices]


# ---- experts ----------------------------------------------------------------------------------


def test_expert_kinds_on_scalars() -> None:
    def scalar(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    x = torch.tensor([2.0], dtype=torch.float64)
    weights = {"up": scalar(3.0), "down": scalar(5.0)}
    bias = {"up_bias": scalar(-1.0)[0], "down_bias": scalar(7.0)[0]}
    assert ref.expert_ffn(x, "relu", **weights, **bias).item() == 5 * 5 + 7
    assert ref.expert_ffn(x, "relu2", **weights).item() == 5 * 36
    assert ref.expert_ffn(-x, "relu", **weights, **bias).item() == 7
    gelu = ref.expert_ffn(x, "gelu", **weights).item()
    assert gelu == pytest.approx(5 * F.gelu(torch.tensor(6.0, dtype=torch.float64)).item())
    swiglu = ref.expert_ffn(x, "swiglu", gate=scalar(0.5), **weights).item()
    assert swiglu == pytest.approx(5 * 6 / (1 + math.exp(-1)))


def test_moe_weighs_its_experts_and_gives_nothing_to_an_unrouted_token() -> None:
    one = torch.ones(1, 1)
    experts = [{"kind": "relu", "up": one, "down": scale * one} for scale in (1.0, 10.0)]
    weights = [{0: torch.tensor(0.5), 1: torch.tensor(0.25)}, {}]
    assert ref.moe(torch.tensor([[2.0], [3.0]]), weights, experts).tolist() == [[6.0], [0.0]]


# ---- losses -----------------------------------------------------------------------------------

UNIFORM = layer(torch.full((4, 4), 0.25), [[0], [1], [2], [3]])


def collapsed(expert: int) -> ref_losses.Layer:
    return layer(F.one_hot(torch.full((4,), expert), 4).float(), [[expert]] * 4)


def test_balance_loss_is_one_when_uniform_and_the_number_of_experts_when_collapsed() -> None:
    assert ref_losses.balance_loss([UNIFORM], "olmoe").item() == 1.0
    assert ref_losses.balance_loss([collapsed(2)], "olmoe").item() == 4.0
    assert ref_losses.balance_loss([UNIFORM, collapsed(2)], "olmo_core").item() == 2.5


def test_pooling_the_layers_hides_a_collapse_that_averaging_shows() -> None:
    layers = [collapsed(e) for e in range(4)]
    assert ref_losses.balance_loss(layers, "transformers").item() == 1.0
    assert ref_losses.balance_loss(layers, "olmoe").item() == 4.0


def test_transformers_balance_loss_grows_with_k() -> None:
    two = layer(torch.full((4, 4), 0.25), [[0, 1], [1, 2], [2, 3], [3, 0]])
    assert ref_losses.balance_loss([two], "transformers").item() == 2.0
    assert ref_losses.balance_loss([two], "olmoe").item() == 1.0


def test_losses_do_not_see_padding() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]])
    padded = layer(probs, [[0], [1], [1]], [True, True, False])
    clean = layer(probs[:2], [[0], [1]])
    for convention in ("olmoe", "olmo_core", "transformers"):
        assert ref_losses.balance_loss([padded], convention) == ref_losses.balance_loss([clean], convention)
        assert ref_losses.z_loss([padded], convention) == ref_losses.z_loss([clean], convention)
    assert ref_losses.entropy_bonus([padded]) == ref_losses.entropy_bonus([clean])


def test_balance_loss_sends_a_gradient_to_the_router() -> None:
    x, w = random(6, 3), random(4, 3).requires_grad_()
    routed = ref.top_k(x, w, None, 2)
    made = ref_losses.Layer(
        probs=routed["probs"], logits=routed["logits"], choices=[list(g) for g in routed["weights"]]
    )
    (gradient,) = torch.autograd.grad(ref_losses.balance_loss([made], "olmoe"), w)
    assert gradient.abs().max() > 1e-4


def test_z_loss_by_hand_and_its_division_by_k() -> None:
    made = ref_losses.Layer(
        probs=torch.full((1, 2), 0.5), logits=torch.tensor([[1.0, 1.0]]), choices=[[0, 1]]
    )
    square = (1 + math.log(2)) ** 2
    assert ref_losses.z_loss([made], "olmo_core").item() == pytest.approx(square)
    assert ref_losses.z_loss([made], "olmoe").item() == pytest.approx(square / 2)


def test_entropy_bonus_is_minus_log_experts_when_uniform_and_zero_when_certain() -> None:
    assert ref_losses.entropy_bonus([UNIFORM]).item() == pytest.approx(-math.log(4))
    assert ref_losses.entropy_bonus([collapsed(1)]).item() == 0.0
    unnormalised = layer(torch.full((2, 4), 0.9), [[0], [1]])
    assert ref_losses.entropy_bonus([unnormalised]).item() == pytest.approx(-math.log(4))


def test_cross_entropy_agrees_with_torch() -> None:
    hidden, w, b = 30 * random(4, 3), random(5, 3, seed=1), random(5)
    targets = [0, -100, 4, 2]
    losses = torch.stack(ref_losses.cross_entropy(hidden, w, b, targets))
    expected = F.cross_entropy(hidden @ w.T + b, torch.tensor(targets), reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[1] == 0


# ---- attention and muon -----------------------------------------------------------------------


def test_attention_agrees_with_torch_for_grouped_queries() -> None:
    x, wq, wk, wv, wo = (random(*s, seed=i) for i, s in enumerate([(5, 6), (8, 6), (4, 6), (4, 6), (6, 8)]))
    biases = (random(8), random(4, seed=1), random(4, seed=2))
    y = ref_attention.attention(x, wq, wk, wv, wo, 4, 2, 2, qkv_bias=biases, scale=0.3)
    q = (x @ wq.T + biases[0]).view(5, 4, 2).transpose(0, 1)
    k = (x @ wk.T + biases[1]).view(5, 2, 2).transpose(0, 1).repeat_interleave(2, dim=0)
    v = (x @ wv.T + biases[2]).view(5, 2, 2).transpose(0, 1).repeat_interleave(2, dim=0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, mixed.transpose(0, 1).reshape(5, 8) @ wo.T)


@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
def test_attention_does_not_look_ahead(qk_norm: Literal["head", "full"] | None) -> None:
    x = random(6, 4).requires_grad_()
    wq, wk, wv, wo = (random(4, 4, seed=i) for i in range(4))
    norm_w = random(2 if qk_norm == "head" else 4)
    y = ref_attention.attention(
        x, wq, wk, wv, wo, 2, 2, 2, qk_norm=qk_norm, q_norm_w=norm_w, k_norm_w=norm_w, rope_theta=1e4
    )
    (gradient,) = torch.autograd.grad(y[3].sum(), x)
    assert gradient[4:].abs().max() == 0
    assert gradient[:4].abs().amin(dim=1).min() > 0


def test_query_norm_makes_the_length_of_queries_irrelevant() -> None:
    x, wq, wk, wv, wo = (random(4, 4, seed=i) for i in range(5))
    head_size, full = torch.ones(2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    one_head_longer = torch.cat([wq[:2] * 7, wq[2:]])

    def run(q: Tensor, qk_norm: Literal["head", "full"], w: Tensor) -> Tensor:
        return ref_attention.attention(
            x,
            q,
            wk,
            wv,
            wo,
            2,
            2,
            2,
            qk_norm=qk_norm,
            q_norm_w=w,
            k_norm_w=w,
            eps=0.0,
        )

    torch.testing.assert_close(run(one_head_longer, "head", head_size), run(wq, "head", head_size))
    torch.testing.assert_close(run(7 * wq, "full", full), run(wq, "full", full))
    assert not torch.allclose(run(one_head_longer, "full", full), run(wq, "full", full))


def test_rotation_pairs_i_with_i_plus_half_and_keeps_only_distances() -> None:
    e0 = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    turned = ref_attention.rotate(e0, 3, 100.0)
    assert turned.tolist() == pytest.approx([math.cos(3), 0, math.sin(3), 0])
    e3 = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert ref_attention.rotate(e3, 3, 100.0).tolist() == pytest.approx([0, -math.sin(0.3), 0, math.cos(0.3)])
    q, k = random(4), random(4, seed=1)
    near = ref_attention.rotate(q, 5, 100.0) @ ref_attention.rotate(k, 2, 100.0)
    far = ref_attention.rotate(q, 13, 100.0) @ ref_attention.rotate(k, 10, 100.0)
    torch.testing.assert_close(near, far)


def test_muon_gives_the_orthogonal_factor_of_the_polar_decomposition() -> None:
    for g in (random(4, 4), random(5, 3), random(3, 5).T):
        factor = ref_losses.muon_orthogonalise(g)
        torch.testing.assert_close(factor.T @ factor, torch.eye(g.shape[1], dtype=torch.float64))
        rest = factor.T @ g.double()  # symmetric, no eigenvalue below zero: no rotation is left in it
        torch.testing.assert_close(rest, rest.T)
        assert torch.linalg.eigvalsh(rest).min() > 0
        torch.testing.assert_close(ref_losses.muon_orthogonalise(g.T), factor.T)


# ---- the whole model --------------------------------------------------------------------------


def small(**changed: object) -> ref.PlainMakeMoE:
    torch.manual_seed(0)
    options = {"width": 16, "layers": 2, "heads": 2, "experts": 4, "window": 8} | changed
    return ref.PlainMakeMoE(11, **options)  # type: ignore[arg-type]


def test_plain_model_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in ref.PlainMakeMoE(65).parameters()) == 8_996_545


def test_plain_sparse_moe_agrees_with_the_router_and_expert_oracles() -> None:
    layer_: Any = small().double().eval().blocks[0].moe
    x = random(2, 3, 16)
    flat = x.flatten(0, 1)
    routed = ref.noisy_top_k(
        flat, layer_.router.weight, layer_.router.bias, layer_.noise.weight, layer_.noise.bias, None, 2
    )
    experts = [
        {
            "kind": "relu",
            "up": expert[0].weight,
            "up_bias": expert[0].bias,
            "down": expert[2].weight,
            "down_bias": expert[2].bias,
        }
        for expert in layer_.experts
    ]
    torch.testing.assert_close(layer_(x).flatten(0, 1), ref.moe(flat, routed["weights"], experts))


@pytest.mark.parametrize(("scale", "factor"), [("width", 16**-0.5), ("head", 8**-0.5)])
def test_plain_attention_agrees_with_the_attention_oracle(scale: str, factor: float) -> None:
    layer_: Any = small(scale=scale).double().eval().blocks[0].attention
    wq, wk, wv = (torch.cat([getattr(h, n).weight for h in layer_.heads]) for n in ("query", "key", "value"))
    x = random(1, 5, 16)
    expected = ref_attention.attention(x[0], wq, wk, wv, layer_.output.weight, 2, 2, 8, scale=factor)
    torch.testing.assert_close(layer_(x)[0], expected + layer_.output.bias)


def test_plain_model_is_causal_and_quiet_in_evaluation() -> None:
    model = small().eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = torch.tensor([[1, 2, 3, 10, 9, 8]])
    torch.testing.assert_close(model(ids)[:, :3], model(changed)[:, :3])
    assert torch.equal(model(ids), model(ids))
    noisy = small(dropout=0.0).train()
    assert not torch.equal(noisy(ids), noisy(ids))


def test_plain_generation_outgrows_the_window_and_greedy_takes_the_best() -> None:
    model = small().eval()
    prompt = torch.tensor([[1, 2, 3]])
    out = model.generate(prompt, 9, greedy=True)
    assert out.shape == (1, 12)
    assert torch.equal(out[:, :3], prompt)
    for t in range(3, 12):
        assert out[0, t] == model(out[:, max(0, t - 8) : t])[0, -1].argmax()
    torch.manual_seed(1)
    assert len(set(model.generate(prompt, 9)[0].tolist())) > 3


def test_plain_step_learns_a_repeated_sequence() -> None:
    model = small(dropout=0.0).train()
    optimizer = ref.plain_optimizer(model, 1e-2)
    ids = torch.arange(8).repeat(4, 1)
    losses = [ref.plain_step(model, optimizer, ids, ids + 1).item() for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]
