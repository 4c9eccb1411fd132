#!/bin/bash
#SBATCH --job-name=megastar-3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch slurm/train_3b.sh [CONFIG] [section.field=value ...]   (default: configs/run/star_3b.yaml)
source slurm/common.sh || exit 2
train configs/run/star_3b.yaml "$@"
