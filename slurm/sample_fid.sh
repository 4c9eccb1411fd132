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
# it left, and a requeued job goes on where this one stopped. With --real REFERENCE --inception FILE --score OUT.json instead
# of --npz they meet to score (docs/sampling.md), and end together.
# After a training job: sbatch --dependency=afterok:JOBID slurm/sample_fid.sh ...   MEGASTAR_DRY_RUN=1 shows the command.
source slurm/env.sh
[ $# -gt 0 ] || { echo "usage: sbatch slurm/sample_fid.sh WEIGHTS --tokenizer FILE --npz OUT.npz [options]" >&2; exit 2; }
together=0
case " $* " in *" --score"*) together=1 ;; esac
${MEGASTAR_DRY_RUN:+echo} srun --kill-on-bad-exit=$together python tools/sample_fid.py "$@"
