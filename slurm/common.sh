# Common code of the batch scripts. Each sources it in the repository folder, where sbatch was called, and ends with
# `train`, `run_independent` or `run_group`. Settings: env.sh. Behaviour on failures: docs/slurm.md.
info() { echo "megastar: $*"; }
fail() { echo "megastar: error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}${MEGASTAR_DRY_RUN:-}" ] || fail "not in a SLURM job: submit with sbatch $0 ... (MEGASTAR_DRY_RUN=1 bash $0 ... prints the command)"
source "${MEGASTAR_ENV:-slurm/env.sh}" || fail "${MEGASTAR_ENV:-slurm/env.sh} cannot be read"
if [ -n "${MEGASTAR_MODULES:-}" ]; then
    module load $MEGASTAR_MODULES || fail "MEGASTAR_MODULES=$MEGASTAR_MODULES cannot be loaded"
fi
if [ -n "${MEGASTAR_VENV:-}" ] && [ -z "${MEGASTAR_DRY_RUN:-}" ]; then
    source "$MEGASTAR_VENV/bin/activate" || fail "MEGASTAR_VENV=$MEGASTAR_VENV is not a virtual environment: run make install, or set MEGASTAR_VENV in env.sh"
fi
set -uo pipefail # only now: site modules may read unset variables
MEGASTAR_MAX_REQUEUES=${MEGASTAR_MAX_REQUEUES:-50} MEGASTAR_MAX_CRASHES=${MEGASTAR_MAX_CRASHES:-3}
MEGASTAR_MAX_SIGNALS=${MEGASTAR_MAX_SIGNALS:-10} MEGASTAR_RETRY=${MEGASTAR_RETRY:-10}
source slurm/bad_hosts.sh || exit 2

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # not SLURM_JOB_ID: that of an array's first task is the array's id
JOB=${JOB:-${SLURM_JOB_ID:-}}
ATTEMPT=${SLURM_RESTART_COUNT:-0}
PREEMPTED=85 # exit status of megastar train after a stop signal and a completed save
REQUEUE_LOG= # requeues.log of a training's run folder
USER_EXCLUDED="" BAD="" HOST="" EXCLUDED_KNOWN=""
TIME_LIMIT="" SIGNAL_LEAD="" # seconds: of the job, and the part that --signal reserves for the save
SEPARATE_STDERR= # set if sbatch writes stderr to a separate file

if [ -z "$JOB" ]; then
    echo "sbatch $(sed -n 's/^#SBATCH //p' "$0" | tr '\n' ' ')$(env | sed -n 's/^SBATCH_/SBATCH_/p' | sort | tr '\n' ' ')" | sed 's/ *$//'
    MASTER_ADDR=FIRST_NODE MASTER_PORT=20000
