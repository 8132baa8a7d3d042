"""REPA's own model, loss, sampler and loop body, from a checkout that the user points to, beside ours in one process.

    git clone https://github.com/sihyun-yu/REPA ../REPA
    python -m benchmarks.train_step --rows plain --peer ../REPA

No code of REPA is copied here. Its files are loaded from the checkout under new names, and the body of the loop comes
from its `train.py` as it stands there, without saving and previews. Encoders and projectors are left out, so that the
loss is the plain one; so is its data loader: the batches are ready in memory.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import require

LEFT_OUT = ("checkpointing_steps", "sampling_steps", "max_train_steps")


def load(folder: Path, file: str) -> ModuleType:
    """One file of the checkout as a module. Raises UserError if it is missing."""
    path = folder / file
    require(
        path.is_file(), f"--peer {folder} has no {file}; it must be a checkout of https://github.com/sihyun-yu/REPA"
    )
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(folder: Path, name: str, side: int, classes: int, device: torch.device) -> nn.Module:
    """REPA's network `name` without projectors."""
    sizes = load(folder, "models/sit.py").SiT_models
    require(name in sizes, f"--peer has no network {name}; choose one of {', '.join(sizes)}")
    # REPA leaves this at the width of SiT-B, which SiT-S does not have
    width = {"decoder_hidden_size": 384} if name.startswith("SiT-S/") else {}
    return sizes[name](
        input_size=side,
        num_classes=classes,
        use_cfg=True,
        z_dims=[],
        encoder_depth=1,
        fused_attn=True,
        qk_norm=False,
        **width,
    ).to(device)


def functions(folder: Path) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Two functions of its `train.py`, and the body of its innermost loop over the data."""
    require((folder / "train.py").is_file(), f"--peer {folder} has no train.py")
    tree = ast.parse((folder / "train.py").read_text(encoding="utf-8"))
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in ("sample_posterior", "update_ema")
    ]
    loops = [
        node for node in ast.walk(tree) if isinstance(node, ast.For) and "train_dataloader" in ast.unparse(node.iter)
    ]
    require(len(wanted) == 2 and len(loops) == 1, f"{folder / 'train.py'} is not laid out as expected: another version")
    body = [
        node
        for node in loops[0].body
        if not (isinstance(node, ast.If) and any(word in ast.unparse(node.test) for word in LEFT_OUT))
    ]
    return wanted, body


class TrainingStep:
    """REPA's step on batches of moments (N, 8, H, W) in host memory, through an Accelerator of its own."""

    def __init__(
        self,
        folder: Path,
        model: str,
        batches: list[tuple[Tensor, Tensor]],
        classes: int,
        device: torch.device,
        precision: str,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from tqdm import tqdm

        # our Accelerator, with another precision, would be shared otherwise
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        trained = network(folder, model, batches[0][0].shape[-1], classes, device)
        ema = copy.deepcopy(trained).requires_grad_(False).eval()
        plain = load(folder, "loss.py").SILoss(encoders=[], accelerator=accelerator)

        def loss(model: nn.Module, x: Tensor, words: dict[str, Tensor], zs: list[Tensor]) -> tuple[Tensor, Tensor]:
            # the loss reads the batch size off the first of the targets
            return plain(model, x, words, zs=[x])[0], x.new_zeros(())

        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
        trained, optimizer = accelerator.prepare(trained.train(), optimizer)
        scale, bias = torch.full((1, 4, 1, 1), 0.18215, device=device), torch.zeros(1, 4, 1, 1, device=device)
        self.names: dict[str, Any] = {
            "torch": torch,
            "OrderedDict": OrderedDict,
            "accelerator": accelerator,
            "model": trained,
            "ema": ema,
            "optimizer": optimizer,
            "loss_fn": loss,
            "encoders": [],
            "encoder_types": [],
            "architectures": [],
            "latents_scale": scale,
            "latents_bias": bias,
            "device": device,
            "global_step": 0,
            "progress_bar": tqdm(disable=True),
            "args": SimpleNamespace(legacy=False, proj_coeff=0.5, max_grad_norm=1.0, cfg_prob=0.1, num_classes=classes),
        }
        wanted, body = functions(folder)
        step = ast.parse("def step(raw_image, x, y):\n    global global_step\n").body[0]
        step.body += body
        exec(
            compile(ast.fix_missing_locations(ast.Module([*wanted, step], [])), str(folder / "train.py"), "exec"),
            self.names,
        )
        self.batches, self.count = batches, 0

    def __call__(self) -> None:
        x, y = self.batches[self.count % len(self.batches)]
        self.count += 1
        self.names["step"](x.new_zeros(1), x, y)


class SamplingCall:
    """REPA's SDE sampler: guided latents (N, 4, H, W), with float32 weights as in its `generate.py`."""

    def __init__(
        self, folder: Path, model: str, images: int, side: int, classes: int, device: torch.device, settings: Any
    ) -> None:
        self.model = network(folder, model, side, classes, device).eval()
        self.sample = load(folder, "samplers.py").euler_maruyama_sampler
        self.noise = torch.zeros(images, 4, side, side, device=device)
        self.labels = torch.zeros(images, dtype=torch.long, device=device)
        self.settings = settings

    @torch.no_grad()
    def __call__(self) -> Tensor:
        s = self.settings
        return self.sample(
            self.model,
            self.noise,
            self.labels,
            num_steps=s.num_steps,
            cfg_scale=s.cfg_scale,
            guidance_low=s.guidance_low,
            guidance_high=s.guidance_high,
        )
