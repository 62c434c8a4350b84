"""Lightning's automatic optimisation."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning
import torch

from fastsam import SAM, freeze_bn_stats


class SAMModule(lightning.LightningModule):
    """A LightningModule whose second passes leave BatchNorm's statistics alone.

    Return a fastsam optimizer from `configure_optimizers`. `training_step` runs twice per batch,
    the second time where `self.second_pass` is true: log only where it is not. Momentum-SAM's only
    pass is no second one.

    Raises:
        ValueError: at the start of fit, and at a step, what would train something else without a
            word: `accumulate_grad_batches` above 1 (which Lightning's GradientAccumulationScheduler
            sets in mid-training), and float16 with a GradScaler.
    """

    second_pass = False

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any,
                       optimizer_closure: Callable[[], Any] | None = None) -> None:
        self._refuse_other_training()
        sam = getattr(optimizer, "optimizer", optimizer)

        def closure() -> Any:
            self.second_pass = (isinstance(sam, SAM) and sam.is_perturbed
                                and not sam.climbs_first)
            try:
                with freeze_bn_stats(self) if self.second_pass else nullcontext():
                    # the backward too, which may recompute
                    return optimizer_closure() if optimizer_closure else None
            finally:
                self.second_pass = False

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def clip_gradients(self, optimizer: Any, *given: Any, **more: Any) -> None:
        """As Lightning's, which without a scaler, too, refuses an optimizer that unscales by
        itself."""
        sam = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(sam, SAM) or self.fabric is not None or self._scaler is not None:
            super().clip_gradients(optimizer, *given, **more)
            return
        sam._step_supports_amp_scaling = False
        try:
            super().clip_gradients(sam, *given, **more)
        finally:
            del sam._step_supports_amp_scaling

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.automatic_optimization:
            self._refuse_other_training()

    def _refuse_other_training(self) -> None:
        """Refuse, in automatic optimisation, what would train something else without a word."""
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} would update with "
                "the last micro-batch alone, since a closure's step starts from cleared gradients: "
                "use manual optimisation with one closure over all micro-batches")
        if self._scaler is not None:
            raise ValueError(
                f"precision={self.trainer.precision!r} calls the closure once, before the "
                "optimizer, which would train with the base optimizer alone: use 'bf16-mixed'")
