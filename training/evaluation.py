"""Scores during training: a few thousand samples from EMA weights against a reference, every so many steps."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from config import TrainConfig
from evaluations.evaluate import open_pair
from evaluations.score import Scorer, add_drawn
from models import Backbone
from models.latents import Codec
from sampling import Sampler, image_shape
from training.preview import SETTINGS

BATCH = 64  # samples per network call in each process


class Evaluation:
    """Reference and extractor, opened once before the first step, so that what is missing is missed then.

    Args:
        latent: (C, H, W) of the network's latents.

    Raises:
        UserError: a reference, weights or images that do not fit (see evaluations.evaluate).
    """

    def __init__(self, config: TrainConfig, codec: Codec, accelerator: Accelerator,
                 latent: tuple[int, ...]) -> None:
        self.config, self.codec, self.accelerator = config, codec, accelerator
        self.reference, self.extractor = open_pair(config.eval_reference, config.eval_features, accelerator,
                                                   inception_weights=config.inception_weights,
                                                   feature_weights=config.feature_weights)
        self.reference.require_shape("the samples", image_shape(codec, latent, accelerator.device))

    def measure(self, network: Backbone, dtype: torch.dtype | None) -> dict[str, float]:
        """Metrics by name and sample count (`eval/fid@5000`): numbers of other counts are other metrics.

        The same noise and labels every time. To be called by every process.
        """
        count = self.config.eval_samples
        scorer = Scorer(self.reference, self.extractor, accelerator=self.accelerator)
        add_drawn(scorer, Sampler(network, self.codec, SETTINGS, count, dtype), count, BATCH, "evaluation: sampling")
        return {f"eval/{name}@{count}": value for name, value in scorer.result()["metrics"].items()}
