"""The options that probes and figures share. This file does not know tensors."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import require
from runtime.options import option

Kind = tuple[str, float | None]  # a feature and its omega: ("g", 10.0), ("u", None)
KINDS = ("u", "c", "g", "latents")


@dataclass(frozen=True, kw_only=True)
class TapOptions:
    """Which features of which checkpoints to read, and on which images."""

    ckpt: tuple[str, ...] = option(help="checkpoints: folders, runs (their latest), RUN@STEP", heading="what to read")
    data_dir: str = option(help="latent set with the images")
    weights: str = option("ema", help="weights: ema, raw or ema-DECAY")
    blocks: tuple[int, ...] | None = option(None, help="blocks, from 1 (default: all)")
    t: tuple[float, ...] = option((0.5,), within="[0, 1]", help="times, 1 is noise")
    features: tuple[str, ...] = option(("c", "g"), choices=KINDS, help="which features")
    omega: tuple[float, ...] = option((30.0,), within="[0, inf)", help="guidance scales of f_g")
    seed: int = option(0, help="seed of the choice of images, of their noise and of their split")
    batch_size: int = option(64, within="[1, inf)", help="images per pass through the network")
    encoder: str | None = option(None, help="an external encoder too: a vision transformer of timm, or a folder of one")
    encoder_weights: str | None = option(None, help="file of its weights (default: timm's, from the hub)")

    def __post_init__(self) -> None:
        require(
            self.encoder_weights is None or self.encoder is not None,
            "--encoder-weights belong to an encoder: give --encoder too",
        )

    def kinds(self) -> list[Kind]:
        """The features of blocks, each with its omega."""
        blocks = [kind for kind in ("u", "c", "g") if kind in self.features]
        return [(kind, omega) for kind in blocks for omega in (self.omega if kind == "g" else (None,))]
