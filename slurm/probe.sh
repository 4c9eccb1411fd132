#!/bin/bash
#SBATCH --job-name=megastar-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --kill-on-invalid-dep=yes
# sbatch [--dependency=afterok:JOB] slurm/probe.sh RUN|WEIGHTS ... --val-shards FOLDER [options of megastar probe]
# One process on one GPU. With --cache FOLDER a requeued job reuses the features.
source slurm/common.sh || exit 2
[ $# -gt 0 ] || fail "usage: sbatch slurm/probe.sh RUN|WEIGHTS ... --val-shards FOLDER [options]"
run_independent megastar probe "$@"
