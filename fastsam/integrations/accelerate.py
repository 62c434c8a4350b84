"""A loop with Accelerate."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from fastsam import GSAM, SAM, LookSAM, freeze_bn_stats
from fastsam.checks import params_of
from fastsam.distributed import average_gradients, ddp_of
from fastsam.phase import restoring
from fastsam.variants import refuse_micro_batches

SINGLE = (DistributedType.NO,)
REPLICATED = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def both_passes(accelerator: Accelerator, model: nn.Module, optimizer: Any,
                backward: Callable[[], Tensor], micro_batches: int | None = None) -> Tensor:
    """The gradients of a SAM step, on one batch or micro-batch: the pass at w, the climb, and the
    pass at w + e with BatchNorm's statistics frozen. Clip and call `optimizer.step()` afterwards,
    as without SAM. A step that does not climb (`interval`, `start`) is one pass; Momentum-SAM's
    is one at the moved weights, to which it climbs before an update's first micro-batch.

    With gradient accumulation each micro-batch climbs by itself (m-sharpness), under
    DistributedDataParallel by the gradient of this process alone, and the sum of the second
    gradients is averaged over the processes before the update.

    Args:
        accelerator: whose scaler is used, if it has one.
        model: as `accelerator.prepare` gave it.
        optimizer: a fastsam optimizer, as `accelerator.prepare` gave it.
        backward: computes the loss, calls `accelerator.backward` and returns the loss; called once
            for each pass.
        micro_batches: in one update; by default `accelerator.gradient_accumulation_steps`.

    Returns:
        The loss of the first pass.

    Raises:
        TypeError: another optimizer.
        ValueError: gradient accumulation over processes that hold no replicas (FSDP), or with a
            `model` that does not average over them; DeepSpeed.
        PhaseError: gradient accumulation with GSAM or LookSAM, which do not climb by parts; the
            last climb was not stepped from.
    Where a pass raises, the whole update is given up, as by `SAM.restore`: the weights are back.
    """
    sam = sam_of(optimizer)
    accumulates = (micro_batches or accelerator.gradient_accumulation_steps) > 1
    check_processes(accelerator.distributed_type, accumulates and not sam.climbs_first)
    if accumulates and isinstance(sam, (GSAM, LookSAM)):
        refuse_micro_batches(sam)
    ddp = replicas(accelerator, model) if accumulates and not sam.climbs_first else None
    if not sam.climbs_first:
        sam._phase.need(False, "both_passes")
    with restoring(sam.restore):
        if sam.climbs_first or not sam.climbs_next:
            return only_pass(accelerator, sam, backward)
        with first_pass(sam, ddp):
            loss = backward()
        sam.first_step(zero_grad=True, scaler=accelerator.scaler)
        with freeze_bn_stats(model):
            backward()
        if accumulates:
            sam.stash_grad()
            if accelerator.sync_gradients:
                sam.unstash_grad()
                if ddp is not None:
                    average_gradients(params_of(sam.param_groups), ddp.process_group)
    return loss


def only_pass(accelerator: Accelerator, sam: SAM, backward: Callable[[], Tensor]) -> Tensor:
    """The pass of a step that has one: Momentum-SAM's, or where a step does not climb."""
    if sam.climbs_next and not sam.is_perturbed:
        sam.first_step(scaler=accelerator.scaler)
    return backward()


def sam_of(optimizer: Any) -> SAM:
    """The fastsam optimizer inside Accelerate's wrapper."""
    sam = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(sam, SAM):
        raise TypeError(f"the optimizer is of {type(sam).__name__}, which has no second pass: give "
                        "one of fastsam's, such as fastsam.SAM (SAMTrainer takes it as "
                        "optimizer_cls_and_kwargs)")
    return sam


def check_processes(kind: DistributedType, accumulates: bool) -> None:
    if kind == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed keeps weights and gradients in buffers of its own, where no "
                         "climb reaches them: use FSDP2 (torch.distributed.fsdp.fully_shard)")
    if accumulates and kind not in SINGLE + REPLICATED:
        raise ValueError(f"gradient accumulation with distributed_type={kind.value} adds up "
                         "gradients before they are reduced, so a micro-batch cannot climb by "
                         "itself: use gradient_accumulation_steps=1 and a larger batch")


def replicas(accelerator: Accelerator,
             model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """What averages over the processes; None where there is one process."""
    ddp = ddp_of(model)
    if ddp is None and accelerator.num_processes > 1:
        raise ValueError(f"model is a {type(model).__name__}: gradient accumulation over "
                         f"{accelerator.num_processes} processes needs what "
                         "accelerator.prepare(model) returned, a DistributedDataParallel")
    return ddp


def first_pass(sam: SAM, ddp: nn.parallel.DistributedDataParallel | None,
               ) -> AbstractContextManager[None]:
    return nullcontext() if ddp is None else sam.local_first_pass(ddp)
