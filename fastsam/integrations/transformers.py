"""The Trainer of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
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

    Beside another subclass of Trainer it comes last, as in `class Mine(SFTTrainer, SAMTrainer)`:
    that one's `training_step` is run once a step then, its `compute_loss` in both passes.

    Raises:
        TypeError: at the first step, another optimizer.
        ValueError: at the first step, DeepSpeed, or gradient accumulation over FSDP.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any],
                      num_items_in_batch: Tensor | int | None = None) -> Tensor:
        def backward() -> Tensor:
            return super(SAMTrainer, self).training_step(model, inputs, num_items_in_batch)

        with self._prepared_once(inputs):
            return both_passes(self.accelerator, model, self.optimizer, backward,
                               self.args.gradient_accumulation_steps)

    @contextmanager
    def _prepared_once(self, inputs: Any) -> Iterator[None]:
        """Both passes are on the same batch, also where a trainer makes it in `_prepare_inputs`, as
        TRL's GRPOTrainer lets the model write there."""
        prepare, was = self._prepare_inputs, vars(self).get("_prepare_inputs")
        made: list[Any] = []

        def prepare_once(given: Any) -> Any:
            if given is not inputs:
                return prepare(given)
            if not made:
                made.append(prepare(given))
            return copy(made[0])  # from which `compute_loss` may take the labels out

        vars(self)["_prepare_inputs"] = prepare_once
        try:
            yield
        finally:
            if was is None:
                del vars(self)["_prepare_inputs"]
            else:
                vars(self)["_prepare_inputs"] = was

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """What `auto_find_batch_size` repeats. Between the passes and the step lie clipping and
        callbacks, and Momentum-SAM's micro-batches, which may raise too."""
        with restoring(self._restore):
            return super()._inner_training_loop(*args, **kwargs)

    def _restore(self) -> None:
        sam = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(sam, SAM):
            sam.restore()
