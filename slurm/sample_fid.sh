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
# sbatch slurm/sample_fid.sh RUN|WEIGHTS --tokenizer FILE --npz OUT.npz [options of megastar sample]   (50,000 images)
# After a training job, from its run folder's last checkpoint:
#     job=$(sbatch --parsable slurm/train_xl.sh)
#     sbatch --dependency=afterok:$job slurm/sample_fid.sh runs/star_xl_50ep --tokenizer FILE --npz xl.npz
# It stays pending during the training's requeues. --kill-on-invalid-dep=yes cancels it if the training fails; otherwise it
# would stay in the queue forever (DependencyNeverSatisfied).
# The ranks share the folder of the .npz but no process group: if one dies, the others continue, rank 0 samples the missing
# images, and a requeued job resumes where this one stopped. With --real REFERENCE --inception FILE --score OUT.json instead
# of --npz they form a process group for scoring (docs/sampling.md) and end together; --folder FOLDER then keeps the images.
source slurm/common.sh || exit 2
[ $# -gt 0 ] || fail "usage: sbatch slurm/sample_fid.sh RUN|WEIGHTS --tokenizer FILE --npz OUT.npz [options]"
case " $* " in *" --score"*) run_group python tools/sample_fid.py "$@" ;; esac
run_independent python tools/sample_fid.py "$@"
