# Excludes hosts that crash a training repeatedly. Sourced by common.sh, which sets JOB, ATTEMPT, LOG and REQUEUE_LOG. See docs/slurm.md.
#
# RUN/bad_hosts.log has one line for each crash attributed to a host. Remove lines to allow the host again.
#     2026-01-31 12:00:00 node7 job 417 start 2: Killed (task 12)
MEGASTAR_BAD_HOST_CRASHES=${MEGASTAR_BAD_HOST_CRASHES:-2} MEGASTAR_MAX_EXCLUDED=${MEGASTAR_MAX_EXCLUDED:-4}

# with_retry COMMAND ...: run a client of SLURM; retry for a minute while the controller does not respond.
with_retry() {
    local errors i
    for i in 1 2 3 4 5 6; do
        if { errors=$("$@" 2>&1 1>&3); } 3>&1; then # captures stderr only
            [ -z "$errors" ] || printf '%s\n' "$errors" >&2
            return 0
        fi
        [[ $errors =~ [Cc]ontact|[Cc]onnect|"timed out"|"Zero Bytes"|"temporarily" ]] || break
        [ "$i" = 6 ] || sleep "$MEGASTAR_RETRY"
    done
    printf '%s\n' "$errors" >&2
    return 1
}
job_field() { with_retry scontrol -o show job "$JOB" | tr ' ' '\n' | sed -n "s/^$1=//p" | sed 's/^(null)$//'; }
expand_hosts() { [ -z "$1" ] || scontrol show hostnames "$1"; }
# drop_lines LIST: print the input lines that are not in LIST.
drop_lines() { grep -vxF -f <(printf '%s\n' "$1" | sed '/^$/d') || true; }

# start_log START: the part of the log written by the job's START-th start.
start_log() { sed -n "/^megastar: job $JOB (.*), start $1, on /,/^megastar: job $JOB (.*), start $(($1 + 1)), on /p" "$LOG" 2>/dev/null; }

