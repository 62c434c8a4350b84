"""The Trainer of transformers."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from .accelerate import both_passes


class SAMTrainer(Trainer):
    """A Trainer that takes both passes of a fastsam optimizer.

    Give it the optimizer through `optimizer_cls_and_kwargs=(fastsam.SAM,
    dict(base_optimizer=torch.optim.AdamW, lr=..., rho=...))`; everything else is as with Trainer.
    With `gradient_accumulation_steps` each micro-batch climbs by itself (m-sharpness). The loss
    that is logged is that of the first pass.

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
