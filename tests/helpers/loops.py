"""Small loops of training, and one image augmented by hand."""

from dataclasses import replace

import numpy as np
import torch

from bench.settings.config import resolve
from bench.speed import training_loops

METHODS = ["sgd", "sam", "asam", "fsam", "fasam", "at-linf", "at-l2"]
RELATIVES = ["msam", "looksam", "gsam"]
OPTIONS = training_loops.Options(images=48, image_size=8, workers=0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def one_image(image, i, moved, augmentation, fill, levels):
    """Augment image (C, H, W) by the i-th decision, in numpy: pad, slice, mirror, overwrite."""
    _, h, w = image.shape
    pad = augmentation.pad
    mode = {"reflect": "reflect", "zero": "constant"}[augmentation.padding]
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode)
    top, left = pad + int(moved.down[i]), pad + int(moved.right[i])
    out = padded[:, top : top + h, left : left + w]
    if augmentation.flip and moved.mirrored[i]:
        out = out[:, :, ::-1]
    out = out.astype(np.float32) / np.float32(levels)
    if augmentation.cutout and moved.cut[i]:
        for y in range(h):
            for x in range(w):
                from_top = y - (int(moved.cut_row[i]) - augmentation.cutout // 2)
                from_left = x - (int(moved.cut_col[i]) - augmentation.cutout // 2)
                if 0 <= from_top < augmentation.cutout and 0 <= from_left < augmentation.cutout:
                    out[:, y, x] = fill
    return out


def tiny_config(method, **options):
    options = {"model": "smallconv", "width": 4, "batch_size": 8, "attack_steps": 3, "lr": 0.3,
               "momentum": 0.8, "weight_decay": 0.05, "channels_last": True} | options  # fmt: skip
    if not method.startswith("at"):
        options.pop("attack_steps")
    return replace(resolve(method, "sam-at-cifar10", options), data="random")
