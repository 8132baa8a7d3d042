"""Images per second of the step that a user runs, for every method, and with one switch changed at a time.

    python -m benchmarks.train_step --model SiT-B/2 --batch-size 256 --out benchmarks/results/train-SiT-B-2.json
    python -m benchmarks.train_step --rows plain --ablation
    python -m benchmarks.train_step --rows plain --peer ../REPA

It times the real loop's step: data, draws, forward, backward, clipping, AdamW, EMA, loss sums. The rows "batches" time
the data and draws alone: what the loader can deliver. LightningDiT networks come with their recipe (loss, optimiser)
and their latents. The teacher has random weights, which cost the same; so has the encoder of `repa` and `haste`, whose
images are decoded as in training. Rows are written to --out one by one; the same command continues after the last. MFU
counts only the student's products, three times its forward pass, not those of teachers or of recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, peer
from runtime import errors
from runtime.options import option
from training import command, cost, loop, saving
from training.log import Meter
from training.run import Run

# Every method, then the loader.
ROWS = {
    "plain": "",
    "stage 1": "--align latent",
    "stage 2": "--align-stop-steps 0",
    "stage 2, interval": "--align-stop-steps 0 --align-interval 0.4 0.7",
    "repa": "--align repa --align-encoder {encoder}",
    "haste": "--align haste --align-encoder {encoder}",
    "dispersive": "--align dispersive",
    "layersync": "--align layersync",
    "sra": "--align sra",
    "contrastive": "--align contrastive",
    "label code": "--align label-code",
    "internal": "--align internal",
    "self-flow": "--align self-flow",
    "dts-as": "--align self-flow --preset dts-as",
    "muon": "--optimizer muon",
    "route": "--route 3 6 0.5",
    "batches": "",
    "batches, images": "--align repa --align-encoder {encoder}",
}
ABLATION = {
    "without compilation": "--compile off",
    "combined kernels": "--compile combined",
    "float32": "--mixed-precision no",
    "without clipping": "--max-grad-norm 0",
    "latents on the device": "--resident device",
    "two micro-batches": "--gradient-accumulation-steps 2",
    "products kept": "--activation-checkpointing selective",
    "blocks computed twice": "--activation-checkpointing full",
    "deterministic": "--deterministic",
}
ENDLESS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    model: str = option("SiT-B/2", help="network")
    rows: tuple[str, ...] = option(tuple(ROWS), choices=tuple(ROWS), help="what to measure")
    ablation: bool = option(False, help="plain training with one switch changed at a time")
    peer: str | None = option(None, help="checkout of REPA: its loop beside plain training, in turns")
    batch_size: int = option(256, help="samples per step")
    steps: int = option(20, help="timed steps per repetition")
    repetitions: int = option(5, help="repetitions")
    warmup: int = option(10, help="steps before the first")
    latent_size: int | None = option(None, help="side of the generated latents (default: that of 256 pixels)")
    classes: int = option(1000, help="classes")
    items: int = option(4096, help="generated latents")
    encoder: str | None = option(None, help="folder of an encoder (default: DINOv2 ViT-B/14 with random weights)")
    mixed_precision: str | None = option(None, help="no or bf16 (default: that of a run)")
    compile: str | None = option(None, help="on, combined or off (default: that of a run)")
    out: str | None = option(None, help="result file")

    @property
    def lightning(self) -> bool:
        return self.model.startswith("LightningDiT")

    @property
    def side(self) -> int:
        return self.latent_size or (16 if self.lightning else 32)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("train_step", TrainStepConfig, argv, __doc__, rows, report)


def rows(config: TrainStepConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The rows that are not known yet."""
    bench = Bench(config, folder)
    wanted = {name: ROWS[name] for name in config.rows}
    if config.ablation:
        wanted |= ABLATION
    for name, words in wanted.items():
        if name not in known:
            yield name, bench.row(name, words)
    if config.peer and "REPA's loop" not in known:
        yield from bench.beside_peer().items()


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    plain = rows.get("plain", {}).get("images_per_second", {}).get("median")
    return measure.table(
        rows,
        {
            **measure.RATE,
            "of plain": lambda row: f"{row['images_per_second']['median'] / plain:.2f}",
            "MFU": lambda row: f"{row['mfu']:.3f}",
            "launches": lambda row: f"{row['launches']:.0f}",
            "host us": lambda row: f"{row['host_microseconds']:.0f}",
            "operators": lambda row: f"{row['operators']:.0f}",
            "peak GiB": lambda row: f"{row['peak_gib']:.1f}",
            "times faster": lambda row: f"{row['plain, times faster']['median']:.2f}",
        },
    )


