"""What a run's settings cannot be together, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.settings.methods import FULL, OTHER_IMAGES, WHOLE_BATCH
from bench.settings.setting import check_settings

if TYPE_CHECKING:
    from bench.settings.config import Config


def check(config: Config) -> None:
    check_settings(config)
    if config.nesterov and (config.momentum == 0 or "adamw" in (config.optimizer, config.base)):
        raise ValueError(
            f"nesterov has no effect on momentum {config.momentum} of {config.optimizer} with base "
            f"{config.base}; it needs SGD with momentum"
        )
    if config.optimizer == "msam" and config.base == "sgd" and config.momentum == 0:
        raise ValueError("msam climbs along SGD's momentum, of which momentum 0.0 leaves nothing; "
                         "use momentum 0.9, or base adamw")  # fmt: skip
    check_starts(config)
    check_processes(config)
    check_other_images(config)
    check_graph(config)
    if config.amp == "fp16" and (config.attack is not None or config.awp_gamma):
        raise ValueError(
            "amp 'fp16' scales the loss of the optimizer's passes alone, and small gradients of "
            "attacks and of awp_gamma would become 0; use bf16 or off"
        )
    from bench.devices import usable_device

    usable_device(config.device)


def check_starts(config: Config) -> None:
    """Raise ValueError for what would begin after the last epoch."""
    if config.late_epoch >= config.epochs:
        raise ValueError(f"late {config.late:g} of {config.epochs} epochs leaves none that climbs; "
                         "lower late, or raise epochs")  # fmt: skip
    if config.awp_gamma and config.awp_warmup >= config.epochs:
        raise ValueError(f"awp_warmup {config.awp_warmup} of {config.epochs} epochs leaves none "
                         "that perturbs the weights; lower it, or raise epochs")  # fmt: skip


def check_processes(config: Config) -> None:
    for name in ("sync_bn", "local_ascent"):
        if getattr(config, name) and config.processes == 1:
            raise ValueError(f"{name} has no effect in one process; start several with torchrun")
    if config.sync_bn and config.device.partition(":")[0] == "cpu":
        raise ValueError("sync_bn needs GPUs, torch has it for no CPU; leave it out")
    if config.local_ascent and (
        config.rho is None or config.sigma is not None or config.optimizer in WHOLE_BATCH
    ):
        raise ValueError(
            f"local_ascent is not for {config.method!r}: it needs a first pass, and no state of "
            "it, of which every process would have another; use sam or asam"
        )


def check_graph(config: Config) -> None:
    """Raise ValueError for steps that fastsam.GraphedStep does not make."""
    if not config.graph:
        return
    if config.device.partition(":")[0] == "cpu":
        raise ValueError("graph is for CUDA devices; add device cuda, or leave it out")
    others = {
        "processes": config.processes > 1, "amp 'fp16'": config.amp == "fp16",
        "awp_gamma": config.awp_gamma > 0, "second_bn 'moving'": config.second_bn == "moving",
        "ascent_part": config.ascent_part < 1, "ascent_batches": config.ascent_batches > 1,
        "micro": config.micro > 1, "trades": config.adversary == "trades",
        config.optimizer: config.optimizer in OTHER_IMAGES,
    }
    if found := [name for name, used in others.items() if used]:
        raise ValueError(
            f"graph holds one batch's two passes and the update, nothing of {', '.join(found)}; "
            "leave out the graph"
        )


def check_other_images(config: Config) -> None:
    if config.optimizer not in OTHER_IMAGES:
        return
    if config.adversary is not None:
        raise ValueError(
            f"{config.optimizer} climbs by other images than the batch's, which are not attacked: "
            "leave out the adversary, or use sam"
        )
    if config.amp == "fp16" and config.optimizer in FULL:
        raise ValueError(f"amp 'fp16' does not scale {config.optimizer}'s G; use bf16 or off")
