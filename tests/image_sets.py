"""Small image sets and a small real autoencoder, for the tests of preprocessing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def photograph(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder: Path, classes: int = 3, per_class: int = 5) -> Path:
    """`classes` folders of pictures of different sizes and shapes."""
    for label in range(classes):
        (folder / f"n{label:02d}").mkdir(parents=True)
        for number in range(per_class):
            seed = label * per_class + number
            photograph(seed, 20 + 7 * seed, 60 - 2 * seed).save(folder / f"n{label:02d}" / f"{number}.png")
    return folder


def zipped(folder: Path, file: Path) -> Path:
    """The same set as one ZIP file."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return file


def tiny_vae(folder: Path, channels: int = 4) -> str:
    """A real `AutoencoderKL` of stride 4 with random weights, written by `save_pretrained`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        scaling_factor=0.18215, sample_size=16)
    vae.save_pretrained(folder)
    return str(folder)
