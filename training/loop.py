"""The training loop of both stages and of every baseline.

A run is a folder: `checkpoints/`, `samples/`, `log.jsonl`, `run.json`. The same command continues it from its latest
checkpoint. A run is cut into segments at the steps where an alignment ends; each segment builds its learner as a resume
at that step would, so an alignment that has ended is gone: no teacher pass, no head, no optimiser state.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dataset
import files
import models
from alignment import AlignOptions, Setting, find
from config import FREE_ON_RESUME, TrainConfig, as_dict, require
from dataset import LatentSet
from errors import UserError
from loss import Batch, Learner
from models.latents import open_codec
from training import checkpoint, evaluation, launch, preview
from training.batches import Batches
from training.checkpoint import Checkpoint
from training.ema import EMA
from training.log import Meter, RunLog


class Trainer:
    """One run: everything that lives from its first step to its last.

    Raises:
        UserError: options, data, teacher or an earlier checkpoint that do not fit each other, before the first step.
    """

    def __init__(self, config: TrainConfig, options: dict[str, AlignOptions]) -> None:
        self.config = config
        tracker = None if config.report_to == "none" else config.report_to
        self.folder = Path(config.output_dir) / config.exp_name
        self.accelerator = launch.accelerator(log_with=tracker, project_dir=str(self.folder))
        self.device = self.accelerator.device
        self.dtype = launch.precision(config.mixed_precision, self.device)
        if config.deterministic:
            launch.deterministic()
        self.data = LatentSet(config.data_dir, resident="ram" if config.resident == "ram" else "disk")
        self.on_device = self.data.on_device(self.device) if config.resident == "device" else None
        self.epoch_steps = dataset.steps_per_epoch(len(self.data), config.batch_size)
        parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        require(config.batch_size % parts == 0, f"--batch-size {config.batch_size} does not divide among {parts} parts "
                                                f"(processes x --gradient-accumulation-steps)")
        self.spec = models.spec(config.model, in_channels=self.data.channels, input_size=self.data.latent_size,
                                num_classes=self.data.num_classes, qk_norm=config.qk_norm)
        self.options = {name: find(name).resolve(own, self.spec) for name, own in options.items()}
        self.codec = open_codec(config.vae or self.data.space.vae, space=self.data.space, device=self.device) \
            if config.sampling_steps or config.eval_steps else None
        self.evaluation = None
        if config.eval_steps:
            latent = (self.spec.in_channels, self.spec.input_size, self.spec.input_size)
            self.evaluation = evaluation.Evaluation(config, self.codec, self.accelerator, latent)
        self.stops = {name: own.stop(self.epoch_steps) for name, own in self.options.items()}
        found = checkpoint.latest(self.folder)
        self.resumed = Checkpoint.open(found) if found else None
        if self.resumed:
            self._agrees(self.resumed)
        self._resolved: dict[str, Any] = self.resumed.config["resolved"] if self.resumed else {}
        self.step: int = self.resumed.step if self.resumed else 0
        self._build()

    def _build(self) -> None:
        """Network, EMA, live alignments and optimiser, at the current step."""
        config = self.config
        self.network = self._network().to(self.device).train()
        self.ema = EMA(self.network, config.ema_decay, config.ema_warmup)
        setting = Setting(self.spec, self.data.space, config.seed, self.device, self.dtype, self._open, self.data)
        self.alignments = {name: find(name)(own, setting).to(self.device)
                           for name, own in self.options.items() if self._lives(name)}
        groups = [{"name": "network", "params": list(self.network.parameters())}]
        groups += [{"name": name, "params": own} for name, one in self.alignments.items() if (own := list(one.parameters()))]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay, eps=config.adam_epsilon, fused=self.device.type == "cuda")
        if self.resumed:
            self._restore(self.resumed)
        compiling, self.compile_note = launch.compiles(config.compile, self.device)
        if compiling:
            teachers = [self.ema.network] if any(one.reads_ema for one in self.alignments.values()) else []
            for network in [self.network, *teachers, *(frozen for one in self.alignments.values() for frozen in one.compiled)]:
                launch.compile_blocks(network)

    def _open(self, path: str) -> Checkpoint:
        """A teacher's checkpoint: for a resumed run the very one it began with, though that run may have gone on since."""
        for own in self._resolved.values():
            if own.get("guiding_ckpt") == path and "teacher" in own:
                found = Checkpoint.open(own["teacher"]["path"])
                require(found.digest == own["teacher"]["digest"],
                        f"{self.folder} cannot be continued: its teacher {found.path} has changed since; use another --exp-name")
                return found
        return Checkpoint.open(path)

    def _network(self) -> models.Backbone:
        if self.resumed:
            return models.build(self.spec, weights=self.resumed.tensors("network"))
        if self.config.init_ckpt is None:
            return models.build(self.spec, seed=self.config.seed)
        found = Checkpoint.open(self.config.init_ckpt)
        difference = found.space.difference(self.data.space)
        require(difference is None, f"--init-ckpt {found.path} was trained on other latents than {self.config.data_dir} ({difference})")
        return start_from(found, self.spec, self.config.seed)

    def _lives(self, name: str) -> bool:
        return self.stops[name] is None or self.step < self.stops[name]

    def _names(self) -> dict[Tensor, str]:
        """Trained parameters and their names, as the optimiser's state is stored under."""
        modules: dict[str, nn.Module] = {"network": self.network, **self.alignments}
        return {p: f"{prefix}.{name}" for prefix, module in modules.items() for name, p in module.named_parameters()}

    def _agrees(self, found: Checkpoint) -> None:
        """Refuse to continue a run under options, data or an architecture that are not its own."""
        where = f"{self.folder} cannot be continued"
        require(found.spec == self.spec, f"{where}: its network is {_differs(found.spec.to_json(), self.spec.to_json())}; "
                                         f"use its --model, or another --exp-name")
        require(found.config["data"]["digest"] == self.data.digest, f"{where}: {self.config.data_dir} is another latent set "
                                                                    f"than the one it was trained on; use another --exp-name")
        precision = "bf16" if self.dtype else "fp32"
        require(found.config["precision"] == precision, f"{where}: it was trained in {found.config['precision']}, not {precision}; "
                                                        f"say --mixed-precision {'no' if self.dtype else 'bf16'}")
        now = json.loads(json.dumps({"train": as_dict(self.config), **{n: as_dict(o) for n, o in self.options.items()}}))
        then = {"train": found.config["train"], **found.config["align"]}
        require(now.keys() == then.keys(), f"{where}: its alignments are {list(then)[1:]}, not {list(now)[1:]}; "
                                           f"use another --exp-name")
        for section, values in now.items():
            for key, value in values.items():
                if key not in FREE_ON_RESUME and then[section].get(key) != value:
                    raise UserError(f"{where}: its {key.replace('_', '-')} is {then[section].get(key)}, not {value}; "
                                    f"use the same options, or another --exp-name")

    def _restore(self, found: Checkpoint) -> None:
        self.ema.network.load_state_dict(found.tensors("ema"))
        if self.alignments and "heads.safetensors" in found.config["files"]:
            heads = found.tensors("heads")
            for name, one in self.alignments.items():
                own = {key.removeprefix(f"{name}."): value for key, value in heads.items() if key.startswith(f"{name}.")}
                one.load_state_dict(own)
        live = ("network.", *(f"{name}." for name in self.alignments))
        state = {key: value for key, value in found.tensors("optimizer").items() if key.startswith(live)}
        checkpoint.restore_optimizer(self.optimizer, state, self._names())

    def run(self) -> Path:
        """Train to the last step; returns the run's folder."""
        config, main = self.config, self.accelerator.is_main_process
        if main:
            files.write_json(self.folder / "run.json", {"train": as_dict(config), "align": self._align_json()})
        self.log = RunLog(self.folder, self.accelerator, self.step, config.max_train_steps, as_dict(config), config.report_to,
                          self._introduction())
        try:
            while self.step < config.max_train_steps:
                ends = [self.stops[name] for name in self.alignments if self.stops[name] is not None]
                self._segment(min([config.max_train_steps, *ends]))
        finally:
            self.log.close()
        return self.folder

    def _segment(self, end: int) -> None:
        """Steps up to `end` with the alignments that live now; then those that end there are gone."""
        config = self.config
        learner = Learner(self.network, self.alignments, velocity_loss=config.velocity_loss, autocast=self.dtype,
                          ema=self.ema.network if any(one.reads_ema for one in self.alignments.values()) else None)
        wrapped = self.accelerator.prepare_model(learner, device_placement=False)  # it is where it belongs
        source = Batches(config, self.data, self.device, self.accelerator.process_index, self.accelerator.num_processes,
                         self.on_device)
        meter = Meter(self.accelerator)
        for micros in source.steps(self.step, end, self.alignments):
            weights = {name: self.options[name].weight_at(self.step, self.epoch_steps) for name in self.alignments}
            update(wrapped, micros, weights, self.optimizer, config.max_grad_norm, meter)
            self.step += 1
            self.ema.update(self.step)
            self.log.advance()
            self._report(meter, end)
        self.accelerator.free_memory()  # lets go of the DDP wrapper and of its hooks
        self._end_alignments()

    def _report(self, meter: Meter, end: int) -> None:
        config, step = self.config, self.step
        values: dict[str, float] = {}
        saves = step % config.checkpointing_steps == 0 or step == config.max_train_steps
        if step % config.log_steps == 0 or step == end or saves:
            values = meter.report(config.batch_size)
            self._refuse(name for name, value in values.items() if not math.isfinite(value))
        if self.evaluation and step % config.eval_steps == 0:
            scores = self.evaluation.measure(self.ema.network, self.dtype)
            self.log.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            values |= scores
        if values:
            self.log.write(step, values)
        shows = config.sampling_steps and step % config.sampling_steps == 0
        if shows and self.accelerator.is_main_process:
            preview.write(self.folder / "samples" / f"{step:07d}.png", self.ema.network, self.codec, self.dtype, config.seed)
        if saves:
            self.save()
        if values or shows or saves:
            meter.restart_clock()

    def _refuse(self, not_finite: Iterable[str]) -> None:
        """Stop the run if anything is not finite; names the first."""
        bad = next(iter(not_finite), None)
        require(bad is None, f"{bad} is not finite near step {self.step}: the run stops before a checkpoint takes it in; continue "
                             f"from the last one with --mixed-precision no, or train with --qk-norm")

    def _end_alignments(self) -> None:
        for name in [name for name in self.alignments if not self._lives(name)]:
            for group in [group for group in self.optimizer.param_groups if group["name"] == name]:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
                self.optimizer.param_groups.remove(group)
            del self.alignments[name]
            self.log.say(f"step {self.step}: alignment {name} has ended, plain training from here")

    def save(self) -> None:
        """Write the checkpoint of the current step, on the main process; the others wait for it."""
        self._refuse(name for name, value in self.network.named_parameters() if not torch.isfinite(value).all())
        if self.accelerator.is_main_process:
            checkpoint.write(
                self.folder / "checkpoints" / f"{self.step:07d}", spec=self.spec, space=self.data.space, step=self.step,
                network=self.network.state_dict(), ema=self.ema.network.state_dict(),
                heads={f"{name}.{key}": value for name, one in self.alignments.items()
                       for key, value in one.state_dict().items()},
                optimizer=checkpoint.optimizer_state(self.optimizer, self._names()),
                data={"path": str(self.config.data_dir), "digest": self.data.digest, "count": len(self.data),
                      "class_names": self.data.manifest["class_names"]},
                train=as_dict(self.config), align={name: as_dict(own) for name, own in self.options.items()},
                resolved=self._align_json(), precision="bf16" if self.dtype else "fp32")
        self.accelerator.wait_for_everyone()

    def _align_json(self) -> dict[str, Any]:
        """Each alignment's options and resolved choices; those of one that has ended are what they were."""
        for name, own in self.options.items():
            if name in self.alignments:
                self._resolved[name] = {**as_dict(own), "stop": self.stops[name], **self.alignments[name].describe()}
        return self._resolved

    def _introduction(self) -> list[str]:
        """What is about to run: everything that two runs of the same name could differ in."""
        config, world = self.config, self.accelerator.num_processes
        micro = config.batch_size // world // config.gradient_accumulation_steps
        lines = [
            f"{config.model}: {models.parameter_count(self.network) / 1e6:.1f}M parameters, {self.spec.depth} blocks; "
            f"{'bf16' if self.dtype else 'fp32'} on {self.device.type}, compile {self.compile_note}",
            f"data: {len(self.data)} latents {self.data.channels}x{self.data.latent_size}x{self.data.latent_size} "
            f"({self.data.space.name}), {self.data.num_classes} classes, {self.epoch_steps} steps per epoch",
            f"batch {config.batch_size} = {world} process(es) x {config.gradient_accumulation_steps} micro-batch(es) x {micro}; "
            f"{config.max_train_steps} steps = {config.max_train_steps / self.epoch_steps:.1f} epochs"]
        for name, own in self._align_json().items():
            lines.append(f"alignment {name}: " + ", ".join(f"{key} {value}" for key, value in own.items() if value is not None))
            authors = find(name).published.get(config.model)
            if authors and authors.flips != (self.data.views == 2):
                lines.append(f"note: the published {name} of {config.model} trained with{'' if authors.flips else 'out'} flips; this "
                             f"latent set has {'none' if authors.flips else 'them'}")
        if not config.ema_warmup and config.max_train_steps < 5 / (1 - config.ema_decay):
            lines.append(f"warning: {config.max_train_steps} steps are short for an average of decay {config.ema_decay}; its "
                         f"weights stay near the start: add --ema-warmup")
        return lines + ([f"continuing from step {self.step}"] if self.step else [])


