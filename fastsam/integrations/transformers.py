"""The Trainer of transformers."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from fastsam import SAM
from fastsam.phase import restoring

from .accelerate import both_passes


class SAMTrainer(Trainer):
    """A Trainer that takes both passes of a fastsam optimizer.

    Give it the optimizer through `optimizer_cls_and_kwargs=(fastsam.SAM,
    dict(base_optimizer=torch.optim.AdamW, lr=..., rho=...))`; everything else is as with Trainer.
    With `gradient_accumulation_steps` each micro-batch climbs by itself (m-sharpness). The loss
    that is logged is that of the first pass. Where training is broken off, by Ctrl-C, say, or out
    of memory, the weights are those of the last whole update; `auto_find_batch_size` begins again
    from them.

    Raises:
        TypeError: at the first step, another optimizer.
        ValueError: at the first step, DeepSpeed, or gradient accumulation over FSDP.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any],
                      num_items_in_batch: Tensor | int | None = None) -> Tensor:
        def backward() -> Tensor:
            return super(SAMTrainer, self).training_step(model, inputs, num_items_in_batch)

        return both_passes(self.accelerator, model, self.optimizer, backward,
                           self.args.gradient_accumulation_steps)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """What `auto_find_batch_size` repeats. Between the passes and the step lie clipping and
        callbacks, and Momentum-SAM's micro-batches, which may raise too."""
        with restoring(self._restore):
            return super()._inner_training_loop(*args, **kwargs)

    def _restore(self) -> None:
        sam = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(sam, SAM):
            sam.restore()
