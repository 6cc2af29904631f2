"""The quantities of OLMoE's analysis (arXiv 2409.02060, section 5), as its text defines them.

Each is a pure function of counts, and each comes with the value that a routing without structure would have,
without which none of them says anything.

Shape legend: L sparse layers, T tokens, K choices, E experts, C domains, n distinct token ids.
"""

import numpy as np
import torch
from torch import Tensor


def saturation(expert_TK: Tensor, last_TK: Tensor, k: int) -> float:
    """The share of a later checkpoint's first ``k`` choices that were chosen before, order apart: the mean of
    |E_t ∩ E_T| / k (section 5.1). A random router gives k / E. Choices that were not carried out are
    negative, and count for neither; a token without any is left out."""
    now_TK, then_TK = last_TK[:, :k].long(), expert_TK[:, :k].long()
    kept_TK = now_TK >= 0
    same_TK = (now_TK[:, :, None] == then_TK[:, None, :]).any(2) & kept_TK
    some_T = kept_TK.any(1)
    return float((same_TK.sum(1).double() / kept_TK.sum(1).clamp(min=1))[some_T].mean())


def coactivation(pair_EE: Tensor, chosen_E: Tensor) -> Tensor:
    """N_ij / N_i: of the tokens that chose expert i (rows), the share that also chose j, float64 [E, E]
    (section 5.2). Rows sum to k − 1; without structure every entry is (k − 1) / (E − 1)."""
    return pair_EE.double() / chosen_E.double().clamp(min=1)[:, None]


def domain_shares(chosen_CE: Tensor, token_C: Tensor) -> Tensor:
    """N_ED / N_D: the share of a domain's tokens that chose each expert, float64 [C, E] (section 5.3). Rows
    sum to k; without structure every entry is k / E."""
    return chosen_CE.double() / token_C.double().clamp(min=1)[:, None]


def word_shares(count_nE: Tensor, least: int) -> Tensor:
    """Of every token id that occurred at least ``least`` times, the largest share of it that one expert took,
    float64 (section 5.4). An id that occurred once has share 1 whatever the router does."""
    total_n = count_nE.sum(1)
    frequent = total_n >= max(1, least)
    return count_nE[frequent].max(1).values.double() / total_n[frequent].double()


def random_word_shares(count_nE: Tensor, least: int, seed: int = 0) -> Tensor:
    """What ``word_shares`` would be if each occurrence had drawn its expert by the load of the layer
    alone."""
    total_n = count_nE.sum(1).numpy()
    total_n = total_n[total_n >= max(1, least)]
    load_E = count_nE.sum(0).double().numpy()
    if not len(total_n):
        return torch.empty(0, dtype=torch.float64)
    drawn_nE = np.random.default_rng(seed).multinomial(total_n, load_E / load_E.sum())
    return torch.from_numpy(drawn_nE.max(1) / total_n)


def transitions(step_EE: Tensor) -> Tensor:
    """Of the tokens whose first choice in a layer was i (rows), the share whose first choice in the next was
    j, float64 [E, E]. Without structure all rows are the load of the next layer."""
    return step_EE.double() / step_EE.sum(1, keepdim=True).double().clamp(min=1)


def transition_bits(step_EE: Tensor) -> float:
    """Bits that a token's expert in one layer tells about its expert in the next (mutual information)."""
    joint_EE = step_EE.double() / step_EE.sum().clamp(min=1)
    apart_EE = joint_EE.sum(1, keepdim=True) * joint_EE.sum(0, keepdim=True)
    ratio = joint_EE / apart_EE.clamp(min=1e-300)
    return float(torch.special.xlogy(joint_EE, ratio).sum() / np.log(2))
