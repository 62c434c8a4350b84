"""What `bench step` and `bench throughput` measure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.settings.methods import PLAIN
from bench.settings.setting import check_settings, setting

if TYPE_CHECKING:
    from bench.data.augmentation import Augmentation
    from bench.settings.config import Config

METHODS = ("sgd", "sam", "asam", "fsam", "fasam")
STEPPED = (*METHODS, "msam", "gsam", "looksam")  # LookSAM's every k-th step, which does the most
# Loops beside "fast": with a per-parameter SAM (SAM methods only); in float32; in float32 and NCHW;
# without torch.compile; as one CUDA graph; and the plain recipe.
BESIDE = ("eager", "fp32", "fp32-nchw", "uncompiled", "graph", "plain")
TENSORS = 62  # as ResNet-18's


@dataclass(frozen=True)
class StepConfig:
    """What `python -m bench step` measures.

    keep_memory: in a training loop that has freed larger tensors than an optimizer's, the C library
    keeps freed memory; temporaries of a fresh process come from the system each time, zeroed page
    by page, which can take longer than filling them.

    Raises ValueError for an unknown name, a number below 1, options of a model and of params at
    once, more tensors than params, or a graph without a CUDA device.
    """

    model: str | None = setting(
        None, "a network of train's, or torchvision's resnet50, vit_b_16, ... of 10 classes",
        default="preactresnet18",
    )
    width: int | None = setting(
        None, "64: as published; others scale all channels (smallconv: the first layer's channels)",
        bounds="[1, inf)",
    )
    params: int | None = setting(None, "instead of a model: so many parameters", bounds="[1, inf)")
    tensors: int | None = setting(
        None, "with --params: in so many equal tensors", bounds="[1, inf)", default=f"{TENSORS}"
    )
    methods: tuple[str, ...] = setting(
        METHODS, f"of {', '.join(STEPPED)}", choices=STEPPED, metavar="METHOD...",
        default=" ".join(METHODS),
    )
    base: str = setting("sgd", "the optimizer under SAM", choices=PLAIN)
    dtype: str = setting("fp32", "of weights and gradients", choices=("fp32", "bf16"))
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    compile: bool | None = setting(
        None, "also time the per-parameter peers through torch.compile", default="on a GPU"
    )
    graph: bool = setting(False, "replay each pass as a CUDA graph")
    keep_memory: bool = setting(
        False, "let the C library keep freed memory, as it does in a training loop (glibc)"
    )
    reps: int | None = setting(
        None, "timed steps, for no more than about a minute", bounds="[1, inf)",
        default="20, on a GPU 100",
    )
    threads: int | None = setting(None, "CPU threads", bounds="[1, inf)", default="torch's choice")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.params is None and self.tensors is not None:
            raise ValueError(f"{self.tensors} tensors of how many parameters? Give --params too")
        if self.params is not None and (self.model or self.width):
            raise ValueError(f"{self.params} parameters have no model or width; leave them out")
        if self.params is not None and self.params < (self.tensors or TENSORS):
            raise ValueError(
                f"{self.params} parameters cannot fill {self.tensors or TENSORS} tensors; "
                "pass fewer --tensors"
            )
        if self.graph:
            from bench.devices import usable_device

            if usable_device(self.device).type != "cuda":
                raise ValueError(
                    f"a graph needs a CUDA device, not {self.device!r}; leave --graph out"
                )


@dataclass(frozen=True)
class Options:
    """How `python -m bench throughput` measures. Raises ValueError for a number out of its bounds
    or an unknown name."""

    images: int = setting(50_000, "random images in the training set", bounds="[1, inf)")
    image_size: int = setting(32, "their pixels", bounds="[1, inf)")
    padding: str = setting("reflect", "what surrounds the image", choices=("reflect", "zero"))
    cutout: int = setting(0, "side of a square that half of the images lose", bounds="[0, inf)")
    workers: int = setting(2, "the plain recipe's loader processes", bounds="[0, inf)")
    steps: int | None = setting(
        None, "in a turn; of methods that do not always climb, whole periods", bounds="[1, inf)",
        default="1, on a GPU 30, or the next whole period",
    )
    turns: int = setting(5, "of each loop", bounds="[1, inf)")
    compile: bool = setting(False, "torch.compile the model")
    tf32: bool | None = setting(None, "allow or forbid TF32", default="as torch has it")
    beside: tuple[str, ...] = setting(
        ("eager", "plain"), f"of {', '.join(BESIDE)}", choices=BESIDE, metavar="LOOP...",
        may_be_empty=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def augmentation(self, config: "Config") -> "Augmentation | None":
        from bench.data.augmentation import Augmentation

        if config.augment == "none":
            return None
        return Augmentation(config.pad, self.padding, config.augment == "crop-flip", self.cutout)
