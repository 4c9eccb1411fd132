#!/bin/bash
#SBATCH --job-name=megastar-pretokenize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --array=0-3
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# sbatch slurm/pretokenize.sh SOURCE --tokenizer FILE --out FOLDER [...]   (megastar pretokenize --help)
# Each task of each job takes the next unfinished shard: any --array, any number of tasks, jobs that start late, end early
# or are requeued. MEGASTAR_DRY_RUN=1 shows the command instead.
source slurm/env.sh
${MEGASTAR_DRY_RUN:+echo} srun --kill-on-bad-exit=0 megastar pretokenize "$@"
