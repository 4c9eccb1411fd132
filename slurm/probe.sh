#!/bin/bash
#SBATCH --job-name=megastar-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch slurm/probe.sh RUN ... --val-shards FOLDER --cache FOLDER --out probe.json [options of megastar probe]
# One process on one GPU. With --cache a requeued job reads the features that it had finished.
# After a training job: sbatch --dependency=afterok:JOBID slurm/probe.sh ...   MEGASTAR_DRY_RUN=1 shows the command instead.
source slurm/env.sh
[ $# -gt 0 ] || { echo "usage: sbatch slurm/probe.sh RUN ... --val-shards FOLDER [options]" >&2; exit 2; }
${MEGASTAR_DRY_RUN:+echo} srun megastar probe "$@"
