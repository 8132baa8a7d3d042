"""A run at its current step: network, averages, active alignments and optimiser, on this process's device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignment import Alignment, AlignOptions, BuildContext
from config import TrainConfig
from loss import Batch
from models import Backbone, attention
from runtime import launch, locks
from runtime.errors import require
from runtime.options import as_dict
from training import ema, optimizers, resume, tracker
from training.batches import Batches
from training.setup import Setup


class Run:
    """One run at the step that it has reached: from scratch, or from its latest checkpoint.

    Args:
        held: holds the lock of the run's folder until it closes. If None, the folder is neither locked nor cleaned up.

    Raises:
        UserError: options, data, teacher or an earlier checkpoint do not fit each other; another process writes there.
    """

    def __init__(self, config: TrainConfig, options: Mapping[str, AlignOptions], held: ExitStack | None = None) -> None:
        tracker.require_installed(config.report_to)
        self.config, self.began = config, time.monotonic()
        self.folder = Path(config.output_dir) / config.exp_name
        self._start_processes()
        self.setup = Setup.of(config, options, self.device)
        self.data, self.epoch_steps = self.setup.data, self.setup.epoch_steps
        parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        require(
            config.batch_size % parts == 0,
            f"--batch-size {config.batch_size} is not divisible into {parts} parts "
            f"(processes x --gradient-accumulation-steps); choose a multiple",
        )
        self.micro_batch = config.batch_size // parts
        if held is not None:
            lock = locks.locked(self.folder, "wait for it, or give another --exp-name")
            launch.on_main(self.accelerator, lambda: held.enter_context(lock))
        precision = launch.precision_name(self.dtype, self.tf32)
        self.resumed = resume.find(self.folder, self.setup, precision, self.accelerator, tidy=held is not None)
        if self.resumed:
            self.setup = resume.measured(self.setup, self.resumed)
        # Options and resolved choices of each alignment, those of ended ones included.
        self.resolved: dict[str, Any] = self.resumed.config["resolved"] if self.resumed else {}
        self.step: int = self.resumed.step if self.resumed else 0
        network, self.origin = resume.network(self.setup, self.resumed)
        self.network, self.spec = network.to(self.device).train(), network.spec
        self.alignments = self._build_alignments()
        self.averages = ema.averages(config, self.network, self.alignments)
        self.ema: ema.EMA[Backbone] = self.averages["ema"]
        self.optimizer = optimizers.build(config, self.network, self.alignments)
        if self.resumed:
            averages = {name: average.network for name, average in self.averages.items()}
            resume.restore(self.resumed, averages, self.alignments, self.optimizer, self.parameter_names())
        self.compile_note = self._compile()
        self.attention_note = self._choose_attention()

    def _start_processes(self) -> None:
        """Join the processes of this launch and settle device and precision."""
        config = self.config
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

    def _build_alignments(self) -> dict[str, Alignment]:
        """The alignments that act at the current step, on the device; their choices go into `resolved`."""
        context = BuildContext(
            self.spec,
            self.data.space,
            self.config.seed,
            self.device,
            self.dtype,
            resume.teacher_loader(self.folder, self.resolved),
            self.data,
            micro_batch=self.micro_batch,
        )
        alignments = self.setup.alignments(self.setup.alive(self.step), context)
        for name, alignment in alignments.items():
            options = as_dict(self.setup.options[name])
            self.resolved[name] = {**options, "stop": self.setup.stops[name], **alignment.describe()}
        return {name: alignment.to(self.device) for name, alignment in alignments.items()}

    def _compile(self) -> str:
        """Compile blocks if asked for; returns a note for the introduction."""
        compiling, note = launch.compiles(self.config.compile, self.device)
        if compiling:
            mode, alignments = self.config.compile, self.alignments.values()
            heads = [head for alignment in alignments for head in alignment.children()]
            launch.compile_network(self.network, heads, mode, self.device)
            frozen = [network for alignment in alignments for network in alignment.compiled]
            # the average compiles at its first call, which only previews and scores make
            for network in [self.ema.network, *frozen]:
                launch.compile_network(network, [], mode, self.device)
        return note

    def _choose_attention(self) -> str:
        """Time the attention kernels on this run's shapes and keep the fastest; returns a note for the introduction.

        Only on CUDA, and not under --deterministic: after a resume the clock could choose another kernel.
        """
        if self.device.type != "cuda" or self.config.deterministic:
            return "fp32" if self.device.type == "cpu" else "PyTorch's choice"

        def measured(*shape: Any) -> dict[str, float]:
            # all processes take the choice of the main one: their clocks differ
            return launch.on_main(self.accelerator, lambda: attention.milliseconds(*shape))

        frozen = [network for alignment in self.alignments.values() for network in alignment.frozen]
        for network in [self.ema.network, *(network for network in frozen if isinstance(network, Backbone))]:
            attention.choose(network, self.micro_batch, self.dtype, False, measured)
        return attention.choose(self.network, self.micro_batch, self.dtype, True, measured)

    def learner(self) -> nn.Module:
        """The learner of the alignments that act now, wrapped for the processes of the run."""
        learner = self.setup.learner(self.network, self.alignments, self.dtype, self.ema.network)
        return self.accelerator.prepare_model(learner, device_placement=False)  # it is on its device already

    def batches(self, end: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of the steps from the current one up to `end`."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return Batches(self.config, self.data, self.device, rank, world).steps(self.step, end, self.alignments)

    def end(self) -> int:
        """The step at which the current segment ends: the last, or that of the next alignment that is then gone."""
        stops = [self.setup.stops[name] for name in self.alignments]
        return min([self.config.max_train_steps, *(stop for stop in stops if stop is not None)])

    def end_at(self, name: str, stop: int) -> None:
        """Let the alignment `name` end after step `stop`, as was measured."""
        self.setup = self.setup.ending({name: stop})
        self.resolved[name]["stop"] = stop

    def end_alignments(self) -> list[str]:
        """Drop the alignments that end here with their heads, averages and optimiser state; returns their names."""
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
        """Trained parameters and the names under which the optimiser's state is saved."""
        modules: dict[str, nn.Module] = {"network": self.network, **self.alignments}
        names = {p: f"{prefix}.{name}" for prefix, module in modules.items() for name, p in module.named_parameters()}
        return names | {part: f"network.{name}" for part, name in getattr(self.optimizer, "parts", {}).items()}
