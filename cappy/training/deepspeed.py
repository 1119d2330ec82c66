"""The strategy `deepspeed`: ZeRO shards optimizer state (1), gradients (2) and weights (3) over the ranks."""

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from cappy.errors import ConfigError
from cappy.training.checkpoint import Tensors, copy_tensors
from cappy.training.distributed import MOMENTS, Ranks, adamw, moments_of, restore_moments
from cappy.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_SHARDING_STAGE = 3
"""The stage of ZeRO that shards the weights too."""


class _Parameter(Protocol):
    """What is used of a parameter; `ds_tensor` is this rank's share of it and `ds_shape` the whole's, at stage 3."""

    shape: torch.Size
    ds_shape: torch.Size
    ds_tensor: Tensor


class _EngineModule(nn.Module):
    """What the engine runs: any computation with the model, so that ours need not be the model's own `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        return compute(self.model)


class DeepSpeedStrategy:
    """DeepSpeed's engine behind the methods of `Replicas`.

    Checkpoints are ours and not DeepSpeed's: whole tensors by name, so that any strategy on any number of ranks goes on
    where another stopped. AdamW is torch's, so that the two strategies compute the same.
    """

    lockstep = True

    def __init__(self, model: "PreTrainedModel", config: TrainingSettings, ranks: Ranks) -> None:
        deepspeed = _import_deepspeed()
        self._api = deepspeed.utils
        self._gathered = deepspeed.zero.GatheredParameters
        self._model, self._stage, self._ranks = model, config.zero_stage, ranks
        self.engine, *_ = deepspeed.initialize(
            model=_EngineModule(model),
            optimizer=adamw(model, config),
            config=_engine_config(config),
            dist_init_required=False,
        )

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.engine.optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `Replicas.backward`; DeepSpeed takes the mean over the ranks where we want the sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self._ranks.count)

    def step(self, rate: float) -> float:
        """As `Replicas.step`, but that the weights are lost where the norm is not a number."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None] if self._stage == 0 else []
        plain = float(nn.utils.get_total_norm(gradients))  # DeepSpeed tells none where it shards nothing.
        self.engine.step()
        return plain if self._stage == 0 else float(self.engine.get_global_grad_norm())

    def weights(self) -> Tensors:
        """A copy of the whole weights, on the CPU; all ranks must ask."""
        if self._stage < WEIGHT_SHARDING_STAGE:
            return copy_tensors(self._model.state_dict())
        with self._gathered(list(self._model.parameters())):
            return copy_tensors(self._model.state_dict())

    def moments(self) -> Tensors:
        """A copy of the whole optimizer's state by parameter and moment, on the CPU; all ranks must ask."""
        if self._stage == 0:
            return moments_of(self._model, self.engine.optimizer)
        states = list(self.engine.optimizer.optimizer.state.values())
        if not states or "step" not in states[0]:
            return {}
        self._link_moments()
        moments: Tensors = {}
        for name, parameter in self._model.named_parameters():
            moments[f"{name}.step"] = torch.as_tensor(states[0]["step"], dtype=torch.float32).cpu().clone()
            for key in MOMENTS:
                value = self._api.safe_get_full_optimizer_state(parameter, key)
                moments[f"{name}.{key}"] = value.detach().cpu().reshape(self._shape(parameter)).clone()
        return moments

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Puts a checkpoint's tensors in place, each rank its share."""
        with self._gathered(list(self._model.parameters()), modifier_rank=0, enabled=self._stage == WEIGHT_SHARDING_STAGE):
            self._model.load_state_dict(weights)
        if self._stage == 0:
            restore_moments(self._model, self.engine.optimizer, moments)
            return
        steps = [value for name, value in moments.items() if name.endswith(".step")]
        if steps:
            self._prepare_moments(steps[0])
        for name, parameter in self._model.named_parameters():
            self._load_tensor(parameter, weights[name])
            for key in MOMENTS if steps else ():
                self._load_tensor(parameter, moments[f"{name}.{key}"], key)

    def best_model(self, best: Tensors) -> nn.Module:
        """A plain model with the best weights, outside DeepSpeed."""
        model: nn.Module = type(self._model)(self._model.config)
        model.load_state_dict(best)
        return model.to(self.engine.device)

    def _prepare_moments(self, step: Tensor) -> None:
        """Makes the optimizer's state, which otherwise begins with the first step."""
        sharded = self.engine.optimizer
        whole = self._stage < WEIGHT_SHARDING_STAGE
        for flat in sharded.single_partition_of_fp32_groups if whole else sharded.fp32_partitioned_groups_flat:
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            sharded.optimizer.state[flat] = {"step": step.clone(), **empty}
        self._link_moments()

    def _link_moments(self) -> None:
        """Lets DeepSpeed find every parameter's moments.

        It links them itself when the first group of parameters has made its first step, and so forgets the other one.
        """
        if self._stage < WEIGHT_SHARDING_STAGE:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_tensor(self, parameter: _Parameter, value: Tensor, moment: str | None = None) -> None:
        """Puts this rank's share of a whole tensor in place: of the weights, or of a moment."""
        api, value = self._api, value.to(self.engine.device)
        if self._stage == WEIGHT_SHARDING_STAGE:
            # DeepSpeed's own function for whole tensors fails where the ranks do not divide their size.
            size = parameter.ds_tensor.numel()
            flat = nn.functional.pad(value.reshape(-1), (0, size * self._ranks.count - value.numel()))
            share = flat.narrow(0, size * self._ranks.rank, size)
            if moment:
                api.safe_set_local_optimizer_state(parameter, share, moment)
            else:
                api.safe_set_local_fp32_param(parameter, share)
        elif moment:
            api.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            api.safe_set_full_fp32_param(parameter, value)

    def _shape(self, parameter: _Parameter) -> torch.Size:
        return parameter.ds_shape if self._stage == WEIGHT_SHARDING_STAGE else parameter.shape


def _engine_config(config: TrainingSettings) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def set_accelerator() -> None:
    """Tells DeepSpeed what it would find out with a warning on stdout; some of transformers' models import it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _import_deepspeed() -> ModuleType:
    set_accelerator()
    try:
        import deepspeed  # type: ignore[import-untyped]
    except ImportError as error:
        remedy = "pip install 'cappy-scorer[train]', or --parallelism ddp"
        raise ConfigError(f"--parallelism deepspeed: cannot be imported ({error}); {remedy}") from error
    # Else every rank on a CPU compiles an extension that gloo does without; a build that is killed leaves a lock, and
    # whoever comes next waits for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # Else every rank tells its whole configuration.
    module: ModuleType = deepspeed
    return module
