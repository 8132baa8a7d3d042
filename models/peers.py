"""Flags of the authors' code, REPA, SiT and LightningDiT that do not exist here: replies and translations."""

from __future__ import annotations

from runtime.foreign import Hint

# The flag -> what to write instead, or why there is nothing to write. Flags that mean the same there and here are
# options under their own names, and are never looked up in this table, except for a value that is other here.
PEERS: dict[str, Hint] = {
    # data
    "--resolution": Hint("the latent set knows its resolution; it is given to preprocessing.encode"),
    "--num-classes": Hint("the latent set and the checkpoint know their classes"),
    "--num-workers": Hint(
        "nothing to set: rows are read two steps ahead, images decoded by a thread for each core",
    ),
    "--data-path": Hint("write --data-dir", ("--data-dir", "VALUE")),
    # network
    "--fused-attn": Hint("attention is always fused (scaled_dot_product_attention)"),
    "--legacy": Hint("nothing to set: old layouts are recognised by python -m models.convert"),
    "--resume-step": Hint("run the same command again: it continues from its latest checkpoint"),
    # method
    "--enc-type": Hint(
        "write --align repa --align-encoder NAME (default: dinov2-vit-b); this project's method needs no encoder",
        ("--align", "repa", "--align-encoder", "VALUE"),
    ),
    "--encoder-depth": Hint(
        "write --align-depth N with --align repa (or latent); a checkpoint knows its own when sampling",
        ("--align-depth", "VALUE"),
    ),
    "--proj-coeff": Hint("write --align-weight W", ("--align-weight", "VALUE")),
    "--projector-embed-dims": Hint("nothing to set: heads are stored separately and never loaded for sampling"),
    "--path-type": Hint("the interpolant is the linear one; REPA's cosine path is not offered"),
    "--prediction": Hint("networks predict the velocity; there is no other prediction"),
    "--weighting": Hint(
        "the loss is weighted uniformly over t; for other times see --time-sampling (logit-normal)",
    ),
    "--class-dropout-prob": Hint("write --cfg-prob P", ("--cfg-prob", "VALUE")),
    "--omega": Hint("write --guide-scale OMEGA (train_guide.py)", ("--guide-scale", "VALUE")),
    "--cfg-guide": Hint("write --guide-scale OMEGA (train_guide.py)", ("--guide-scale", "VALUE")),
    "--stu-depth": Hint("write --guided-depth N (train_guide.py)", ("--guided-depth", "VALUE")),
    "--tea-depth": Hint("write --guiding-depth N (train_guide.py)", ("--guiding-depth", "VALUE")),
    "--ckpt-guided-model": Hint(
        "write --guiding-ckpt RUN@STEP (train_guide.py); a .pt file goes through python -m models.convert first",
        ("--guiding-ckpt", "VALUE"),
    ),
    "--t-range": Hint(
        "write --align-interval A B; the authors' code does not select these times but weighs the loss by their share: "
        "--align-mask upstream",
        ("--align-interval", "VALUE", "--align-mask", "upstream"),
    ),
    "--stop-epoch": Hint(
        "write --align-stop-steps N: the authors' --stop-epoch counts optimiser steps", ("--align-stop-steps", "VALUE")
    ),
    # optimisation and precision
    "--epochs": Hint(
        "write --max-train-steps N: steps per epoch are printed at the start", ("--max-train-steps", "STEPS")
    ),
    "--global-batch-size": Hint("write --batch-size N: it is global here", ("--batch-size", "VALUE")),
    "--allow-tf32": Hint(
        "nothing to set beside bf16, the default where the hardware has it; for float32: --mixed-precision no --tf32",
    ),
    "--mixed-precision=fp16": Hint("write --mixed-precision bf16: fp16 overflows here", ("--mixed-precision", "bf16")),
    "--lr": Hint("write --learning-rate", ("--learning-rate", "VALUE")),
    "--use-8bit-adam": Hint(
        "optimiser states are float32 here (--optimizer adamw or muon); 8-bit states are not offered"
    ),
    # run and log
    "--logging-dir": Hint("logs go into the run's folder, OUTPUT_DIR/EXP_NAME/log.jsonl"),
    "--results-dir": Hint("write --output-dir", ("--output-dir", "VALUE")),
    "--ckpt-every": Hint("write --checkpointing-steps N", ("--checkpointing-steps", "VALUE")),
    "--log-every": Hint("write --log-steps N", ("--log-steps", "VALUE")),
    "--sample-every": Hint("write --sampling-steps N", ("--sampling-steps", "VALUE")),
    "--wandb": Hint("write --report-to wandb", ("--report-to", "wandb")),
    "--resume": Hint("run the same command again: it continues from its latest checkpoint"),
    # sampling
    "--model": Hint("the checkpoint knows its network"),
    "--per-proc-batch-size": Hint("write --batch-size N: in generate.py it is per process", ("--batch-size", "VALUE")),
    "--sample-dir": Hint("write --out FOLDER", ("--out", "VALUE")),
    "--global-seed": Hint("write --seed N", ("--seed", "VALUE")),
    "--heun": Hint("write --mode ode --solver heun", ("--mode", "ode", "--solver", "heun")),
    "--sampling-method": Hint(
        "write --solver euler, heun, heun2 or dopri5 (with --mode ode)", ("--mode", "ode", "--solver", "VALUE")
    ),
    "--num-sampling-steps": Hint("write --num-steps N", ("--num-steps", "VALUE")),
    "--qk-norm": Hint("the checkpoint knows whether its network has QK-norm"),
    "--vae=ema": Hint(
        "write --vae stabilityai/sd-vae-ft-ema (default: the one that the checkpoint names)",
        ("--vae", "stabilityai/sd-vae-ft-ema"),
    ),
    "--vae=mse": Hint(
        "write --vae stabilityai/sd-vae-ft-mse (default: the one that the checkpoint names)",
        ("--vae", "stabilityai/sd-vae-ft-mse"),
    ),
}

# Options of the sampling commands that REPA's generate.py and train.py alike take to describe a network.
OF_NETWORKS = ("--encoder-depth", "--proj-coeff", "--enc-type")

# For commands that sample: their checkpoint describes the network, so nothing is written in place of these.
SAMPLING: dict[str, Hint] = PEERS | {flag: Hint(PEERS[flag].reply) for flag in OF_NETWORKS}
