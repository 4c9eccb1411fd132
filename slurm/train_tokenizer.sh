#!/bin/bash
#SBATCH --job-name=megastar-tokenizer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch slurm/train_tokenizer.sh [CONFIG] [field=value ...]   (default: configs/tokenizer/vq16_imagenet256.yaml)
source slurm/common.sh || exit 2
train_tokenizer configs/tokenizer/vq16_imagenet256.yaml "$@"
