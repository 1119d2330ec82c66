"""The strategy `deepspeed`: ZeRO shards the optimizer state (stage 1), gradients (2) and weights (3) over the ranks."""

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from cappy.errors import ConfigError
from cappy.training.checkpoint import Tensors, copy_tensors
from cappy.training.distributed import MOMENTS, World, adamw, moments_of, restore_moments
from cappy.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_SHARDING_STAGE = 3
"""The ZeRO stage that also shards the weights."""


class _Parameter(Protocol):
    """The parameter attributes used here; at stage 3 `ds_tensor` is this rank's shard, `ds_shape` the full shape."""

    shape: torch.Size
    ds_shape: torch.Size
    ds_tensor: Tensor


class _EngineModule(nn.Module):
    """The module that the engine wraps: it runs any computation with the model, not only the model's `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        return compute(self.model)


class DeepSpeedStrategy:
    """Trains with DeepSpeed's engine; has the same methods as `ReplicatedStrategy`.

    Checkpoints contain full tensors by name instead of DeepSpeed's format, so that any strategy on any number of ranks
    can resume a run of another. The optimizer is torch's AdamW, so that all strategies compute the same updates.
    """

    lockstep = True
    """All ranks must run the same number of passes, because each pass is a collective call."""

    def __init__(self, model: "PreTrainedModel", config: TrainingSettings, world: World) -> None:
        deepspeed = _import_deepspeed()
        self._utils = deepspeed.utils
        self._gather_parameters = deepspeed.zero.GatheredParameters
        self._model, self._stage, self._world = model, config.zero_stage, world
        self.engine, *_ = deepspeed.initialize(
            model=_EngineModule(model),
            optimizer=adamw(model, config),
            config=_engine_config(config),
            dist_init_required=False,
        )

    def zero_grad(self) -> None:
        """Resets the gradients."""
        self.engine.optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Like `ReplicatedStrategy.backward`; the factor undoes DeepSpeed's mean over the ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self._world.size)

    def step(self, rate: float) -> float:
        """Like `ReplicatedStrategy.step`, except that the weights are unusable afterwards if the norm is not finite."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None] if self._stage == 0 else []
        norm = float(nn.utils.get_total_norm(gradients))  # At stage 0 DeepSpeed does not compute it.
        self.engine.step()
        return norm if self._stage == 0 else float(self.engine.get_global_grad_norm())

    def weights(self) -> Tensors:
        """A copy of the full weights on the CPU; a collective call, which all ranks must make."""
        if self._stage < WEIGHT_SHARDING_STAGE:
            return copy_tensors(self._model.state_dict())
        with self._gather_parameters(list(self._model.parameters())):
            return copy_tensors(self._model.state_dict())

    def moments(self) -> Tensors:
        """A copy of the full optimizer state on the CPU, with keys "parameter.moment"; a collective call."""
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
                value = self._utils.safe_get_full_optimizer_state(parameter, key)
                moments[f"{name}.{key}"] = value.detach().cpu().reshape(self._full_shape(parameter)).clone()
        return moments

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Loads a checkpoint's tensors; each rank loads its shard."""
        with self._gather_parameters(
            list(self._model.parameters()), modifier_rank=0, enabled=self._stage == WEIGHT_SHARDING_STAGE
        ):
            self._model.load_state_dict(weights)
        if self._stage == 0:
            restore_moments(self._model, self.engine.optimizer, moments)
            return
        step_counts = [value for name, value in moments.items() if name.endswith(".step")]
        if step_counts:
            self._prepare_moments(step_counts[0])
        for name, parameter in self._model.named_parameters():
            self._load_tensor(parameter, weights[name])
            for key in MOMENTS if step_counts else ():
                self._load_tensor(parameter, moments[f"{name}.{key}"], key)

    def best_model(self, best: Tensors) -> nn.Module:
        """A new model without DeepSpeed, with the best weights."""
        model: nn.Module = type(self._model)(self._model.config)
        model.load_state_dict(best)
        return model.to(self.engine.device)

    def _prepare_moments(self, step: Tensor) -> None:
        """Creates the optimizer's state, which DeepSpeed would create only in the first step."""
        optimizer = self.engine.optimizer
        sharded = self._stage == WEIGHT_SHARDING_STAGE
        groups = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
        for flat in groups:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            optimizer.optimizer.state[flat] = {"step": step.clone(), **zeros}
        self._link_moments()

    def _link_moments(self) -> None:
        """Links every parameter to its moments.

        DeepSpeed does this itself after the first step of the first parameter group, but misses the second group.
        """
        if self._stage < WEIGHT_SHARDING_STAGE:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_tensor(self, parameter: _Parameter, value: Tensor, moment: str | None = None) -> None:
        """Loads this rank's shard of a full tensor into the parameter, or into one of its moments."""
        utils, value = self._utils, value.to(self.engine.device)
        if self._stage == WEIGHT_SHARDING_STAGE:
            # DeepSpeed's own function for full tensors fails if their size is not a multiple of the number of ranks.
            shard_size = parameter.ds_tensor.numel()
            flat = nn.functional.pad(value.reshape(-1), (0, shard_size * self._world.size - value.numel()))
            shard = flat.narrow(0, shard_size * self._world.rank, shard_size)
            if moment:
                utils.safe_set_local_optimizer_state(parameter, shard, moment)
            else:
                utils.safe_set_local_fp32_param(parameter, shard)
        elif moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)

    def _full_shape(self, parameter: _Parameter) -> torch.Size:
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
    """Selects DeepSpeed's CPU accelerator if there is no GPU.

    Without it, importing deepspeed, as some transformers models do, prints a warning to stdout.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _import_deepspeed() -> ModuleType:
    set_accelerator()
    try:
        import deepspeed  # type: ignore[import-untyped]
    except ImportError as error:
        remedy = "pip install 'cappy-scorer[train]', or --parallelism ddp"
        raise ConfigError(f"--parallelism deepspeed: DeepSpeed cannot be imported ({error}); {remedy}") from error
    # Otherwise every rank on a CPU compiles an extension that gloo does not need. If that build is killed, it leaves a
    # lock that blocks the next build forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # Otherwise every rank logs its whole configuration.
    module: ModuleType = deepspeed
    return module
