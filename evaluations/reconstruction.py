"""How well an autoencoder restores images: PSNR, and the Frechet distance of what it decodes to the images themselves.

    python -m evaluations.reconstruction --vae pretrained/vae-fashion --images data/fashion/test --grey \\
        --features timm:mobilenetv2_100@96 --feature-weights mobilenet_v2-b0353104.pth --card

Posterior means are decoded. PSNR is the mean over images of each image's own, on 0..255. With Inception's features and
the validation images of ImageNet, the distance is the rFID of the literature. `--card` writes the model card of an
autoencoder that `preprocessing.train_vae` trained (README.md in its folder).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import FeatureOptions
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import group, option, read
from runtime.text import code

if TYPE_CHECKING:
    import torch

    from evaluations.features import Extractor
    from evaluations.images import Images
    from models.latents import Codec

TRAINING = "training.json"  # of preprocessing.train_vae


@dataclass(frozen=True, kw_only=True)
class Options:
    vae: str = option(help="autoencoder: hub id or folder of diffusers", heading="what to measure")
    images: str = option(help="images: folder, ZIP, .npz or latent set with its images")
    resolution: int | None = option(None, within="[1, inf)", help="crop and scale image files to this size")
    grey: bool = option(False, help="one channel instead of RGB, of image files")
    scores: FeatureOptions = group(FeatureOptions, without=("mind",))
    batch_size: int = option(64, within="[1, inf)", help="images at a time")
    card: bool = option(False, help="write the model card of an autoencoder that preprocessing.train_vae trained")
    data_licence: str | None = option(None, help="the card's words on source and licence of the training images")

    def __post_init__(self) -> None:
        require(
            not self.card or (Path(self.vae) / TRAINING).is_file(),
            f"--card describes a training, and {self.vae} has no {TRAINING}: give a folder of preprocessing.train_vae",
        )
        require(self.data_licence is None or self.card, "--data-licence stands on the card: give --card too")


def measure(
    codec: Codec, images: Images, extractor: Extractor, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """PSNR in dB, the Frechet distance, and images encoded and decoded per second."""
    import torch

    from evaluations.metrics import Moments, frechet
    from models.pixels import to_signed, to_uint8
    from preprocessing.quality import psnr

    real, restored = Moments(), Moments()
    ratios: list[np.ndarray] = []
    seconds = [0.0, 0.0]
    with progress.bar(total=len(images), desc="reconstructing", unit="image") as bar:
        for batch in images.batches(range(len(images)), batch_size):
            originals = torch.from_numpy(batch).to(device)
            start = time.perf_counter()
            mean = codec.encode(to_signed(originals))[0]
            middle = time.perf_counter()
            decoded = to_uint8(codec.decode(codec.space.normalise(mean)))
            seconds[0] += middle - start
            seconds[1] += time.perf_counter() - middle
            ratios.append(psnr(decoded.cpu().numpy(), batch))
            real.add(extractor(originals).pool)
            restored.add(extractor(decoded).pool)
            bar.update(len(batch))
    return {
        "psnr": float(np.concatenate(ratios).mean()),
        "fd": frechet(restored.statistics(), real.statistics()),
        "encoded_per_second": len(images) / seconds[0],
        "decoded_per_second": len(images) / seconds[1],
    }


def card(options: Options, values: dict[str, Any], count: int) -> str:
    """The text of the model card."""
    from runtime import launch

    about = files.read_json(Path(options.vae) / TRAINING)
    settings = about["settings"]
    words = " ".join(
        f"--{key.replace('_', '-')}"
        + ("" if value is True else f" {' '.join(map(str, value))}" if isinstance(value, list) else f" {value}")
        for key, value in settings.items()
        if value is not None and value is not False and key != "images"
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    stride = 2 ** (len(settings["widths"]) - 1)
    channels = "grey" if settings["grey"] else "RGB"
    lines = [
        f"# {Path(options.vae).resolve().name}",
        "",
        f"A diffusers `AutoencoderKL` of {about['parameters']:,} parameters for {channels} images of "
        f"{settings['resolution']} x {settings['resolution']} pixels: stride {stride}, {settings['latent_channels']} "
        "latent channels. Its config holds shift and scale of the latents (`latents_mean`, `latents_std`), measured on "
        "the training images.",
        "",
        f"| on {count:,} images of {code(Path(options.images).name)} that the training did not see | |",
        "| --- | ---: |",
        f"| PSNR of the posterior means, mean over images | {values['psnr']:.2f} dB |",
        f"| Frechet distance to the images, {options.scores.features} | {values['fd']:.3f} |",
        f"| encoded, decoded per second on {values['device']} | {values['encoded_per_second']:,.0f}, "
        f"{values['decoded_per_second']:,.0f} |",
        "",
        f"Measured on {datetime.date.today().isoformat()} at commit {launch.commit()} on {launch.device_name()}, in "
        "float32.",
        "",
        f"Trained on {about['count']:,} images of {code(about['images'])} by `preprocessing.train_vae` with",
        "",
        f"    {words}",
        "",
        f"at commit {about['commit']}, {about['threads']} thread(s) on {about['device']}, {versions}.",
    ]
    if options.data_licence is not None:
        lines += ["", f"Training images: {options.data_licence}"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; returns the numbers."""
    options = read(Options, argv, prog="python -m evaluations.reconstruction", description=__doc__)
    import torch

    from evaluations.extractors import open_extractor
    from evaluations.images import open_images
    from models.vae import open_codec

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec, images = (
        open_codec(options.vae, device=device),
        open_images(options.images, options.resolution, options.grey),
    )
    require(
        images.shape[2] == codec.image_channels and images.shape[0] % codec.space.stride == 0,
        f"{options.images}: images of {' x '.join(map(str, images.shape))} do not suit {options.vae}, which takes "
        f"{codec.image_channels} channel(s) and sides that are multiples of {codec.space.stride}; --grey and "
        f"--resolution change image files",
    )
    extractor = open_extractor(options.scores, device)
    values = measure(codec, images, extractor, options.batch_size, device)
    values["device"] = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    )
    if options.card:
        with files.replacing(Path(options.vae) / "README.md") as temporary:
            temporary.write_text(card(options, values, len(images)), encoding="utf-8")
    print(
        f"{len(images):,} images: PSNR {values['psnr']:.2f} dB, Frechet distance {values['fd']:.3f} "
        f"({extractor.name}); {values['encoded_per_second']:,.0f} encoded and {values['decoded_per_second']:,.0f} "
        f"decoded a second"
    )
    return values


if __name__ == "__main__":
    errors.run(main)
