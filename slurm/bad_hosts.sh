# Which hosts a training keeps away from. common.sh sources it; JOB, ATTEMPT, LOG and LEDGER are its. docs/slurm.md.
#
# RUN/bad_hosts.log has a line for each crash that is known to be one host's. Who removes lines forgives.
#     2026-01-31 12:00:00 node7 job 417 start 2: Killed (task 12)
MEGASTAR_BAD_HOST_CRASHES=${MEGASTAR_BAD_HOST_CRASHES:-2} MEGASTAR_MAX_EXCLUDED=${MEGASTAR_MAX_EXCLUDED:-4}

# asked COMMAND ...: again, for a minute, where SLURM's controller does not answer.
asked() {
    local said i
    for i in 1 2 3 4 5 6; do
        if { said=$("$@" 2>&1 1>&3); } 3>&1; then # what it says on stderr
            [ -z "$said" ] || printf '%s\n' "$said" >&2
            return 0
        fi
        [[ $said =~ [Cc]ontact|[Cc]onnect|"timed out"|"Zero Bytes"|"temporarily" ]] || break
        [ "$i" = 6 ] || sleep "$MEGASTAR_RETRY"
    done
    printf '%s\n' "$said" >&2
    return 1
}
field() { asked scontrol -o show job "$JOB" | tr ' ' '\n' | sed -n "s/^$1=//p" | sed 's/^(null)$//'; }
hosts() { [ -z "$1" ] || scontrol show hostnames "$1"; }
# without LIST: the lines of the input that LIST does not hold.
without() { grep -vxF -f <(printf '%s\n' "$1" | sed '/^$/d') || true; }

# log_of START: what the log says of the job's START-th start.
log_of() { sed -n "/^megastar: job $JOB (.*), start $1, on /,/^megastar: job $JOB (.*), start $(($1 + 1)), on /p" "$LOG" 2>/dev/null; }

# culprit START NODES: "HOST WHY" of the job's START-th start, or nothing where nobody can tell.
# First what srun said first: a task that a signal ended, a node that failed; then the ranks' own word (RUN/lost.jsonl).
# An exit code is no evidence: a mistake in the program ends a task on any host. Nor is SIGABRT, with which NCCL ends
# those that wait for the one at fault, nor what follows when SLURM itself ends the step.
culprit() {
    local found host why
    found=$(log_of "$1" | awk '
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
        }' "${LEDGER%/*}/lost.jsonl" 2>/dev/null)
    read -r host why <<<"$found"
    # Ranks may know their host by its long name.
    for host in "$host" "${host%%.*}"; do
        if [ -n "$host" ] && hosts "$2" | grep -cxF "$host" >/dev/null; then # not -q: it would end its source too, which pipefail sees
            echo "$host $why"
            return
        fi
    done
}

# blame START NODES [SILENT]: write the culprit of that start, if there is one, to bad_hosts.log; sets HOST. SILENT is the
# host to name where nobody said anything.
blame() {
    local why
    read -r HOST why <<<"$(culprit "$1" "$2")"
    [ -n "$HOST" ] || HOST=${3:-} why="vanished (first node, no last word)"
    [ -z "$HOST" ] || echo "$(date '+%F %T') $HOST job $JOB start $1: $why" >>"${LEDGER%/*}/bad_hosts.log"
}

# usable: hosts of the partition that are up and fit the job's --constraint, as far as its words tell.
usable() {
    sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N %t %f' | awk -v wanted="$(field Features)" '
        $2 !~ /^(idle|mix|alloc|comp|plnd|resv)/ || $2 ~ /\*$/ {next}
        {
            n = split(wanted, words, /[][()&|,*]+/); have = 0; asked = 0
            for (i = 1; i <= n; i++) if (words[i] ~ /[^0-9]/) {asked++; have += index("," $3 ",", "," words[i] ",") > 0}
            if (have == asked || (have && wanted ~ /\|/)) print $1
        }' | sort -u
}

# bad_hosts: those with too many crashes, the last offender last, no more than the job can do without.
bad_hosts() {
    local bad up log=${LEDGER%/*}/bad_hosts.log
    [ -r "$log" ] && [ "$MEGASTAR_BAD_HOST_CRASHES" -gt 0 ] || return 0
    bad=$(awk -v limit="$MEGASTAR_BAD_HOST_CRASHES" '
        seen[$3, $5, $7]++ {next} # a start of a job counts once
        {count[$3]++; last[$3] = NR}
        END {for (h in count) if (h != "" && count[h] >= limit) print last[h], h}' "$log" | sort -n | cut -d ' ' -f 2 | without "$OWN" | tail -n "$MEGASTAR_MAX_EXCLUDED")
    up=$(usable | without "$OWN")
    while [ -n "$bad" ] && [ "$(without "$bad" <<<"$up" | grep -c .)" -lt "${SLURM_JOB_NUM_NODES:-1}" ]; do
        tell "${bad%%$'\n'*} crashed too often but is not excluded: without it $SLURM_JOB_PARTITION has too few usable nodes for the ${SLURM_JOB_NUM_NODES:-1} of this job" >&2
        bad=$(tail -n +2 <<<"$bad")
    done
    echo "$bad"
}

# decide: OWN, the hosts that the user excluded (--exclude), and BAD, those that this run excludes; one a line. What
# the job excludes now is both, as of its last requeue.
decide() {
    local ours excluded
    ours=$(sed -n "s/.* job $JOB start .*, excluding \([^,]*\),.*/\1/p" "$LEDGER" 2>/dev/null | tr ' ' '\n')
    KNOWN="" OWN=""
    excluded=$(field ExcNodeList) && KNOWN=1
    OWN=$(hosts "$excluded" | without "$ours")
    BAD=$(bad_hosts)
}

# keep_away: tell SLURM. It refuses that of a running job; after the requeue, as long as this script lives, the job is
# completing: changes count and the next start cannot come before them.
keep_away() {
    local all now excluded
    # What the user excluded must be known: the list is replaced.
    excluded=$(field ExcNodeList) && [ -n "$KNOWN" ] || { tell "SLURM does not say which nodes the job excludes: left as they are"; return 0; }
    all=$(printf '%s\n' "$OWN" "$BAD" | sed '/^$/d' | sort -u | paste -sd ,) now=$(hosts "$excluded" | sort -u | paste -sd ,)
    [ "$all" != "$now" ] || return 0
    scontrol update job="$JOB" ExcNodeList="$all" || tell "the nodes ${all:-none} could not be excluded: scontrol update job=$JOB ExcNodeList=$all"
}