else
    NODES=$(with_retry scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot expand SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
    MASTER_ADDR=${NODES%%$'\n'*}
    # Below the kernel's ephemeral ports, and different for each start, since processes of the previous start may still use its port.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * ATTEMPT) % 12000))
    LOG=$(with_retry scontrol show job "$JOB" | sed -n 's/^ *\(StdOut\|StdErr\)=//p' | sort -u)
    [[ $LOG != *$'\n'* ]] || LOG=$(with_retry scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p') SEPARATE_STDERR=1
    info "job $JOB ($SLURM_JOB_NAME), start $((ATTEMPT + 1)), on $(tr '\n' ' ' <<<"$NODES")at $(date '+%F %T')"
    info "log ${LOG:-?}"
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
COLUMNS=${COLUMNS:-200} # a log file has no width: lines would wrap at 80
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS COLUMNS
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since 22.05 srun does not read SLURM_CPUS_PER_TASK

# run_step WORD ...: run srun with the options of the site; in a dry run, print the command.
run_step() {
    local words=(srun --kill-on-bad-exit=0 ${MEGASTAR_SRUN[@]+"${MEGASTAR_SRUN[@]}"} "$@")
    if [ -n "${MEGASTAR_DRY_RUN:-}" ]; then
        printf '%q ' "${words[@]}" | sed 's/ $/\n/'
    else
        info "$(printf '%q ' "${words[@]}" | sed 's/ $//')"
        "${words[@]}"
    fi
}

COMMAND=train FOLDER_FIELD=run # of the training, and its field that names the run folder
# train DEFAULT [CONFIG] [section.field=value ...]: one task per GPU, one process group; does not return.
# If one rank has exited and the others have not detected it, --wait ends them after twice the timeout of their watchdogs
# (faults.lost_timeout).
# --kill-on-bad-exit=1 would end them immediately, during the save requested by a signal, and hide status 85.
train() {
    local config="" word cache=${MEGASTAR_SCRATCH:+data.cache=$MEGASTAR_SCRATCH/megastar} default=$1
    shift
    [ "$COMMAND" = train ] || cache=""
    for word; do
        case $word in
        data.cache=*) cache="" ;;
        -*) ;;
        *=*) [[ ${word%%=*} != */* && ! -f $word ]] || config=$word ;; # a file in a folder whose name has an =
        *) config=$word ;;
        esac
    done
    [ -n "$config" ] || set -- "${config:=$default}" "$@"
    [ -r "$config" ] || fail "$config cannot be read in $PWD: run sbatch in the repository folder"
    find_run_folder "$@"
    [ -z "$JOB" ] || [ -n "${MEGASTAR_DRY_RUN:-}" ] || prepare_start
    if [ -n "${MEGASTAR_ELASTIC:-}" ]; then
        run_elastic "$@" ${cache:+"$cache"}
        finish $?
    fi
    run_step --label --wait=120 ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} megastar "$COMMAND" "$@" ${cache:+"$cache"}
    finish $?
}

# train_tokenizer DEFAULT [CONFIG] [field=value ...]: `train` for megastar train-tokenizer, whose run folder is the field out.
train_tokenizer() {
    [ -z "${MEGASTAR_ELASTIC:-}" ] || fail "MEGASTAR_ELASTIC=$MEGASTAR_ELASTIC: megastar elastic runs megastar train only; unset it"
    COMMAND=train-tokenizer FOLDER_FIELD=out
    train "$@"
}

# run_elastic [CONFIG] [section.field=value ...]: one agent per node, which starts the node's ranks (docs/elastic.md). Needs
# sbatch --no-kill: otherwise SLURM ends the job when it detects the lost node. --wait=0: a node that ends does not end the others.
run_elastic() {
    local status file=${REQUEUE_LOG%/*}/elastic.status ranks=${SLURM_NTASKS_PER_NODE:-1}
    [ -n "${MEGASTAR_DRY_RUN:-}" ] || rm -f -- "$file"
    run_step --label --no-kill --wait=0 --ntasks-per-node=1 --ntasks="${SLURM_NNODES:-1}" \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$((SLURM_CPUS_PER_TASK * ranks))} \
        ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} megastar elastic --nodes "$MEGASTAR_ELASTIC" --nproc "$ranks" \
        --hosts "$(paste -sd, <<<"${NODES:-FIRST_NODE}")" --port "$MASTER_PORT" --status-file "$file" "$@"
    status=$?
    [ ! -s "$file" ] || status=$(tail -n 1 "$file") # srun's status may be that of the lost node
    return "$status"
}

# run_independent COMMAND ...: processes that share a folder but no process group; if one dies, the others continue.
run_independent() {
    run_step ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} "$@"
    finish $?
}

# run_group COMMAND ...: one process group without state of its own; if one process dies, all are ended and restarted.
run_group() {
    run_step --kill-on-bad-exit=1 ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} "$@"
    finish $?
}

# find_run_folder WORD ...: set REQUEUE_LOG. megastar itself reads the configuration, in the environment of the ranks.
find_run_folder() {
    local word run="" ask=(megastar "$COMMAND" "$@" --print-run-folder) status=0
    ask=(${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} "${ask[@]}")
    if [ -n "${MEGASTAR_DRY_RUN:-}" ]; then
        [ -z "${MEGASTAR_VENV:-}" ] || PATH=$MEGASTAR_VENV/bin:$PATH
        if ! command -v "${ask[0]}" >/dev/null; then # on a login node: only an override can be shown
            for word; do [[ $word != "$FOLDER_FIELD="* ]] || run=$(realpath -m "${word#*=}"); done
            info "run folder ${run:-unknown (${ask[0]} is not on PATH)}, last checkpoint $(REQUEUE_LOG=${run:-}/requeues.log && last_checkpoint)"
            return
        fi
    elif [ -n "${MEGASTAR_SRUN[*]-}" ]; then # a container
        ask=(env -u SLURM_LABELIO srun --nodes=1 --ntasks=1 "${MEGASTAR_SRUN[@]}" "${ask[@]}")
    fi
    run=$(timeout -k 10 "${MEGASTAR_ASK_TIMEOUT:-600}" "${ask[@]}") || status=$?
    [ "$status" = 0 ] || { info "the run folder cannot be determined (status $status; 124: no answer within ${MEGASTAR_ASK_TIMEOUT:-600} s)"; finish "$status"; }
    run=$(grep -a '^/' <<<"$run" | tail -n 1) # modules or a prefix may print other lines
    [ -n "$run" ] || { info "${ask[*]} did not print the run folder: check MEGASTAR_PREFIX"; finish 1; }
    REQUEUE_LOG=$run/requeues.log
    info "run folder $run, last checkpoint $(last_checkpoint)"
}

# A tokenizer's training has one checkpoint, which it replaces: its time tells whether there is a new one.
last_checkpoint() {
    cat "${REQUEUE_LOG%/*}/checkpoints/latest" 2>/dev/null ||
        date -r "${REQUEUE_LOG%/*}/last.pt" '+last.pt-%FT%T' 2>/dev/null || echo none
}

# prepare_start: called before training starts. Warns if the time limit is too short to train; records the failed host if the batch
# script of the previous start ended without a message, because its own node failed; requeues the job if its allocation contains
# hosts that must be excluded, which SLURM does not know when a new job is submitted.
prepare_start() {
    local before bad lost=""
    case ${SBATCH_SIGNAL:-} in *@*) SIGNAL_LEAD=${SBATCH_SIGNAL##*@} ;; *) SIGNAL_LEAD=$(sed -n 's/^#SBATCH --signal=.*@//p' "$0") ;; esac
    TIME_LIMIT=$(seconds_of "$(job_field TimeLimit)")
    if [ -n "$SIGNAL_LEAD" ] && [ -n "$TIME_LIMIT" ] && [ "$TIME_LIMIT" -lt $((SIGNAL_LEAD + 60)) ]; then
        info "warning: the last $SIGNAL_LEAD s of the time limit of $TIME_LIMIT s are reserved for the save, and SLURM checks every 30 s: almost no step will run; request a longer --time"
    fi
    [ -d "${REQUEUE_LOG%/*}" ] || return 0
    before=$(last_line)
    if [ "$ATTEMPT" -gt 0 ] && [[ $before != *" job $JOB start $ATTEMPT on "* ]]; then
        before=$(grep -F "megastar: job $JOB (" "$LOG" 2>/dev/null | sed -n "s/.*, start $ATTEMPT, on \(.*\) at [-0-9]* [:0-9]*$/\1/p" | tail -n 1)
        # If the node of the batch script failed, the log ends abruptly, without a message of SLURM.
        [ -n "$SEPARATE_STDERR" ] || start_log "$ATTEMPT" | grep -c -e ' CANCELLED AT ' -e '^megastar: ended by' >/dev/null || lost=${before%% *}
        [ -z "$before" ] || record_failed_host "$ATTEMPT" "$(tr ' ' ',' <<<"$before")" "$lost"
        [ -z "$HOST" ] || info "start $ATTEMPT failed on $HOST, see ${REQUEUE_LOG%/*}/bad_hosts.log"
    fi
    HOST=""
    choose_excluded
    bad=$(expand_hosts "$SLURM_JOB_NODELIST" | grep -xF -f <(printf '%s\n' "$BAD" | sed '/^$/d') | paste -sd ' ')
    # Only once: if SLURM allocates such a host despite the list, it is used.
    if [ -n "$bad" ] && [[ $(last_line) != *" job $JOB start "*" ended by a bad host "* ]]; then
        requeue "a bad host in its allocation ($bad)"
        exit "$PREEMPTED"
    fi
}

# seconds_of [D-]HH:MM:SS: prints nothing for UNLIMITED.
seconds_of() {
    local h m s days=0 time=$1
    [[ $time == *:* ]] || return 0
    [[ $time != *-* ]] || { days=${time%%-*} time=${time#*-}; }
    IFS=: read -r h m s <<<"$time"
    echo $(((days * 24 + 10#$h) * 3600 + 10#$m * 60 + 10#$s))
}
last_line() { tail -n 1 "$REQUEUE_LOG" 2>/dev/null; }

# finish STATUS: end the script, and request a requeue if that helps. 85: stopped by a signal, and saved; 138 and 143: ended by
# USR1 or TERM before it could save; 2: a user error; every other status is a crash.
finish() {
    local status=$1 why
    case $status in
    0) exit 0 ;;
    2)
        info "ended by a user error (status 2); not requeued"
        exit 2
        ;;
    "$PREEMPTED" | 138 | 143) why="a signal (status $status)" ;;
    *) why="a crash (status $status)" ;;
    esac
    [[ $why != *signal* ]] || ! at_time_limit || why="a signal at the time limit (status $status)"
    [ -z "${MEGASTAR_DRY_RUN:-}" ] || exit "$status"
    requeue "$why"
    exit "$status"
}

# at_time_limit: whether the job has used its time, up to what --signal reserves for the save (SLURM checks every 30 s).
at_time_limit() { [ -n "$TIME_LIMIT" ] && [ "$SECONDS" -ge $((TIME_LIMIT - ${SIGNAL_LEAD:-0} - 45)) ]; }

# requeue WHY: requeue the job unless it was cancelled or has reached a limit.
requeue() {
    local why=$1 last=none earlier=$ATTEMPT limit=$MEGASTAR_MAX_REQUEUES details="" stuck="" state
    if [ -n "$REQUEUE_LOG" ] && [ -d "${REQUEUE_LOG%/*}" ]; then
        [[ $why != *crash* ]] || record_failed_host $((ATTEMPT + 1)) "$SLURM_JOB_NODELIST"
        choose_excluded
        details=${HOST:+, host $HOST}${BAD:+, excluding $(paste -sd ' ' <<<"$BAD")} last=$(last_checkpoint)
        echo "$(date '+%F %T') job $JOB start $((ATTEMPT + 1)) on $SLURM_JOB_NODELIST ended by $why$details, checkpoint $last" >>"$REQUEUE_LOG"
        # Number of earlier ends of this kind since the last new checkpoint.
        earlier=$(tac "$REQUEUE_LOG" | awk -v same=", checkpoint $last" -v kind="ended by ${why% (*}" '
            substr($0, length($0) - length(same) + 1) != same {exit} index($0, kind) {n++} END {print n - 1}')
        stuck=" since checkpoint $last"
    elif [ -r "$LOG" ]; then
        earlier=$(grep -c "^megastar: ended by ${why% (*}" "$LOG")
    fi
    case $why in
    *crash*) limit=$MEGASTAR_MAX_CRASHES ;;
    *"time limit"*) [ -z "$REQUEUE_LOG" ] || limit=1 ;; # the second one: more starts of this length make no progress
    *signal*) [ -z "$REQUEUE_LOG" ] || limit=$MEGASTAR_MAX_SIGNALS ;; # without a run folder, progress between signals is unknown
    esac
    # Do not requeue a cancelled job: scontrol would restart it. If the controller does not respond, assume that the job is running.
    if state=$(with_retry scontrol -o show job "$JOB") && [[ $state != *JobState=RUNNING* ]]; then
        info "ended by $why; not requeued: SLURM is ending the job"
        return
    fi
    if [ "$ATTEMPT" -ge "$MEGASTAR_MAX_REQUEUES" ]; then
        info "ended by $why; not requeued: MEGASTAR_MAX_REQUEUES=$MEGASTAR_MAX_REQUEUES is reached"
    elif [[ $why == *crash* ]] && [ "$earlier" -ge "$limit" ]; then
        info "ended by $why; not requeued: $limit earlier crashes$stuck"
    elif [[ $why == *"time limit"* ]] && [ "$earlier" -ge "$limit" ]; then
        info "ended by $why; not requeued: two starts reached the time limit$stuck: --time must be longer than a start, one step and a save take, and --signal must reserve enough of it for the save; submit the same command with a longer --time"
    elif [[ $why == *signal* ]] && [ "$earlier" -ge "$limit" ]; then
        info "ended by $why; not requeued: $limit earlier signals$stuck; check that --time is longer than the time that --signal reserves for the save"
    else
        info "ended by $why${details}; requeued"
        trap '' TERM # sent by the requeue; the script has KillWait seconds left
        if ! with_retry scontrol requeue "$JOB"; then
            info "the requeue failed: submit the same sbatch command again to resume"
        elif [ -n "$REQUEUE_LOG" ] && [ -d "${REQUEUE_LOG%/*}" ]; then
            update_excluded
        fi
    fi
}
