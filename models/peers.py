"""Replies for flags of REPA, SiT and LightningDiT that do not exist here."""

from __future__ import annotations

# The flag -> what to write instead, or why there is nothing to write. Flags that mean the same there and here are
# options under their own names, and are never looked up in this table.
PEERS: dict[str, str] = {
    # data
    "--resolution": "the latent set knows its resolution; it is given to preprocessing.encode",
    "--num-classes": "the latent set and the checkpoint know their classes",
    "--num-workers": "nothing to set: rows are read two steps ahead, images decoded by a thread for each core",
    "--data-path": "write --data-dir",
    # network
    "--fused-attn": "attention is always fused (scaled_dot_product_attention)",
    "--legacy": "nothing to set: old layouts are recognised by python -m models.convert",
    "--resume-step": "run the same command again: it continues from its latest checkpoint",
    # method
    "--enc-type": (
        "write --align repa --align-encoder NAME (default: dinov2-vit-b); this project's method needs no encoder"
    ),
    "--encoder-depth": "write --align-depth N with --align repa (or latent); a checkpoint knows its own when sampling",
    "--proj-coeff": "write --align-weight W",
    "--projector-embed-dims": "nothing to set: heads are stored separately and never loaded for sampling",
    "--path-type": "the interpolant is the linear one; REPA's cosine path is not offered",
    "--prediction": "networks predict the velocity; there is no other prediction",
    "--weighting": "the loss is weighted uniformly over t; for other times see --time-sampling (logit-normal)",
    "--class-dropout-prob": "write --cfg-prob P",
    "--omega": "write --guide-scale OMEGA (train_guide.py)",
    "--stop-epoch": "write --align-stop-steps N: the authors' --stop-epoch counts optimiser steps",
    # optimisation and precision
    "--epochs": "write --max-train-steps N: steps per epoch are printed at the start",
    "--global-batch-size": "write --batch-size N: it is global here",
    "--allow-tf32": "write --mixed-precision no --tf32; bf16 is the default where the hardware has it",
    "--lr": "write --learning-rate",
    "--use-8bit-adam": "optimiser states are float32 here (--optimizer adamw or muon); 8-bit states are not offered",
    # run and log
    "--logging-dir": "logs go into the run's folder, OUTPUT_DIR/EXP_NAME/log.jsonl",
    "--results-dir": "write --output-dir",
    "--ckpt-every": "write --checkpointing-steps N",
    "--log-every": "write --log-steps N",
    "--sample-every": "write --sampling-steps N",
    "--wandb": "write --report-to wandb",
    "--resume": "run the same command again: it continues from its latest checkpoint",
    # sampling
    "--model": "the checkpoint knows its network",
    "--per-proc-batch-size": "write --batch-size N: in generate.py it is per process",
    "--sample-dir": "write --out FOLDER",
    "--global-seed": "write --seed N",
    "--heun": "write --mode ode --solver heun",
    "--sampling-method": "write --solver euler, heun, heun2 or dopri5 (with --mode ode)",
    "--num-sampling-steps": "write --num-steps N",
    "--qk-norm": "the checkpoint knows whether its network has QK-norm",
}