def update(learner: nn.Module, micros: list[Batch], weights: dict[str, float], optimizer: torch.optim.Optimizer,
           max_grad_norm: float, meter: Meter | None = None) -> Tensor | None:
    """One optimiser step: L = L_diff + sum over alignments of weight x loss, averaged over the micro-batches.

    Returns the gradient norm before clipping, None without clipping. Nothing here waits for the device.
    """
    for number, batch in enumerate(micros, start=1):
        last = number == len(micros)
        with nullcontext() if last or not hasattr(learner, "no_sync") else learner.no_sync():
            losses = learner(batch)
            total = losses["diffusion"].mean() + sum(weights[name] * losses[name] for name in losses if name != "diffusion")
            (total / len(micros)).backward()
        if meter is not None:
            meter.add(losses, batch.t, len(micros))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm) if max_grad_norm else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if meter is not None:
        meter.step(norm)
    return norm


def start_from(found: Checkpoint, spec: models.ModelSpec, seed: int) -> models.Backbone:
    """A network with the EMA weights of `found`; the label table is fresh where the classes differ.

    Raises UserError where anything else differs.
    """
    same = dataclasses.replace(found.spec, num_classes=spec.num_classes)
    require(same == spec, f"--init-ckpt {found.path} does not fit: its network is {_differs(same.to_json(), spec.to_json())}")
    tensors = found.tensors("ema" if "ema.safetensors" in found.config["files"] else "network")
    if found.spec.num_classes != spec.num_classes:
        table = "y_embedder.embedding_table.weight"
        tensors[table] = models.build(spec, seed=seed).state_dict()[table]
    return models.build(spec, weights=tensors)


def _differs(then: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{key} {then[key]} (not {now[key]})" for key in then if then[key] != now[key])
