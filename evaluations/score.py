"""From images to metrics: extract features as the images come, then compare with a reference.

    scorer = Scorer(reference, extractor)
    for images, labels, indices in batches:
        scorer.add(images, labels, indices)
    result = scorer.result()

Under `accelerate launch` each process adds its share; the result is that of one process.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from evaluations import metrics, projection
from evaluations.classifier import accuracy
from evaluations.collect import Array, Collected, Collector
from evaluations.features import Extractor
from evaluations.reference import Reference
from runtime import progress
from runtime.arithmetic import exact_arithmetic
from runtime.errors import require
from runtime.launch import on_main
from runtime.slices import slices
from runtime.streams import Stream
from sampling.sampler import Sampler

FEW = 10_000
NAMES = {("inception", "fd"): "fid", ("inception", "sfd"): "sfid"}  # the names that only Inception's features deserve


class Scorer:
    """Metrics of images that arrive in batches, against a reference. Only features are kept; nothing is written.

    precision_recall_mode: "adm_fp16" or "fp32" (metrics.precision_recall); None takes ADM's for the features ADM uses,
    and the exact one for all others. shuffle: a seed to shuffle by before the Inception Score is cut into chunks.
    mind: compute MIND too, which needs features of single images. Raises UserError if the reference holds only
    statistics.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        *,
        accelerator: Accelerator | None = None,
        precision_recall_mode: str | None = None,
        shuffle: int | None = None,
        mind: bool | None = None,
    ) -> None:
        reference.require(extractor)
        require(
            not mind or reference.pool is not None,
            f"--mind compares single images, and {reference.name} holds statistics alone: "
            f"give a reference with images or features, or leave it out",
        )
        self.mind = bool(mind)
        self.reference, self.extractor, self.accelerator = reference, extractor, accelerator
        self.precision_recall_mode = precision_recall_mode or ("adm_fp16" if extractor.name == "inception" else "fp32")
        self.shuffle = shuffle
        self._collector = Collector(extractor, accelerator)
        # Projected statistics of the samples and of the reference that were compared last (`projection.pack`), on the
        # main process.
        self.projected: dict[str, Tensor] = {}

    def add(self, images: Array, labels: Array | None, indices: Array) -> None:
        """Add images, uint8 (n, H, W, C); see Collector.add. Raises UserError unless they have the reference's size."""
        self.reference.require_shape("the samples", tuple(images.shape[1:]))
        self._collector.add(images, labels, indices)

    def result(self) -> dict[str, Any]:
        """The content of metrics.json, the same on every process. Every process must call it."""
        return self.compare(self._collector.collect())

    def compare(self, samples: Collected) -> dict[str, Any]:
        """The metrics of collected features. The main process computes them; all processes return them."""
        if self.accelerator is None:
            return self._compare(samples)
        return on_main(self.accelerator, lambda: self._compare(samples))

    def _compare(self, samples: Collected) -> dict[str, Any]:
        reference, device = self.reference, self.extractor.device
        values = {"fd": metrics.frechet(samples.statistics, reference.statistics)}
        both = [projection.project(each.statistics, self.extractor.name) for each in (samples, reference)]
        self.projected = projection.pack(both[0], "samples.") | projection.pack(both[1], "reference.")
        if samples.spatial is not None and reference.spatial is not None:
            values["sfd"] = metrics.frechet(samples.spatial, reference.spatial)
        if self.extractor.head is not None:
            values["is"] = metrics.inception_score(self._logits(samples.pool, self.extractor.head.T.cpu()))
        # these compare single images, so the reference needs features, not only statistics
        if reference.pool is not None:
            x, r = samples.pool.to(device), reference.pool.to(device)
            if self.mind:
                values["mind"] = metrics.mind(x, r)
            values["precision"], values["recall"] = metrics.precision_recall(x, r, mode=self.precision_recall_mode)
            if samples.labels is not None and reference.labels is not None:
                values["class_accuracy"] = metrics.class_accuracy(x, samples.labels, r, reference.labels)
        if reference.classifier is not None and samples.labels is not None:
            values["classifier_accuracy"] = accuracy(
                reference.classifier.weight, reference.classifier.bias, samples.pool, samples.labels
            )
        return {
            "metrics": {NAMES.get((self.extractor.name, name), name): value for name, value in values.items()},
            "projected": {"fd": metrics.frechet(*both), "width": len(samples.statistics.mean)},
            "num_samples": samples.count,
            "warnings": self._warnings(samples),
            "reference": reference.describe(),
            "features": {"name": self.extractor.name, "weights_sha256": self.extractor.weights},
            "precision_recall": {"mode": self.precision_recall_mode, "k": metrics.NEIGHBOURS},
            "processes": 1 if self.accelerator is None else self.accelerator.num_processes,
            "device": device.type,
            "order": "as given" if self.shuffle is None else f"shuffled by seed {self.shuffle}",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        }

    def _warnings(self, samples: Collected) -> list[str]:
        warnings = [self.extractor.note] if self.extractor.note else []
        if samples.count < FEW:
            warnings.append(
                f"{samples.count} samples: the Frechet distance is biased upwards at so few, "
                f"compare it only with others of {samples.count} samples"
            )
        elif samples.count != 50_000 and self.extractor.name == "inception":
            warnings.append(f"{samples.count} samples: published FIDs are of 50000")
        if (
            self.extractor.head is not None
            and self.shuffle is None
            and samples.labels is not None
            and (samples.labels.diff() >= 0).all()
            and samples.labels[0] != samples.labels[-1]
        ):
            warnings.append("the samples are sorted by class, which lowers the Inception Score: give --shuffle SEED")
        return warnings

    def _logits(self, pool: Tensor, head: Tensor) -> Tensor:
        order = torch.arange(len(pool))
        if self.shuffle is not None:
            order = torch.from_numpy(Stream(self.shuffle, "inception score").permutation(len(pool)))
        with exact_arithmetic():
            return torch.cat([part @ head for part in pool[order].split(metrics.CHUNK)])


def add_drawn(scorer: Scorer, sampler: Sampler, count: int, batch_size: int, title: str = "sampling") -> None:
    """Draw samples 0 .. count - 1, each process its share, and add them."""
    accelerator = scorer.accelerator
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    start, stop = count * rank // processes, count * (rank + 1) // processes
    with progress.bar(total=stop - start, desc=f"{title} {count}", unit="image", main=rank == 0, leave=False) as bar:
        for indices, labels, images in sampler.stream(slices(range(start, stop), batch_size)):
            scorer.add(images, labels, np.array(indices))
            bar.update(len(indices))
