"""A chain as a job for Slurm: one sbatch file for all seeds, which continues where it was stopped."""

from __future__ import annotations

import shlex


def script(row: str, scale: str, seeds: range, nodes: int, gpus: int, hours: float, work: str, results: str) -> str:
    """The text of an sbatch file that runs `row` at a scale under `seeds` as an array.

    Slurm sends SIGUSR1 ten minutes before the time is over. The run then saves and exits with code 75, and the script
    queues it again; the chain continues from there.
    """
    array, minutes = f"{seeds.start}-{seeds.stop - 1}", round(hours * 60)
    work, results, log = map(shlex.quote, (work, results, f"{work}/slurm-%A_%a.out"))
    return f"""#!/bin/bash
#SBATCH --job-name={row.replace("/", "-")}
#SBATCH --array={array}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={gpus * 8}
#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

set -u
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

python -m recipes run {row} --scale {scale} --seeds "$SLURM_ARRAY_TASK_ID" \\
    --processes {gpus} --nodes {nodes} --work {work} --results {results} &
chain=$!
trap 'kill -USR1 $chain' USR1
wait $chain; code=$?
[ $code -gt 128 ] && {{ wait $chain; code=$?; }}   # the signal cut the first wait short
if [ $code -eq 75 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit $code
"""
