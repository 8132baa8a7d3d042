"""A run at its current step: network, EMA, active alignments and optimiser, on this process's device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from alignment import AlignOptions, BuildContext
from config import TrainConfig
from loss import Batch
from models import Backbone, attention, checkpoint, published
from runtime import launch, locks, presence
from runtime.errors import require
from runtime.options import as_dict
from runtime.presence import Presence
from training import ema, optimizers, resume, tracker
from training.batches import Batches
from training.setup import Setup

MANY_EPOCHS = 3000
"""Beyond this a run is warned of: ImageNet's longest has 1,400."""


class Run:
    """One run, at the step that it has reached: from scratch, or as its latest checkpoint left it.

    Args:
        held: keeps the run's folder for this run alone until it closes; without it nobody is kept out, and nothing tidied.

    Raises:
        UserError: options, data, teacher or an earlier checkpoint that do not fit each other; another process writes there.
    """

    def __init__(self, config: TrainConfig, options: Mapping[str, AlignOptions], held: ExitStack | None = None) -> None:
        tracker.require_installed(config.report_to)
        self.config = config
        self.began = time.monotonic()
        self.folder = Path(config.output_dir) / config.exp_name
        self.accelerator = launch.accelerator(
            config.timeout_minutes,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(self.folder),
        )
        self.device = self.accelerator.device
        self.dtype = launch.precision(config.mixed_precision, self.device)
        self.tf32, self.tf32_note = launch.tf32(config.tf32, self.dtype, self.device)
        if config.deterministic:
            launch.deterministic()
        self.setup = Setup.of(config, options, self.device)
        self.data, self.epoch_steps = self.setup.data, self.setup.epoch_steps
        parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        require(
            config.batch_size % parts == 0,
            f"--batch-size {config.batch_size} is not divisible into {parts} parts "
            f"(processes x --gradient-accumulation-steps); choose a multiple",
        )
        self.presence = self._hold(held) if held is not None else None
        self.resumed = resume.find(
            self.folder,
            self.setup,
            launch.precision_name(self.dtype, self.tf32),
            self.accelerator,
            tidy=held is not None,
        )
        self.resolved: dict[str, Any] = self.resumed.config["resolved"] if self.resumed else {}
        """Each alignment's options and resolved choices; those of one that has ended are what they were."""
        self.step: int = self.resumed.step if self.resumed else 0
        network, self.origin = resume.network(self.setup, self.resumed)
        self.network, self.spec = network.to(self.device).train(), network.spec
        setting = BuildContext(
            self.spec,
            self.data.space,
            config.seed,
            self.device,
            self.dtype,
            resume.teacher_loader(self.folder, self.resolved),
            self.data,
            micro_batch=config.batch_size // parts,
        )
        self.alignments = {
            name: alignment.to(self.device)
            for name, alignment in self.setup.alignments(self.setup.alive(self.step), setting).items()
        }
        self.averages = ema.averages(config, self.network, self.alignments)
        self.ema = self.averages["ema"]
        self.optimizer = optimizers.build(
            config, self.network, self.alignments, fused=self.device.type == "cuda" or self.dtype is not None
        )
        if self.resumed:
            resume.restore(
                self.resumed,
                {name: average.network for name, average in self.averages.items()},
                self.alignments,
                self.optimizer,
                self.parameter_names(),
            )
        self.compile_note = self._compile()
        self.attention_note = self._choose_attention()
        for name, alignment in self.alignments.items():
            self.resolved[name] = {
                **as_dict(self.setup.options[name]),
                "stop": self.setup.stops[name],
                **alignment.describe(),
            }

    def _hold(self, held: ExitStack) -> Presence | None:
        """Take the folder for the processes of this launch; returns their signs of life, where there are several."""
        signs = self.folder / ".processes"

        def take() -> None:
            held.enter_context(locks.locked(self.folder, "wait for it, or give another --exp-name"))
            presence.clear(signs)

        launch.on_main(self.accelerator, take)
        if self.accelerator.num_processes == 1:
            return None
        watch = Presence(signs, self.accelerator.process_index)
        held.callback(watch.end)
        return watch

    def seen(self, step: int) -> None:
        """Let the other processes know how far this one is."""
        if self.presence is not None:
            self.presence.step = step

    def lost_contact(self) -> str:
        """What to say when a process does not answer any more."""
        about = self.presence.missing() if self.presence is not None else "its own message says why it ended"
        return f"lost contact with another process near step {self.step}: {about}; the same command continues from the last checkpoint"

    def skips_step(self, step: int) -> bool:
        """Whether --skip-steps leaves out optimiser step `step`, counted from 1."""
        skipped = self.config.skip_steps
        return skipped is not None and skipped[0] <= step <= skipped[1]

    def logs_grad_ratio_at(self, step: int) -> bool:
        """Whether gradient norms of alignments and denoising are compared in optimiser step `step`, counted from 1."""
        return bool(self.config.grad_ratio_steps) and step % self.config.grad_ratio_steps == 0

    def _compile(self) -> str:
        """Compile blocks where that is wanted; returns what to say of it."""
        compiling, note = launch.compiles(self.config.compile, self.device)
        if compiling:
            wanted, alignments = self.config.compile, self.alignments.values()
            frozen = [network for alignment in alignments for network in alignment.compiled]
            launch.compile_network(
                self.network, [head for alignment in alignments for head in alignment.children()], wanted, self.device
            )
            for network in [self.ema.network, *frozen]:  # the average compiles at its first call, if there is one
                launch.compile_network(network, [], wanted, self.device)
        return note

    def _choose_attention(self) -> str:
        """Time the attention kernels on this run's shapes, CUDA alone, and fix the fastest; returns what to say of it.

        Not under --deterministic: a choice by time may be another one after a resume.
        """
        if self.device.type != "cuda" or self.config.deterministic:
            return "fp32" if self.device.type == "cpu" else "PyTorch's choice"
        images = self.config.batch_size // self.accelerator.num_processes // self.config.gradient_accumulation_steps
        teachers = [
            network
            for alignment in self.alignments.values()
            for network in alignment.frozen
            if isinstance(network, Backbone)
        ]
        for network in [self.ema.network, *teachers]:
            attention.choose(network, images, self.dtype, backward=False)
        return attention.choose(self.network, images, self.dtype, backward=True)

    def learner(self) -> nn.Module:
        """The learner of the alignments that live now, wrapped for the processes of the run."""
        learner = self.setup.learner(self.network, self.alignments, self.dtype, self.ema.network)
        return self.accelerator.prepare_model(learner, device_placement=False)  # it is where it belongs

    def batches(self, end: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of the steps from the current one up to `end`."""
        source = Batches(
            self.config, self.data, self.device, self.accelerator.process_index, self.accelerator.num_processes
        )
        return source.steps(self.step, end, self.alignments)

    def weights(self) -> dict[str, float]:
        """Lambda of each living alignment at the current step."""
        return {name: self.setup.options[name].weight_at(self.step, self.epoch_steps) for name in self.alignments}

    def set_rate(self) -> None:
        """Give the optimiser the rate of the current step, where it is not constant."""
        if self.config.lr_warmup_steps or self.config.lr_scheduler != "constant":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate_at(self.step)

    def end_alignments(self) -> list[str]:
        """Drop the alignments that end here, with their heads, the averages of those, and optimiser state; returns their names."""
        alive = self.setup.alive(self.step)
        ended = [name for name in self.alignments if name not in alive]
        for name in ended:
            for group in [group for group in self.optimizer.param_groups if group["name"] == name]:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
                self.optimizer.param_groups.remove(group)
            del self.alignments[name]
            self.averages = {of: average for of, average in self.averages.items() if not of.startswith(f"{name}-head-")}
        return ended

    def parameter_names(self) -> dict[Tensor, str]:
        """Trained parameters and their names, as the optimiser's state is stored under."""
        modules: dict[str, nn.Module] = {"network": self.network, **self.alignments}
        names = {p: f"{prefix}.{name}" for prefix, module in modules.items() for name, p in module.named_parameters()}
        return names | {part: f"network.{name}" for part, name in getattr(self.optimizer, "parts", {}).items()}

    def save(self) -> None:
        """Write the checkpoint of the current step, on the main process; the others wait for it."""
        if self.accelerator.is_main_process:
            checkpoint.write(
                self.folder / "checkpoints" / f"{self.step:07d}",
                **self._about(),
                network=self.network.state_dict(),
                ema=self.ema.network.state_dict(),
                averages={
                    name: average.network.state_dict()
                    for name, average in self.averages.items()
                    if average is not self.ema
                },
                heads={
                    f"{name}.{key}": value
                    for name, alignment in self.alignments.items()
                    for key, value in alignment.state_dict().items()
                },
                optimizer=optimizers.state_of(self.optimizer, self.parameter_names()),
                kept=self.step % self.config.checkpointing_steps == 0 or self.step == self.config.max_train_steps,
            )
            resume.prune(self.folder, self.config.checkpoints_total_limit, self.config.keep_every)
        self.accelerator.wait_for_everyone()

    def keep_averages(self) -> None:
        """Write the averages of --ema-lengths alone, on the main process: what `training.posthoc` makes others of."""
        if self.accelerator.is_main_process:
            checkpoint.write(
                self.folder / "averages" / f"{self.step:07d}",
                **self._about(),
                network={},
                averages={
                    name: average.network.state_dict()
                    for name, average in self.averages.items()
                    if isinstance(average.decay, ema.Power)
                },
            )

    def _about(self) -> dict[str, Any]:
        """What a checkpoint of the current step says of itself."""
        data, heads = (
            self.data,
            {
                name: as_dict(alignment.velocity_head)
                for name, alignment in self.alignments.items()
                if alignment.velocity_head is not None
            },
        )
        return {
            "spec": self.spec,
            "space": data.space,
            "step": self.step,
            "data": {
                "path": str(self.config.data_dir),
                "digest": data.digest,
                "count": len(data),
                "class_names": data.manifest["class_names"],
            },
            "train": as_dict(self.config),
            "align": {name: as_dict(chosen) for name, chosen in self.setup.options.items()},
            "resolved": self.resolved,
            **({"velocity_heads": heads} if heads else {}),
            "precision": launch.precision_name(self.dtype, self.tf32),
        }

    def settings(self) -> dict[str, Any]:
        """All that the run was told and what it came to, laid flat: for a tracker."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            **as_dict(self.config),
            "device": device,
            "processes": self.accelerator.num_processes,
            "precision": launch.precision_name(self.dtype, self.tf32),
            "commit": launch.commit(),
            **{f"{name}/{key}": value for name, choices in self.resolved.items() for key, value in choices.items()},
        }

    def introduction(self) -> list[str]:
        """What is about to run: everything that two runs of the same name could differ in."""
        config, data, world = self.config, self.data, self.accelerator.num_processes
        micro = config.batch_size // world // config.gradient_accumulation_steps
        lines = [
            f"{config.model}: {models.parameter_count(self.network) / 1e6:.1f}M parameters, {self.spec.depth} blocks; "
            f"{launch.precision_name(self.dtype, self.tf32)} on {self.device.type}, compile {self.compile_note}, "
            f"attention {self.attention_note}",
            *(
                ["note: this CPU multiplies bf16 natively: --mixed-precision bf16 is faster here"]
                if self.device.type == "cpu" and self.dtype is None and launch.native_bf16(self.device)
                else []
            ),
            f"data: {len(data)} latents {data.channels}x{data.latent_size}x{data.latent_size} ({data.space.name}), "
            f"{data.num_classes} classes, {self.epoch_steps} steps per epoch",
            f"batch {config.batch_size} = {world} process(es) x {config.gradient_accumulation_steps} micro-batch(es) x {micro}; "
            f"{config.max_train_steps} steps = {config.max_train_steps / self.epoch_steps:.1f} epochs",
            *self.origin,
        ]
        for name, choices in self.resolved.items():
            lines.append(
                f"alignment {name}: "
                + ", ".join(f"{key} {value}" for key, value in choices.items() if value is not None)
            )
            authors = published.first(method=name, variant="", model=config.model, guidance="none", samples=50_000)
            if authors and authors.flips not in (None, data.views == 2):
                lines.append(
                    f"note: the published {name} of {config.model} trained with{'' if authors.flips else 'out'} flips; this "
                    f"latent set has {'none' if authors.flips else 'them'}"
                )
        lines += [note for alignment in self.alignments.values() for note in alignment.notes()]
        lines += [self.tf32_note] if self.tf32_note else []
        if not config.ema_warmup and config.max_train_steps < 5 / (1 - config.ema_decay):
            lines.append(
                f"warning: {config.max_train_steps} steps are few for EMA decay {config.ema_decay}; EMA "
                f"weights stay near initialisation: add --ema-warmup"
            )
        if (epochs := config.max_train_steps / self.epoch_steps) > MANY_EPOCHS:
            lines.append(
                f"warning: {epochs:,.0f} epochs of {len(data):,} items: a network learns so few by heart; give --batch-size 32 "
                f"--max-train-steps {1000 * max(1, len(data) // 32)} or fewer (docs/data.md)"
            )
        if self.step >= config.max_train_steps:
            return [*lines, f"finished: step {self.step} is done; for more give --max-train-steps"]
        return lines + ([f"continuing from step {self.step}"] if self.step else [])
