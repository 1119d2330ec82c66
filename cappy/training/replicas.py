"""Every rank holds the whole model and optimizer; one rank alone is the plain case."""

import math

import torch
from torch import Tensor, nn

from cappy.training.checkpoint import Tensors, copied
from cappy.training.plan import TrainingSettings
from cappy.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter, beside the number of its steps."""


class Replicas:
    """The strategies `single` and `ddp`: gradients are summed over the ranks once per update, then all do the same."""

    lockstep = False
    """Whether every rank must do as many passes as every other."""

    def __init__(self, model: nn.Module, plan: TrainingSettings, ranks: Ranks) -> None:
        self._model, self._clip, self._ranks = model, plan.clip, ranks
        self._optimizer = adamw(model, plan)

    def forget(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of this rank's share; `last` of the update."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        """One step at this learning rate; the gradient's norm before clipping. No step where that is no number."""
        self._share()
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if norm < float("inf"):
            self._optimizer.step()
        return norm

    def weights(self) -> Tensors:
        """A copy of the weights, on the CPU."""
        return copied(self._model.state_dict())

    def moments(self) -> Tensors:
        """A copy of the optimizer's state, by parameter and moment."""
        return moments_of(self._model, self._optimizer)

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Puts a checkpoint's tensors in place."""
        self._model.load_state_dict(weights)
        restore_moments(self._model, self._optimizer, moments)

    def finished(self, best: Tensors) -> nn.Module:
        """The model with the best weights."""
        self._model.load_state_dict(best)
        return self._model

    def _share(self) -> None:
        """Sums the gradients over the ranks; a parameter that no rank used keeps none, as on one rank."""
        if self._ranks.count == 1:
            return
        parameters = list(self._model.parameters())
        used = self._ranks.summed([float(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, count in zip(parameters, used, strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        self._ranks.sum_gradients(gradients)


def adamw(model: nn.Module, plan: TrainingSettings) -> torch.optim.AdamW:
    """AdamW that spares biases and norms its weight decay; the rate is set at every step."""
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    plain = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)


def moments_of(model: nn.Module, optimizer: torch.optim.AdamW) -> Tensors:
    """A copy of the optimizer's state by parameter and moment, on the CPU."""
    return copied(
        {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def restore_moments(model: nn.Module, optimizer: torch.optim.AdamW, moments: Tensors) -> None:
    """Puts the optimizer's state in place; the counts of steps stay on the CPU, as AdamW keeps them."""
    for name, parameter in model.named_parameters():
        for key in ("step", *MOMENTS):
            if (value := moments.get(f"{name}.{key}")) is not None:
                device = "cpu" if key == "step" else parameter.device
                optimizer.state[parameter][key] = value.to(device, copy=True)
