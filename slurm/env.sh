# Sourced by every batch script, in the folder from which sbatch was called (the repository).
# Sites set partitions, accounts and modules here or on sbatch's command line.
set -uo pipefail
source .venv/bin/activate
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

# train CONFIG [section.field=value ...]: one task a GPU; ends the batch script with the run's status.
# A run that a signal stopped has saved and ends with 85: SLURM takes a clean exit for a finished job, so the script
# asks for the requeue itself, MAX_RESTARTS times at most. All ranks end together, hence --wait and no kill at the
# first one: its kill would hide the 85.
train() {
    local status=0
    srun --kill-on-bad-exit=0 --wait=60 megastar train "$@" || status=$?
    if [ "$status" -eq 85 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-50}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
