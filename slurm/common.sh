# What the batch scripts share; each sources it in the folder of the repository, where sbatch was called, and ends in
# one of `train`, `tasks_apart`, `tasks_together`. Settings: env.sh. What happens when: docs/slurm.md.
tell() { echo "megastar: $*"; }
fail() { echo "megastar: error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}${MEGASTAR_DRY_RUN:-}" ] || fail "submit it: sbatch $0 ... (MEGASTAR_DRY_RUN=1 bash $0 ... shows what would run)"
source "${MEGASTAR_ENV:-slurm/env.sh}" || fail "${MEGASTAR_ENV:-slurm/env.sh} cannot be read"
if [ -n "${MEGASTAR_MODULES:-}" ]; then
    module load $MEGASTAR_MODULES || fail "MEGASTAR_MODULES=$MEGASTAR_MODULES cannot be loaded"
fi
if [ -n "${MEGASTAR_VENV:-}" ] && [ -z "${MEGASTAR_DRY_RUN:-}" ]; then
    source "$MEGASTAR_VENV/bin/activate" || fail "MEGASTAR_VENV=$MEGASTAR_VENV is no virtual environment: make install, or set it in env.sh"
fi
set -uo pipefail # not before: what sites load reads variables that are not set
MEGASTAR_MAX_REQUEUES=${MEGASTAR_MAX_REQUEUES:-50} MEGASTAR_MAX_CRASHES=${MEGASTAR_MAX_CRASHES:-3}

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # of an array: its first task has the array's id
JOB=${JOB:-${SLURM_JOB_ID:-}}
ATTEMPT=${SLURM_RESTART_COUNT:-0}
LEDGER= # file that remembers the requeues of a run

if [ -z "$JOB" ]; then
    echo "sbatch $(sed -n 's/^#SBATCH //p' "$0" | tr '\n' ' ')$(env | sed -n 's/^SBATCH_/SBATCH_/p' | sort | tr '\n' ' ')" | sed 's/ *$//'
    MASTER_ADDR=FIRST_NODE MASTER_PORT=20000
else
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || fail "scontrol names no host of $SLURM_JOB_NODELIST"
    # Below the ports that the kernel hands out, and another one each time: an attempt that is still dying keeps its own.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * ATTEMPT) % 12000))
    LOG=$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')
    tell "job $JOB ($SLURM_JOB_NAME), start $((ATTEMPT + 1)), on $(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')at $(date '+%F %T')"
    tell "log ${LOG:-?}"
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
COLUMNS=${COLUMNS:-200} # a log file has no width, lines would be folded at 80
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS COLUMNS
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun has not read the former since 22.05

# step WORD ...: srun with the options of the site; or, dry, the command.
step() {
    local words=(srun --kill-on-bad-exit=0 ${MEGASTAR_SRUN[@]+"${MEGASTAR_SRUN[@]}"} "$@")
    if [ -n "${MEGASTAR_DRY_RUN:-}" ]; then
        printf '%q ' "${words[@]}" | sed 's/ $/\n/'
    else
        tell "${words[*]}"
        "${words[@]}"
    fi
}

# train DEFAULT [CONFIG] [section.field=value ...]: one task a GPU, one process group; does not return.
# All ranks leave a run together, hence --wait: when one died without the others noticing, they are ended after a minute.
# --kill-on-bad-exit=1 would end them at once, in the middle of the save that a signal asked for, and hide the 85.
train() {
    local config="" run="" word cache=${MEGASTAR_SCRATCH:+data.cache=$MEGASTAR_SCRATCH/megastar} default=$1
    shift
    for word; do
        case $word in
        run=*) run=${word#run=} ;;
        data.cache=*) cache="" ;;
        -* | *=*) ;;
        *) config=$word ;;
        esac
    done
    [ -n "$config" ] || set -- "${config:=$default}" "$@"
    [ -r "$config" ] || fail "$config cannot be read in $PWD: call sbatch in the repository"
    [ -n "$run" ] || run=$(sed -n "s/^run: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "$config" | head -n 1)
    LEDGER=${run:=runs/run}/requeues.log
    tell "run folder $(realpath -m "$run"), last checkpoint $(last_checkpoint)"
    step --label --wait=60 ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} megastar train "$@" ${cache:+"$cache"}
    leave $?
}

# tasks_apart COMMAND ...: processes that share a folder and no process group; one that dies ends no other.
tasks_apart() {
    step ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} "$@"
    leave $?
}

# tasks_together COMMAND ...: one process group that keeps no state of its own; when one dies, all are ended and start again.
tasks_together() {
    step --kill-on-bad-exit=1 ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} "$@"
    leave $?
}

last_checkpoint() { cat "${LEDGER%/*}/checkpoints/latest" 2>/dev/null || echo none; }

# leave STATUS: ends the script, and asks for a requeue where that helps. 85: stopped by a signal, and saved; 138 and 143:
# ended by USR1 or TERM before that could be. 2: a mistake that a person has to mend. Everything else is a crash.
leave() {
    local status=$1 why="" last=none crashes=$ATTEMPT
    case $status in
    0) exit 0 ;;
    2) exit 2 ;;
    85 | 138 | 143) why="a signal (status $status)" ;;
    *) why="a crash (status $status)" ;;
    esac
    [ -z "${MEGASTAR_DRY_RUN:-}" ] || exit "$status"
    if [ -n "$LEDGER" ] && [ -d "${LEDGER%/*}" ]; then
        last=$(last_checkpoint)
        echo "$(date '+%F %T') job $JOB start $((ATTEMPT + 1)) on $SLURM_JOB_NODELIST ended by $why, checkpoint $last" >>"$LEDGER"
        crashes=$(tac "$LEDGER" | awk -v same="checkpoint $last" '!/ended by a crash/ || substr($0, length($0) - length(same) + 1) != same {exit} {n++} END {print n - 1}')
    fi
    # A job that someone cancelled stays so: scontrol would bring it back.
    scontrol show job "$JOB" | grep -q 'JobState=RUNNING' || { tell "ended by $why while SLURM ends the job"; exit "$status"; }
    if [ "$ATTEMPT" -ge "$MEGASTAR_MAX_REQUEUES" ]; then
        tell "ended by $why; not started again: MEGASTAR_MAX_REQUEUES=$MEGASTAR_MAX_REQUEUES is reached"
    elif [[ $why == *crash* ]] && [ "$crashes" -ge "$MEGASTAR_MAX_CRASHES" ]; then
        tell "ended by $why; not started again: $MEGASTAR_MAX_CRASHES crashes before this one, checkpoint $last all the time"
    else
        tell "ended by $why; requeued"
        scontrol requeue "$JOB" || tell "the requeue was refused: sbatch the same command, it goes on"
    fi
    exit "$status"
}
