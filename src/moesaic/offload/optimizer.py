"""``SparseExpertAdamW``: AdamW over stacks of experts, whose state exists only for experts that were active.

Shape legend: E experts of a stack, N experts that have state, U experts at work, P parameters of an expert.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.model.experts import Experts
from moesaic.native.adamw import Scalars
from moesaic.offload.adamw import update_rows
from moesaic.offload.catch_up import AdamW, CatchUp, History, check_betas, scalars_of, scalars_of_step

Mode = Literal["exact", "lazy"]
_BYTES = 2**25  # of weights that are changed at a time


class SparseExpertAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for parameters that are stacks [E, …] of experts.

    A step updates the experts whose gradient is not all zero; the others are not touched and take no memory
    for moments until their first gradient. ``exact``: what dense AdamW would have done to an idle expert
    meanwhile, momentum, decay and changing rates included, is made up for when it is next used, so the result
    is that of dense AdamW. For this ``use`` has to be told the experts that a forward pass is about to read
    (``watch`` does it for moesaic's banks), and ``catch_up_all`` has to be called before all are read, to
    save them say. ``lazy``: an expert's momentum stands still while it is idle, and its bias correction
    counts its own steps; weight decay is made up for. Any learning-rate scheduler will do. Raises ValueError
    for constants out of range, and for a parameter that is no stack.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        mode: Mode = "exact",
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"AdamW with lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}")
        check_betas(*betas)
        if mode not in ("exact", "lazy"):
            raise ValueError(f"mode={mode!r}: exact and lazy are the modes")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "mode": mode}
        )
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is no stack of experts")
        self._histories: dict[nn.Parameter, History] = {}

    def watch(self, model: nn.Module) -> list[Any]:
        """Have every bank of experts in ``model`` tell which it is about to use; the hooks' handles."""
        mine = {p for group in self.param_groups for p in group["params"]}

        def tell(bank: nn.Module, given: tuple[Any, ...]) -> None:
            hit = given[2].rows.hit  # of the dispatch
            for parameter in bank.parameters(recurse=False):
                if parameter in mine:
                    self.use(parameter, hit)

        banks = [module for module in model.modules() if isinstance(module, Experts)]
        return [bank.register_forward_pre_hook(tell) for bank in banks]

    @torch.no_grad()
    def use(self, parameter: nn.Parameter, experts: Sequence[int]) -> None:
        """Bring these experts of a stack to where dense AdamW would have them now."""
        state = self.state.get(parameter)
        if not state:
            return  # no step yet
        history, stamp_E = self._history(parameter), state["stamp"]
        behind = [expert for expert in experts if int(stamp_E[expert]) != history.step]
        never = [expert for expert in behind if int(state["row"][expert]) < 0]
        begun = [expert for expert in behind if int(state["row"][expert]) >= 0]
        for expert in never:  # which have no momentum, only decay
            # Past autograd's count of changes: a graph that was made before holds other experts of the stack,
            # or this one as it is, for nobody is brought forward twice in a step.
            parameter.data[expert].mul_(self._since(parameter, expert).keep)
        self._update(parameter, begun, [scalars_of(self._since(parameter, expert)) for expert in begun])
        stamp_E[behind] = history.step

    def catch_up_all(self) -> None:
        """Bring every expert of every stack to where dense AdamW would have it now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.use(parameter, range(len(parameter)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the experts that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        active = gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
        self._begin(parameter)
        state, history = self.state[parameter], self._history(parameter)
        constants = history.constants = _constants(group)
        scalars = []
        for expert in active:
            row, by = self._row(parameter, expert), self._since(parameter, expert)
            state["steps"][row] += 1
            count = int(state["steps"][row]) if group["mode"] == "lazy" else history.step + 1
            scalars.append(scalars_of_step(by, constants, group["lr"], count))
        self._update(parameter, active, scalars, gradient)
        history.add(group["lr"])
        state["rates"] = torch.cat([state["rates"], torch.tensor([group["lr"]], dtype=torch.float64)])
        state["stamp"][active] = history.step

    def _since(self, parameter: nn.Parameter, expert: int) -> CatchUp:
        """What an expert missed."""
        history, stamp = self._history(parameter), int(self.state[parameter]["stamp"][expert])
        lazy = self._group(parameter)["mode"] == "lazy"
        return history.decay_since(stamp) if lazy else history.since(stamp)

    def _update(
        self,
        parameter: nn.Parameter,
        experts: Sequence[int],
        scalars: Sequence[Scalars],
        gradient: Tensor | None = None,
    ) -> None:
        """Change weights and moments of experts that have any, some at a time."""
        weights, state = parameter.data, self.state[parameter]
        moments = state["exp_avg"], state["exp_avg_sq"]
        size = max(1, _BYTES // (weights[0].numel() * weights.element_size()))
        for start in range(0, len(experts), size):
            some = list(experts[start : start + size])
            rows = state["row"][some]
            p_UP, m_UP, v_UP = (t.flatten(1) for t in (weights[some], *(moment[rows] for moment in moments)))
            gradient_UP = torch.zeros_like(p_UP) if gradient is None else gradient[some].flatten(1)
            update_rows(p_UP, m_UP, v_UP, gradient_UP, scalars[start : start + size])
            # By index and not through a flat view, which of a transposed stack would be a copy.
            weights[some] = p_UP.view(-1, *weights.shape[1:])
            for moment, new in zip(moments, (m_UP, v_UP), strict=True):
                moment[rows] = new.view(-1, *weights.shape[1:])

    def _begin(self, parameter: nn.Parameter) -> None:
        """State for no expert yet. ``stamp`` [E]: the step an expert is as of; ``row`` [E]: where its moments
        are among those of the N that have any, -1 where it has none; ``steps`` [N]: how many it made."""
        state = self.state[parameter]
        if state:
            return
        state["stamp"] = torch.zeros(len(parameter), dtype=torch.int64)
        state["row"] = torch.full((len(parameter),), -1, dtype=torch.int64)
        state["steps"] = torch.zeros(0, dtype=torch.int64)
        state["rates"] = torch.zeros(0, dtype=torch.float64)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = parameter.new_zeros(0, *parameter.shape[1:])

    def _row(self, parameter: nn.Parameter, expert: int) -> int:
        """Where an expert's moments are; room is made for them, twice as much each time there is none."""
        state = self.state[parameter]
        row = int(state["row"][expert])
        if row >= 0:
            return row
        used, room = int((state["row"] >= 0).sum()), len(state["steps"])
        if used == room:
            more = min(len(parameter) - room, max(1, room))
            for name in ("steps", "exp_avg", "exp_avg_sq"):
                old = state[name]
                state[name] = torch.cat([old, old.new_zeros(more, *old.shape[1:])])
        state["row"][expert] = used
        return used

    def _history(self, parameter: nn.Parameter) -> History:
        """The rates of all steps; made anew of the state after that was loaded."""
        rates = self.state[parameter]["rates"]
        known = self._histories.get(parameter)
        if known is None or known.step != len(rates):
            known = History(_constants(self._group(parameter)), rates.tolist())
            self._histories[parameter] = known
        return known

    def _group(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's. PyTorch gives all state the parameter's dtype; here only moments have it."""
        kept = {
            key: {name: value for name, value in state.items() if not name.startswith("exp_avg")}
            for key, state in state_dict["state"].items()
        }
        super().load_state_dict(state_dict)
        ordered = [p for group in self.param_groups for p in group["params"]]
        for key, state in kept.items():
            self.state[ordered[key]].update({name: value.clone() for name, value in state.items()})
        self._histories.clear()


def _constants(group: dict[str, Any]) -> AdamW:
    beta1, beta2 = group["betas"]
    return AdamW(beta1, beta2, group["eps"], group["weight_decay"])
