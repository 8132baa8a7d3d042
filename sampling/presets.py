"""Sampling presets, named after the published number or the protocol that they reproduce: `generate.py --preset NAME`.

A preset fixes all that moves FID besides the weights themselves: solver, steps, last step, shift, guidance with its
interval and channels, which weights, decoder, rounding, labels, precision. Published FIDs are by ADM's evaluator.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from models import published
from models.latents import LatentSpace
from runtime.errors import UserError, nearest
from runtime.options import Given
from runtime.text import aligned
from sampling.config import SamplingConfig

SD_VAE = "stabilityai/sd-vae-ft-ema"
# REPA, SiT and LightningDiT sample in float32 with TF32 products.
PRECISION = {"mixed_precision": "no", "tf32": True}


@dataclass(frozen=True)
class Preset:
    """Settings of `SamplingConfig`, decoder, and what was published under them."""

    network: str
    settings: dict[str, Any]
    # The published row (arguments of `models.published.find`); empty for a protocol without a number of its own.
    result: dict[str, Any] = field(default_factory=dict)
    # Decoder of SD-VAE's latents; None: the one that the checkpoint names (VA-VAE).
    vae: str | None = SD_VAE
    note: str = ""
    # Number of samples if the protocol does not draw 50,000.
    samples: int | None = None

    @property
    def published(self) -> float | None:
        """The published FID."""
        rows = published.find(resolution=256, **self.result) if self.result else []
        return rows[0].metrics["fid"] if rows else None


_SDE = {"mode": "sde", "num_steps": 250, "last_step": 0.04}
_REPA = {**_SDE, "rounding": "truncate"}
_HEUN = {"mode": "ode", "solver": "heun", "num_steps": 125}
_DOPRI = {"mode": "ode", "solver": "dopri5"}
_LIGHTNING = {
    "mode": "ode",
    "solver": "euler",
    "num_steps": 250,
    "grid": "points",
    "timestep_shift": 0.3,
    "guidance_channels": "first3",
}
_INTERNAL = {"mode": "ode", "solver": "heun2", "num_steps": 125, "grid": "points", "timestep_shift": 0.3}
_XL = "SiT-XL/2"


def _of(method: str, model: str, epochs: int, guidance: str = "none", **more: Any) -> dict[str, Any]:
    return {"method": method, "model": model, "epochs": epochs, "guidance": guidance, **more}


PRESETS: dict[str, Preset] = {
    # Self-Transcendence. Table 1 has no guidance and does not name its sampler: both candidates, and the ablations with
    # 10,000 samples.
    "table1-sde": Preset("Table 1 under REPA's sampler", _REPA, note="sampler of Table 1 not stated"),
    "table1-ode": Preset("Table 1 under LayerSync's sampler", _HEUN, note="sampler of Table 1 not stated"),
    "fid10k": Preset("ablations (Tables 4 and 5, Figs. 4 and 8)", _REPA, samples=10_000, note="sampler not stated"),
    "self-transcendence-cfg": Preset(
        "Self-Transcendence SiT-XL/2, 400 epochs",
        {**_REPA, "cfg_scale": 1.9, "guidance_high": 0.65},
        _of("guided", _XL, 400, "cfg 1.9, t <= 0.65"),
        note="guidance of the released script",
    ),
    "self-transcendence-cfg-512": Preset(
        "Self-Transcendence SiT-XL/2 at 512 pixels",
        {**_REPA, "cfg_scale": 1.9, "guidance_high": 0.65},
        note="the paper gives no guidance at 512: that of 256",
    ),
    # REPA and what derives from it
    "repa-nocfg": Preset("REPA SiT-XL/2, 4M steps", _REPA, _of("repa", _XL, 800, status="reported")),
    "repa-cfg": Preset(
        "REPA SiT-XL/2, 4M steps",
        {**_REPA, "cfg_scale": 1.8, "guidance_high": 0.7},
        _of("repa", _XL, 800, "cfg 1.8, t <= 0.7", status="reported"),
    ),
    "rare-cfg": Preset(
        "RARE's matched table of SiT-B/2",
        {**_REPA, "cfg_scale": 1.65, "guidance_high": 0.72},
        note="steps of the SDE not stated",
    ),
    # SiT and what derives from it
    "sit-nocfg-sde": Preset("SiT-XL/2, 7M steps", _SDE, _of("none", _XL, 1400, status="reported")),
    "sit-cfg-sde": Preset(
        "SiT-XL/2, 7M steps",
        {**_SDE, "cfg_scale": 1.5, "guidance_channels": "first3"},
        _of("none", _XL, 1400, "cfg 1.5, 3 channels", sampler="SDE, 250 steps", status="reported"),
    ),
    "sit-cfg-ode": Preset(
        "SiT-XL/2, 7M steps",
        {**_DOPRI, "cfg_scale": 1.5, "guidance_channels": "first3"},
        _of("none", _XL, 1400, "cfg 1.5, 3 channels", sampler="ODE, dopri5"),
    ),
    "layersync-nocfg-ode": Preset(
        "LayerSync SiT-XL/2, 80 epochs", _HEUN, _of("layersync", _XL, 80), note="number of steps not stated"
    ),
    "layersync-nocfg-sde": Preset("LayerSync SiT-XL/2, 160 epochs", _SDE, _of("layersync", _XL, 160)),
    "dispersive-nocfg": Preset(
        "Dispersive SiT-B/2, 80 epochs", _DOPRI, _of("dispersive", "SiT-B/2", 80, variant="", status="reported")
    ),
    "dispersive-cfg": Preset(
        "Dispersive SiT-XL/2, 80 epochs",
        {**_DOPRI, "cfg_scale": 1.5, "guidance_channels": "first3"},
        _of("dispersive", _XL, 80, "cfg 1.5, 3 channels", variant=""),
    ),
    # LightningDiT
    "lightningdit-64ep-nocfg": Preset(
        "LightningDiT-XL/1, 64 epochs",
        _LIGHTNING,
        _of("none", "LightningDiT-XL/1", 64, status="reported"),
        vae=None,
        note="whether the shift was used without guidance is not stated",
    ),
    "lightningdit-64ep": Preset(
        "LightningDiT-XL/1, 64 epochs",
        {**_LIGHTNING, "cfg_scale": 10.0, "guidance_high": 0.9},
        _of("none", "LightningDiT-XL/1", 64, "cfg 10, t <= 0.9, 3 channels"),
        vae=None,
    ),
    "lightningdit-800ep-nocfg": Preset(
        "LightningDiT-XL/1, 800 epochs",
        _LIGHTNING,
        _of("none", "LightningDiT-XL/1", 800),
        vae=None,
        note="whether the shift was used without guidance is not stated",
    ),
    "lightningdit-800ep": Preset(
        "LightningDiT-XL/1, 800 epochs",
        {**_LIGHTNING, "cfg_scale": 6.7, "guidance_high": 0.875},
        _of("none", "LightningDiT-XL/1", 800, "cfg 6.7, t <= 0.875, 3 channels", status="reported"),
        vae=None,
    ),
    # Internal Guidance: LightningDiT from the configuration of its weights, SiT from its script
    "internal-680ep-nocfg": Preset(
        "LightningDiT-XL/1 with Internal Guidance, 680 epochs",
        {**_INTERNAL, "internal_scale": 1.7},
        _of("internal", "LightningDiT-XL/1", 680, "internal 1.7"),
        vae=None,
    ),
    "internal-680ep": Preset(
        "LightningDiT-XL/1 with Internal Guidance, 680 epochs",
        {**_INTERNAL, "cfg_scale": 1.45, "guidance_high": 0.81, "internal_scale": 1.4},
        _of("internal", "LightningDiT-XL/1", 680, "cfg 1.45, t <= 0.81, internal 1.4"),
        vae=None,
    ),
    "internal-800ep": Preset(
        "SiT-XL/2 with Internal Guidance, 800 epochs",
        {**_REPA, "cfg_scale": 1.35, "guidance_high": 0.7, "internal_scale": 1.4},
        _of("internal", _XL, 800, "cfg 1.35, t <= 0.7, internal 1.4"),
        note="its script leaves the times of internal guidance unset: all, the default of its program",
    ),
}


def find(name: str) -> Preset:
    """The preset called `name`. Raises UserError with the nearest known name."""
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name}{nearest(name, PRESETS)}; choose one that generate.py --list-presets shows"
        )
    return PRESETS[name]


def settings(given: Given) -> Given:
    """All settings of the preset among the `given` options, defaults written out, as a layer below them.

    Raises:
        UserError: an unknown preset, or a given option that the preset fixes.
    """
    if (name := given.get("preset")) is None:
        return {}
    preset = find(name)
    defaults = {option.name: option.default for option in fields(SamplingConfig) if option.name != "seed"}
    count = {} if preset.samples is None else {"num_fid_samples": preset.samples}
    fixed = {**defaults, **preset.settings, **PRECISION, **count}
    if clash := [option for option in given if option in fixed]:
        raise UserError(f"--preset {name} fixes --{clash[0].replace('_', '-')}: drop one of the two")
    return fixed


def decoder(name: str | None, space: LatentSpace) -> str | None:
    """The VAE with which the preset decodes latents of `space`; None for the space's own.

    A preset names SD-VAE's decoder; latents of another family have only their own.
    """
    return find(name).vae if name is not None and space.name == "sd-vae" else None


def table() -> str:
    """The presets as a table: name, published FID, network, settings."""
    lines = [("preset", "published FID", "network", "settings")]
    for name, preset in PRESETS.items():
        words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in preset.settings.items())
        words += f" --num-fid-samples {preset.samples}" if preset.samples else ""
        decoder = f" --vae {preset.vae}" if preset.vae else ""
        note = f"  ({preset.note})" if preset.note else ""
        fid = "" if preset.published is None else f"{preset.published:.2f}"
        lines.append((name, fid, preset.network, words + " --mixed-precision no --tf32" + decoder + note))
    return aligned(lines, left=(0, 2, 3), rule=False)
