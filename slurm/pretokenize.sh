#!/bin/bash
#SBATCH --job-name=megastar-pretokenize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --array=0-3
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# sbatch slurm/pretokenize.sh SOURCE --tokenizer FILE --out FOLDER [...]   (megastar pretokenize --help)
# Each task of each job takes the next unfinished shard, so any --array and any number of tasks work, and jobs may start late,
# end early or be requeued. At the time limit only the shards in progress are lost; the requeued job creates them again.
source slurm/common.sh || exit 2
[ $# -gt 0 ] || fail "usage: sbatch slurm/pretokenize.sh SOURCE --tokenizer FILE --out FOLDER [options]"
run_independent megastar pretokenize "$@"
