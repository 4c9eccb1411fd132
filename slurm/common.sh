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
MEGASTAR_MAX_SIGNALS=${MEGASTAR_MAX_SIGNALS:-10} MEGASTAR_RETRY=${MEGASTAR_RETRY:-10}
source slurm/bad_hosts.sh || exit 2

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # of an array: its first task has the array's id
JOB=${JOB:-${SLURM_JOB_ID:-}}
ATTEMPT=${SLURM_RESTART_COUNT:-0}
PREEMPTED=85 # the status of megastar train when a signal asked it to stop, and it saved
LEDGER= # file that remembers the requeues of a run
OWN="" BAD="" HOST="" KNOWN=""
APART= # set where sbatch writes errors to a file of their own

if [ -z "$JOB" ]; then
    echo "sbatch $(sed -n 's/^#SBATCH //p' "$0" | tr '\n' ' ')$(env | sed -n 's/^SBATCH_/SBATCH_/p' | sort | tr '\n' ' ')" | sed 's/ *$//'
    MASTER_ADDR=FIRST_NODE MASTER_PORT=20000
else
    NODES=$(asked scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol names no host of $SLURM_JOB_NODELIST"
    MASTER_ADDR=${NODES%%$'\n'*}
    # Below the ports that the kernel hands out, and another one each time: an attempt that is still dying keeps its own.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * ATTEMPT) % 12000))
    LOG=$(asked scontrol show job "$JOB" | sed -n 's/^ *\(StdOut\|StdErr\)=//p' | sort -u)
    [[ $LOG != *$'\n'* ]] || LOG=$(asked scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p') APART=1
    tell "job $JOB ($SLURM_JOB_NAME), start $((ATTEMPT + 1)), on $(tr '\n' ' ' <<<"$NODES")at $(date '+%F %T')"
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
# All ranks leave a run together, hence --wait: when one left and the others did not notice they are ended, after twice the
# time in which their watchdogs would (faults.lost_timeout).
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
    [ -z "$JOB" ] || [ -n "${MEGASTAR_DRY_RUN:-}" ] || look_around
    step --label --wait=120 ${MEGASTAR_PREFIX[@]+"${MEGASTAR_PREFIX[@]}"} megastar train "$@" ${cache:+"$cache"}
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

# look_around: before a training starts. Warns of a time limit that ends it at once, takes down the host of a start that
# ended without a word of the batch script (its own node failed), and gives nodes back that the run keeps away from: a
# new job cannot know of them when it is submitted.
look_around() {
    local lead limit before bad silent=""
    lead=$(sed -n 's/^#SBATCH --signal=.*@//p' "$0") limit=$(seconds_of "$(field TimeLimit)")
    if [ -n "$lead" ] && [ -n "$limit" ] && [ "$limit" -lt $((lead + 60)) ]; then
        tell "warning: of the time limit of $limit s the last $lead s are for the save, SLURM counts in steps of 30 s: hardly a step will be done; ask for a longer --time"
    fi
    [ -d "${LEDGER%/*}" ] || return 0
    before=$(last_line)
    if [ "$ATTEMPT" -gt 0 ] && [[ $before != *" job $JOB start $ATTEMPT on "* ]]; then
        before=$(grep -F "megastar: job $JOB (" "$LOG" 2>/dev/null | sed -n "s/.*, start $ATTEMPT, on \(.*\) at [-0-9]* [:0-9]*$/\1/p" | tail -n 1)
        # Its log ends in the middle of nothing when the node of the batch script vanished: SLURM told nobody.
        [ -n "$APART" ] || log_of "$ATTEMPT" | grep -c -e ' CANCELLED AT ' -e '^megastar: ended by' >/dev/null || silent=${before%% *}
        [ -z "$before" ] || blame "$ATTEMPT" "$(tr ' ' ',' <<<"$before")" "$silent"
        [ -z "$HOST" ] || tell "start $ATTEMPT ended by $HOST, see ${LEDGER%/*}/bad_hosts.log"
    fi
    HOST=""
    decide
    bad=$(hosts "$SLURM_JOB_NODELIST" | grep -xF -f <(printf '%s\n' "$BAD" | sed '/^$/d') | paste -sd ' ')
    # Once: where SLURM grants such a node in spite of the list, it is used.
    if [ -n "$bad" ] && [[ $(last_line) != *" job $JOB start "*" ended by a bad host "* ]]; then
        requeue "a bad host among its nodes ($bad)"
        exit "$PREEMPTED"
    fi
}

# seconds_of [D-]HH:MM:SS: nothing for UNLIMITED.
seconds_of() {
    local h m s days=0 time=$1
    [[ $time == *:* ]] || return 0
    [[ $time != *-* ]] || { days=${time%%-*} time=${time#*-}; }
    IFS=: read -r h m s <<<"$time"
    echo $(((days * 24 + 10#$h) * 3600 + 10#$m * 60 + 10#$s))
}
last_line() { tail -n 1 "$LEDGER" 2>/dev/null; }

# leave STATUS: ends the script, and asks for a requeue where that helps. 85: stopped by a signal, and saved; 138 and 143:
# ended by USR1 or TERM before that could be. 2: a mistake that a person has to mend. Everything else is a crash.
leave() {
    local status=$1 why
    case $status in
    0) exit 0 ;;
    2)
        tell "ended by a mistake (status 2); not started again"
        exit 2
        ;;
    "$PREEMPTED" | 138 | 143) why="a signal (status $status)" ;;
    *) why="a crash (status $status)" ;;
    esac
    [ -z "${MEGASTAR_DRY_RUN:-}" ] || exit "$status"
    requeue "$why"
    exit "$status"
}

# requeue WHY: unless someone cancelled the job, or it was started too often.
requeue() {
    local why=$1 last=none alike=$ATTEMPT limit=$MEGASTAR_MAX_REQUEUES kept="" kept_there="" state
    if [ -n "$LEDGER" ] && [ -d "${LEDGER%/*}" ]; then
        [[ $why != *crash* ]] || blame $((ATTEMPT + 1)) "$SLURM_JOB_NODELIST"
        decide
        kept=${HOST:+, host $HOST}${BAD:+, excluding $(paste -sd ' ' <<<"$BAD")} last=$(last_checkpoint)
        echo "$(date '+%F %T') job $JOB start $((ATTEMPT + 1)) on $SLURM_JOB_NODELIST ended by $why$kept, checkpoint $last" >>"$LEDGER"
        # Ends of this kind since the last new checkpoint, before this one.
        alike=$(tac "$LEDGER" | awk -v same=", checkpoint $last" -v kind="ended by ${why% (*}" '
            substr($0, length($0) - length(same) + 1) != same {exit} index($0, kind) {n++} END {print n - 1}')
        kept_there=", checkpoint $last all the time"
    elif [ -r "$LOG" ]; then
        alike=$(grep -c "^megastar: ended by ${why% (*}" "$LOG")
    fi
    case $why in
    *crash*) limit=$MEGASTAR_MAX_CRASHES ;;
    *signal*) [ -z "$LEDGER" ] || limit=$MEGASTAR_MAX_SIGNALS ;; # who can tell whether another job made progress
    esac
    # A job that someone cancelled stays so: scontrol would bring it back. Where nobody answers, it may run.
    if state=$(asked scontrol -o show job "$JOB") && [[ $state != *JobState=RUNNING* ]]; then
        tell "ended by $why while SLURM ends the job"
        return
    fi
    if [ "$ATTEMPT" -ge "$MEGASTAR_MAX_REQUEUES" ]; then
        tell "ended by $why; not started again: MEGASTAR_MAX_REQUEUES=$MEGASTAR_MAX_REQUEUES is reached"
    elif [[ $why == *crash* ]] && [ "$alike" -ge "$limit" ]; then
        tell "ended by $why; not started again: $limit crashes before this one$kept_there"
    elif [[ $why == *signal* ]] && [ "$alike" -ge "$limit" ]; then
        tell "ended by $why; not started again: $limit signals before this one$kept_there; is --time longer than what --signal keeps for the save?"
    else
        tell "ended by $why${kept}; requeued"
        trap '' TERM # which the requeue sends; KillWait is left
        if ! asked scontrol requeue "$JOB"; then
            tell "the requeue was refused: sbatch the same command, it goes on"
        elif [ -n "$LEDGER" ] && [ -d "${LEDGER%/*}" ]; then
            keep_away
        fi
    fi
}