# find_failed_host START NODES: print "HOST WHY" for the job's START-th start, or nothing if the cause is unknown.
# Sources, in order: the first error of srun (a task ended by a signal, a failed node); the ranks' record in RUN/lost.jsonl.
# These do not identify a host: an exit code, because a program error ends a task on any host; SIGABRT, with which NCCL ends
# ranks that wait for the failed one; any error after SLURM itself has cancelled the step.
find_failed_host() {
    local found host why
    found=$(start_log "$1" | awk '
        /CANCELLED AT / && !/NODE FAILURE/ {exit}
        /^srun: error: Node failure on / {print $NF, "node failure"; exit}
        /^srun: error: [^ ]+: tasks? [0-9,-]+: / {
            host = $3; sub(/:$/, "", host); what = $0; sub(/.*: tasks? [0-9,-]+: /, "", what)
            task = $0; sub(/.*: tasks? /, "", task); sub(/:.*/, "", task)
            if (!ended++ && what ~ /^(Killed|Segmentation fault|Bus error|Illegal instruction)/) {
                print host, what " (task " task ")"; exit
            }
        }')
    [ -n "$found" ] || found=$(awk -v job="$SLURM_JOB_ID" -v attempt=$(($1 - 1)) '
        function value(name) {
            if (!match($0, "\"" name "\": *\"?[^\",}]*")) return ""
            text = substr($0, RSTART, RLENGTH); sub(/^[^:]*: *"?/, "", text); return text
        }
        value("job") == job && value("attempt") == attempt && value("why") ~ /^(lost|hung|corrupt)$/ {
            print value("host"), value("why") " (rank " value("rank") ")"; exit
        }' "${REQUEUE_LOG%/*}/lost.jsonl" 2>/dev/null)
    read -r host why <<<"$found"
    # Ranks may report the fully qualified host name.
    for host in "$host" "${host%%.*}"; do
        if [ -n "$host" ] && expand_hosts "$2" | grep -cxF "$host" >/dev/null; then # not -q: it would break the pipe, a failure under pipefail
            echo "$host $why"
            return
        fi
    done
}

# record_failed_host START NODES [DEFAULT]: append the failed host of that start, if known, to bad_hosts.log; sets HOST.
# DEFAULT is the host to record if neither srun nor the ranks reported one.
record_failed_host() {
    local why
    read -r HOST why <<<"$(find_failed_host "$1" "$2")"
    [ -n "$HOST" ] || HOST=${3:-} why="lost (first node, log ends abruptly)"
    [ -z "$HOST" ] || echo "$(date '+%F %T') $HOST job $JOB start $1: $why" >>"${REQUEUE_LOG%/*}/bad_hosts.log"
}

# usable_hosts: hosts of the partition that are up and match the job's --constraint (counts and nesting are not evaluated).
usable_hosts() {
    sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N %t %f' | awk -v wanted="$(job_field Features)" '
        $2 !~ /^(idle|mix|alloc|comp|plnd|resv)/ || $2 ~ /\*$/ {next}
        {
            n = split(wanted, words, /[][()&|,*]+/); have = 0; asked = 0
            for (i = 1; i <= n; i++) if (words[i] ~ /[^0-9]/) {asked++; have += index("," $3 ",", "," words[i] ",") > 0}
            if (have == asked || (have && wanted ~ /\|/)) print $1
        }' | sort -u
}

# bad_hosts: hosts with too many crashes, in order of their last crash, limited so that enough nodes remain for the job.
bad_hosts() {
    local bad up log=${REQUEUE_LOG%/*}/bad_hosts.log
    [ -r "$log" ] && [ "$MEGASTAR_BAD_HOST_CRASHES" -gt 0 ] || return 0
    bad=$(awk -v limit="$MEGASTAR_BAD_HOST_CRASHES" '
        seen[$3, $5, $7]++ {next} # each start of a job counts once
        {count[$3]++; last[$3] = NR}
        END {for (h in count) if (h != "" && count[h] >= limit) print last[h], h}' "$log" | sort -n | cut -d ' ' -f 2 | drop_lines "$USER_EXCLUDED" | tail -n "$MEGASTAR_MAX_EXCLUDED")
    up=$(usable_hosts | drop_lines "$USER_EXCLUDED")
    while [ -n "$bad" ] && [ "$(drop_lines "$bad" <<<"$up" | grep -c .)" -lt "${SLURM_JOB_NUM_NODES:-1}" ]; do
        info "${bad%%$'\n'*} crashed too often but is not excluded: otherwise partition $SLURM_JOB_PARTITION has too few usable nodes (this job needs ${SLURM_JOB_NUM_NODES:-1})" >&2
        bad=$(tail -n +2 <<<"$bad")
    done
    echo "$bad"
}

# choose_excluded: set USER_EXCLUDED, the hosts excluded by the user (--exclude), and BAD, those excluded because of crashes;
# one per line. The job's current ExcNodeList is the union of both as of its last requeue.
choose_excluded() {
    local ours excluded
    ours=$(sed -n "s/.* job $JOB start .*, excluding \([^,]*\),.*/\1/p" "$REQUEUE_LOG" 2>/dev/null | tr ' ' '\n')
    EXCLUDED_KNOWN="" USER_EXCLUDED=""
    excluded=$(job_field ExcNodeList) && EXCLUDED_KNOWN=1
    USER_EXCLUDED=$(expand_hosts "$excluded" | drop_lines "$ours")
    BAD=$(bad_hosts)
}

# update_excluded: set the job's ExcNodeList. SLURM rejects this for a running job. After the requeue request, while this script
# still runs, the job is in the state COMPLETING: SLURM accepts the change, and the next start cannot begin before it.
update_excluded() {
    local all now excluded
    # The update replaces the whole list, so the user's hosts must be known.
    excluded=$(job_field ExcNodeList) && [ -n "$EXCLUDED_KNOWN" ] || { info "cannot read the job's excluded nodes from SLURM: leaving them unchanged"; return 0; }
    all=$(printf '%s\n' "$USER_EXCLUDED" "$BAD" | sed '/^$/d' | sort -u | paste -sd ,) now=$(expand_hosts "$excluded" | sort -u | paste -sd ,)
    [ "$all" != "$now" ] || return 0
    scontrol update job="$JOB" ExcNodeList="$all" || info "cannot exclude the nodes ${all:-none}: run scontrol update job=$JOB ExcNodeList=$all"
}
