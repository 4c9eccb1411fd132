#!/bin/bash
#SBATCH --job-name=megastar-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch slurm/sample_fid.sh WEIGHTS --tokenizer FILE --npz OUT.npz [options of megastar sample]   (50,000 pictures)
# The ranks share the folder of the .npz and no process group: one that dies does not end the others, rank 0 draws what
# it left, and a requeued job goes on where this one stopped.
source slurm/env.sh
[ $# -gt 0 ] || { echo "usage: sbatch slurm/sample_fid.sh WEIGHTS --tokenizer FILE --npz OUT.npz [options]" >&2; exit 2; }
srun --kill-on-bad-exit=0 python tools/sample_fid.py "$@"
