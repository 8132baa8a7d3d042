"""Sampling presets, named after the published number that they reproduce: `generate.py --preset NAME`.

A preset fixes all that moves FID besides the weights themselves: solver, steps, last step, shift, guidance and its interval
and channels, which weights, decoder, rounding, labels. FIDs are of 50,000 samples of ImageNet 256 under ADM's evaluator.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from config import SamplingConfig
from runtime.errors import UserError, nearest

SD_VAE = "stabilityai/sd-vae-ft-ema"
FREE = ("seed",)


@dataclass(frozen=True)
class Preset:
    """Settings of `SamplingConfig`, decoder, and what was published under them."""

    published: float
    network: str
    settings: dict[str, Any]
    vae: str | None = SD_VAE
    """Decoder; None is the one that the checkpoint names (VA-VAE)."""
    note: str = ""


_SDE = {"mode": "sde", "num_steps": 250, "last_step": 0.04}
_LIGHTNING = {"mode": "ode", "solver": "euler", "num_steps": 250, "grid": "points", "timestep_shift": 0.3,
              "guidance_channels": "first3"}

PRESETS: dict[str, Preset] = {
    "repa-nocfg": Preset(5.90, "REPA SiT-XL/2, 4M steps", {**_SDE, "rounding": "truncate"}),
    "repa-cfg": Preset(1.42, "REPA SiT-XL/2, 4M steps",
                       {**_SDE, "cfg_scale": 1.8, "guidance_high": 0.7, "rounding": "truncate"}),
    "sit-cfg-sde": Preset(2.06, "SiT-XL/2, 7M steps", {**_SDE, "cfg_scale": 1.5, "guidance_channels": "first3"}),
    "sit-cfg-ode": Preset(2.15, "SiT-XL/2, 7M steps", {"mode": "ode", "solver": "dopri5", "cfg_scale": 1.5,
                                                       "guidance_channels": "first3"}, note="attribution not certain"),
    "lightningdit-64ep": Preset(2.11, "LightningDiT-XL/1, 64 epochs",
                                {**_LIGHTNING, "cfg_scale": 10.0, "guidance_high": 0.9}, vae=None),
    "lightningdit-800ep": Preset(1.35, "LightningDiT-XL/1, 800 epochs",
                                 {**_LIGHTNING, "cfg_scale": 6.7, "guidance_high": 0.875}, vae=None),
    "self-transcendence-cfg": Preset(1.44, "Self-Transcendence SiT-XL/2, 400 epochs",
                                     {**_SDE, "cfg_scale": 1.9, "guidance_high": 0.65, "rounding": "truncate"}),
}


def settings(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of the preset `name`, defaults written out.

    Raises:
        UserError: no such preset, or a given option that the preset fixes.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name}{nearest(name, PRESETS)}; --list-presets shows them")
    fixed = [field.name for field in fields(SamplingConfig) if field.name not in FREE]
    clash = [option for option in given if option in fixed]
    if clash:
        raise UserError(f"--preset {name} fixes --{clash[0].replace('_', '-')}: drop one of the two")
    preset = PRESETS[name]
    defaults = {field.name: field.default for field in fields(SamplingConfig) if field.name in fixed}
    return {**defaults, **preset.settings, **({"vae": preset.vae} if preset.vae else {})}


def table() -> str:
    """The presets, aligned."""
    lines = [("preset", "published FID", "network", "settings")]
    for name, preset in PRESETS.items():
        said = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in preset.settings.items())
        decoder = f" --vae {preset.vae}" if preset.vae else ""
        lines.append((name, f"{preset.published:.2f}", preset.network, said + decoder + (f"  ({preset.note})" if preset.note else "")))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([name.ljust(widths[0]), fid.rjust(widths[1]), network.ljust(widths[2]), said])
                     for name, fid, network, said in lines)