class Bench:
    """Runs of one network on generated latents in `folder`."""

    def __init__(self, config: TrainStepConfig, folder: Path) -> None:
        self.config, self.folder, self.made = config, folder, 0

    def row(self, name: str, words: str) -> dict[str, Any]:
        """Rate, MFU, launches, host time and peak memory of one kind of run."""
        run = self.run(words, guided=name.startswith("stage 2"))
        if name.startswith("batches"):
            source = run.batches(ENDLESS)
            return self.rates({name: lambda: next(source)}, run)[name]
        step = training_step(run)
        row = self.rates({name: step}, run)[name]
        if run.device.type == "cuda":
            row["mfu"] = measure.mfu(row["images_per_second"]["median"], cost.estimate(run.config, {}).plain)
            row["attention"] = run.attention_note
        row |= {"peak_gib": measure.peak_memory(step, run.device), **measure.counts(step, run.device)}
        return {key: value for key, value in row.items() if value is not None}

    def rates(self, calls: dict[str, measure.Call], run: Run) -> dict[str, dict[str, Any]]:
        config = self.config
        rounds = {"steps": config.steps, "warmup": config.warmup, "repetitions": config.repetitions}
        return measure.alternate(calls, config.batch_size, run.device, **rounds)

    def beside_peer(self) -> dict[str, dict[str, Any]]:
        """Plain training and REPA's loop, in turns and in one precision."""
        config = self.config
        run = self.run("")
        ours = training_step(run)
        # wraps the learner, before the peer makes another Accelerator
        ours()
        batches = []
        for start in range(0, 4 * config.batch_size, config.batch_size):
            moments, labels = run.data.read(torch.arange(start, start + config.batch_size).numpy() % len(run.data))
            batches.append((torch.from_numpy(moments).flatten(1, 2)[:, None], torch.from_numpy(labels)))
        precision = "bf16" if run.dtype else "no"
        step = peer.TrainingStep(Path(config.peer), config.model, batches, config.classes, run.device, precision)
        rows = self.rates({"plain": ours, "REPA's loop": step}, run)
        return {"plain, beside REPA's loop": rows["plain"], "REPA's loop": rows["REPA's loop"]}

    def run(self, words: str, guided: bool = False) -> Run:
        """A run as `train.py` builds it, ready for its first step."""
        config = self.config
        common = self.common(images="{encoder}" in words)
        if guided:
            common += ["--guiding-ckpt", str(self.teacher())]
        self.made += 1
        encoder = self.encoder() if "{encoder}" in words else ""
        argv = [*common, "--exp-name", f"run{self.made}", *words.format(encoder=encoder).split()]
        given = {flag: getattr(config, flag) for flag in ("mixed_precision", "compile")}
        for flag, value in given.items():
            if value is not None and (name := f"--{flag.replace('_', '-')}") not in argv:
                argv += [name, value]
        return Run(*command.resolve(argv, "benchmarks.train_step", None, ("guided",) if guided else ()))

    def common(self, images: bool) -> list[str]:
        """Options of every run. Generates the latents at the first call."""
        config, data = self.config, self.folder / ("images" if images else "latents")
        if not data.exists():
            measure.latent_set(
                data,
                channels=32 if config.lightning else 4,
                side=config.side,
                classes=config.classes,
                items=max(config.items, config.batch_size),
                images=images,
            )
        recipe = ["--recipe", "lightningdit"] if config.lightning else []
        return [
            *recipe,
            "--data-dir",
            str(data),
            "--output-dir",
            str(self.folder / "exps"),
            "--model",
            config.model,
            "--batch-size",
            str(config.batch_size),
            "--max-train-steps",
            str(ENDLESS),
        ]

    def teacher(self) -> Path:
        """A checkpoint of the untrained network, which costs as much as a trained teacher."""
        folder = self.folder / "exps" / "teacher"
        if not folder.exists():
            argv = [*self.common(images=False), "--exp-name", "teacher"]
            run = Run(*command.resolve(argv, "benchmarks.train_step", None))
            run.step = 1
            saving.save(run)
        return folder

    def encoder(self) -> str:
        """DINOv2's ViT-B/14 with random weights, in timm's format."""
        import timm

        if self.config.encoder:
            return self.config.encoder
        folder = self.folder / "encoder"
        if not folder.exists():
            model = timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=False)
            timm.models.save_for_hf(model, folder, safe_serialization=True)
        return str(folder)


def training_step(run: Run) -> measure.Call:
    """One optimiser step of the real loop."""
    endless = loop.steps(run, ENDLESS, Meter(run.accelerator))
    return lambda: next(endless)


if __name__ == "__main__":
    errors.run(main)
