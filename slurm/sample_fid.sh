#!/bin/bash
#SBATCH --job-name=megastar-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --kill-on-invalid-dep=yes
# sbatch slurm/sample_fid.sh RUN|WEIGHTS --tokenizer FILE --npz OUT.npz [options of megastar sample]   (50,000 pictures)
# After a training job, from its run folder's last checkpoint:
#     job=$(sbatch --parsable slurm/train_xl.sh)
#     sbatch --dependency=afterok:$job slurm/sample_fid.sh runs/star_xl_50ep --tokenizer FILE --npz xl.npz
# It waits through the training's requeues. --kill-on-invalid-dep=yes cancels it when the training failed; without it, it
# would stay in the queue for ever (DependencyNeverSatisfied).
# The ranks share the folder of the .npz and no process group: one that dies does not end the others, rank 0 draws what
# it left, and a requeued job goes on where this one stopped. With --real REFERENCE --inception FILE --score OUT.json instead
# of --npz they meet to score (docs/sampling.md), and end together; --folder FOLDER then keeps what was drawn.
source slurm/common.sh || exit 2
[ $# -gt 0 ] || fail "usage: sbatch slurm/sample_fid.sh RUN|WEIGHTS --tokenizer FILE --npz OUT.npz [options]"
case " $* " in *" --score"*) tasks_together python tools/sample_fid.py "$@" ;; esac
tasks_apart python tools/sample_fid.py "$@"
