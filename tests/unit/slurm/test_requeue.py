"""What a training's batch script does when its srun ends, with SLURM's clients played by scripts that write down how
they were called. tests/slurm asks the real ones whether that is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCONTROL = """#!/bin/bash
case "$*" in
"show hostnames "*) echo "$3" | tr , '\\n'; exit ;;
esac
if [ -s "$PLAY/mute" ]; then # so often nobody answers
    sed -i 1d "$PLAY/mute"
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
case "$*" in
*"show job"*) cat "$PLAY/job" ;;
*) echo "$*" >>"$PLAY/calls" ;;
esac
"""
UP = ("n1 mix (null)", "n1 mix (null)", "n2 alloc fast,big", "n3 idle fast", "n4 down* fast", "n5 drain fast")


class Play:
    """One job on two nodes of a partition, start by start."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.log = folder, folder / "run", folder / "job.log"
        (folder / "bin").mkdir()
        self.run.mkdir()
        self.excluded, self.limit, self.features = "(null)", "1-00:00:00", "(null)"
        self.script, self.errors, self.silence = ["slurm/train_b.sh", f"run={self.run}"], self.log, 0
        self.nodes(*UP)
        for name, text in {
            "scontrol": SCONTROL,
            "sinfo": '#!/bin/bash\ncat "$PLAY/sinfo"\n',
            "megastar": "#!/bin/bash\nfor w; do [[ $w != run=* ]] || echo ${w#run=}; done\n",
            "srun": '#!/bin/bash\ncat "$PLAY/said" >&2\ncp "$PLAY/silence" "$PLAY/mute"\nexit $(cat "$PLAY/status")\n',
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def install_megastar(self) -> None:
        """The real one, which reads the configuration."""
        text = f'#!/bin/bash\nPYTHONPATH={ROOT} exec {sys.executable} -m megastar "$@"\n'
        (self.folder / "bin/megastar").write_text(text)

    def nodes(self, *lines: str) -> None:
        (self.folder / "sinfo").write_text("".join(f"{x}\n" for x in lines))

    def start(
        self, number: int, status: int, said: str = "", nodes: str = "n1,n2", job: str = "417", **env: str
    ) -> str:
        """What the job's ``number``-th start writes into the log, srun ending with ``status``."""
        (self.folder / "job").write_text(
            f"JobId={job} JobState=RUNNING TimeLimit={self.limit} ExcNodeList={self.excluded} Features={self.features}\n"
            f"   StdErr={self.errors}\n   StdIn=/dev/null\n   StdOut={self.log}\n"
        )
        (self.folder / "silence").write_text("x\n" * self.silence)
        (self.folder / "status").write_text(str(status))
        (self.folder / "said").write_text(said)
        (self.folder / "calls").write_text("")
        place = {
            "SLURM_JOB_ID": job, "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_PARTITION": "main", "SLURM_RESTART_COUNT": str(number - 1), "PLAY": str(self.folder),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "MEGASTAR_VENV": "", "MEGASTAR_RETRY": "0",
        }  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MEGASTAR"))}
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            done = subprocess.run(
                ["bash", *self.script],
                cwd=ROOT,
                env=kept | place | env,
                stdout=log,
                stderr=log,
            )
        self.status = done.returncode
        return self.log.read_text()[before:]

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def bad(self) -> list[str]:
        path = self.run / "bad_hosts.log"
        return [x.split(" ", 2)[2] for x in path.read_text().splitlines()] if path.exists() else []

    def ledger(self) -> list[str]:
        return [x.split(" ", 2)[2] for x in (self.run / "requeues.log").read_text().splitlines()]

    def lost(self, host: str, why: str = "lost", attempt: int = 0, job: str = "417") -> None:
        line = {
            "time": "2026-01-31T12:00:00+00:00",
            "job": job,
            "attempt": attempt,
            "rank": 3,
            "host": host,
            "why": why,
        }
        with (self.run / "lost.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")

    def checkpoint(self, step: int) -> None:
        (self.run / "checkpoints").mkdir(exist_ok=True)
        (self.run / "checkpoints/latest").write_text(f"step-{step:08d}\n")


@pytest.fixture
def play(tmp_path) -> Play:
    return Play(tmp_path)


KILLED = "srun: error: n2: task 3: Killed\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"


def test_a_host_whose_task_is_killed_twice_is_excluded_after_the_requeue(play):
    assert "ended by a crash (status 137), host n2; requeued" in play.start(1, 137, KILLED)
    assert play.status == 137 and play.calls() == ["requeue 417"]
    assert play.bad() == ["n2 job 417 start 1: Killed (task 3)"]
    play.checkpoint(5)
    play.start(2, 137, KILLED)
    assert play.calls() == ["requeue 417", "update job=417 ExcNodeList=n2"]  # SLURM refuses it before the requeue
    assert play.ledger() == [
        "job 417 start 1 on n1,n2 ended by a crash (status 137), host n2, checkpoint none",
        "job 417 start 2 on n1,n2 ended by a crash (status 137), host n2, excluding n2, checkpoint step-00000005",
    ]
    play.excluded = "n2"
    play.start(3, 85, nodes="n1,n3")  # nothing changes: no update
    assert play.calls() == ["requeue 417"] and play.ledger()[-1].endswith(
        "ended by a signal (status 85), excluding n2, checkpoint step-00000005"
    )
    (play.run / "bad_hosts.log").unlink()  # a person forgives
    play.start(4, 85, nodes="n1,n3")
    assert play.calls() == ["requeue 417", "update job=417 ExcNodeList="]


def test_what_the_user_excluded_stays_so(play):
    play.excluded = "n9,n8"
    play.start(1, 137, KILLED)
    play.start(2, 137, KILLED)
    assert play.calls()[1:] == ["update job=417 ExcNodeList=n2,n8,n9"]
    play.excluded = "n2,n8,n9"
    (play.run / "bad_hosts.log").unlink()
    play.start(3, 85, nodes="n1,n3")
    assert play.calls()[1:] == ["update job=417 ExcNodeList=n8,n9"]


@pytest.mark.parametrize(
    ("said", "host"),
    [
        ("srun: error: n1: task 0: Segmentation fault\n", "n1"),
        ("srun: error: Node failure on n2\nsrun: error: n1: tasks 0-1: Terminated\n", "n2"),
        # The ranks that notice are told of before the node that they miss.
        ("srun: error: n1: tasks 0-1: Exited with exit code 1\nsrun: error: Node failure on n2\n", "n2"),
        ("0: srun: error: n1: task 0: Killed\n", None),  # a rank's own words carry its number
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: tasks 2-3: Killed\n", None),  # --wait's
        ("srun: error: n1: tasks 0-1: Aborted\n", None),
        ("srun: error: n1: task 1: Out Of Memory\n", None),
        ("srun: error: n[1-2]: tasks 0-3: Killed\n", None),
        ("0: slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2026 ***\nsrun: error: n1: task 0: Killed\n", None),
        ("srun: error: n7: task 0: Killed\n", None),  # no node of this job
    ],
)
def test_who_is_to_blame_as_srun_tells(play, said, host):
    play.start(1, 1, said)
    assert [x.split()[0] for x in play.bad()] == ([host] if host else [])


def test_who_is_to_blame_as_the_ranks_tell(play):
    play.lost("n1", attempt=5)
    play.lost("n1", job="99")
    play.lost("n1", why="slow")
    play.lost("n2.cluster.example.org", why="hung")
    play.lost("n2", why="hung")  # another rank of the same host
    play.lost("n1", why="lost")  # a consequence
    play.start(1, 1, "srun: error: n1: task 0: Exited with exit code 1\n")
    assert play.bad() == ["n2 job 417 start 1: hung (rank 3)"]
    play.start(2, 85)  # a signal is nobody's fault
    play.start(3, 1)  # and nobody said who it was
    assert len(play.bad()) == 1


def test_a_list_that_leaves_too_few_nodes_is_cut(play):
    play.run.joinpath("bad_hosts.log").write_text(
        "".join(f"2026-01-31 12:00:00 n{n} job 1 start {i}: Killed (task 0)\n" for n in (1, 3) for i in (1, 2))
    )
    told = play.start(1, 85, nodes="n2,n6", job="2")
    assert "partition main has too few usable nodes (this job needs 2)" in told and "n1 crashed too often" in told
    assert play.calls() == ["requeue 2", "update job=2 ExcNodeList=n3"]
    play.features = "fast"  # two nodes are up and fast: none can be spared
    play.start(1, 85, nodes="n2,n6", job="3")
    assert play.calls() == ["requeue 3"]
    play.features = "(null)"
    play.nodes(*UP, "n6 idle x", "n7 idle x")
    play.start(1, 85, nodes="n2,n6", job="4", MEGASTAR_MAX_EXCLUDED="1")  # the latest
    assert play.calls() == ["requeue 4", "update job=4 ExcNodeList=n3"]
    play.start(1, 85, nodes="n2,n6", job="5", MEGASTAR_BAD_HOST_CRASHES="0")
    assert play.calls() == ["requeue 5"]


def test_a_new_job_gives_bad_hosts_back_once(play):
    crash = "2026-01-31 12:00:00 n2 job 1 start {}: Killed (task 0)\n"
    play.run.joinpath("bad_hosts.log").write_text(crash.format(1) * 3)  # a start counts once
    assert "srun" in play.start(1, 0, job="416") and play.calls() == []
    play.run.joinpath("bad_hosts.log").write_text(crash.format(1) + crash.format(2))
    told = play.start(1, 0)
    assert "ended by a bad host in its allocation (n2), excluding n2; requeued" in told and "srun" not in told
    assert play.calls() == ["requeue 417", "update job=417 ExcNodeList=n2"]
    assert "srun" in play.start(2, 0) and play.calls() == []  # granted in spite of the list: used
    assert "srun" in play.start(1, 0, nodes="n1,n3", job="418") and play.calls() == []


def test_a_start_that_ended_without_a_word_is_its_first_nodes_fault(play):
    play.log.write_text("megastar: job 417 (x), start 1, on n2 n1 at 2026-01-31 12:00:00\n")
    play.start(2, 0)
    assert play.bad() == ["n2 job 417 start 1: lost (first node, log ends abruptly)"]
    play.log.write_text(
        "megastar: job 417 (x), start 2, on n2 n1 at 2026-01-31 12:00:00\n"
        "slurmstepd-n2: error: *** JOB 417 ON n2 CANCELLED AT 2026-01-31T12:00:00 DUE TO JOB REQUEUE ***\n"
    )
    play.start(3, 0)  # someone's scontrol requeue
    play.log.write_text(
        "megastar: job 417 (x), start 3, on n2 n1 at 2026-01-31 12:00:00\nsrun: error: Node failure on n1\n"
        "slurmstepd-n2: error: *** JOB 417 ON n2 CANCELLED AT 2026-01-31T12:00:00 DUE TO NODE FAILURE, SEE ***\n"
    )
    play.start(4, 0)
    assert play.bad()[1:] == ["n1 job 417 start 3: node failure"]


def test_a_user_error_that_was_fixed_is_not_attributed_to_a_host(play):
    assert "ended by a user error (status 2); not requeued" in play.start(1, 2) and play.calls() == []
    play.start(2, 0)  # someone's scontrol requeue
    assert play.bad() == []


def test_without_the_errors_in_its_log_no_host_is_taken_for_vanished(play):
    play.errors = play.folder / "job.err"
    play.log.write_text("megastar: job 417 (x), start 1, on n2 n1 at 2026-01-31 12:00:00\n")
    play.start(2, 0)
    assert play.bad() == []


def test_a_controller_that_is_away_for_some_seconds_costs_nothing(play):
    play.silence = 3
    assert "requeued" in play.start(1, 85) and play.calls() == ["requeue 417"]
    play.silence = 20
    told = play.start(2, 85)
    assert "Unable to contact slurm controller" in told and "submit the same sbatch command again to resume" in told


def test_the_users_list_is_kept_where_slurm_does_not_tell_it(play):
    play.excluded = "n3"
    play.start(1, 137, KILLED)
    play.silence = 6  # the first question after the end, six times
    told = play.start(2, 137, KILLED)
    assert play.calls() == ["requeue 417"] and "cannot read the job's excluded nodes from SLURM" in told


def test_without_a_run_folder_the_log_counts_ends_of_a_kind(play):
    play.script = ["slurm/sample_fid.sh", "run", "--npz", "x.npz"]
    for start in range(1, 13):  # more than MEGASTAR_MAX_SIGNALS: nobody knows of the progress between them
        assert "requeued" in play.start(start, 143)
    for start in (13, 14, 15):
        assert "requeued" in play.start(start, 1)
    assert "not requeued: 3 earlier crashes\n" in play.start(16, 1) and play.calls() == []


def test_limits_count_what_happened_since_the_last_checkpoint(play):
    for start in (1, 2, 3):
        assert "requeued" in play.start(start, 1)
        assert "requeued" in play.start(start, 138)  # signals between them are counted by themselves
    told = play.start(4, 1)
    assert "not requeued: 3 earlier crashes since checkpoint none" in told and play.calls() == []
    play.checkpoint(5)
    assert "requeued" in play.start(5, 1)
    assert "requeued" in play.start(6, 85, MEGASTAR_MAX_SIGNALS="1")
    told = play.start(7, 85, MEGASTAR_MAX_SIGNALS="1")
    assert "1 earlier signals since checkpoint step-00000005; check that --time is longer" in told
    play.checkpoint(6)
    assert "requeued" in play.start(8, 85, MEGASTAR_MAX_SIGNALS="1")
    assert "MEGASTAR_MAX_REQUEUES=9 is reached" in play.start(10, 85, MEGASTAR_MAX_REQUEUES="9")


def test_a_time_limit_that_leaves_no_time_is_told(play):
    for limit, short in (("00:03:00", True), ("00:05:00", False), ("1-00:00:00", False), ("UNLIMITED", False)):
        play.limit = limit
        assert ("warning: the last 180 s of the time limit of 180 s are reserved" in play.start(1, 0)) == short


def test_a_job_that_reaches_its_limit_twice_without_a_checkpoint_is_not_requeued(play):
    play.limit = "00:03:45"  # USR1 comes 180 s before the limit, SLURM checks every 30 s
    assert "ended by a signal at the time limit (status 85); requeued" in play.start(1, 85)
    play.checkpoint(5)  # by an earlier save of this start
    assert "requeued" in play.start(2, 85) and "requeued" in play.start(3, 138, MEGASTAR_MAX_SIGNALS="3")
    told = play.start(4, 85)
    assert "not requeued: two starts reached the time limit since checkpoint step-00000005: --time must be" in told
    assert play.calls() == [] and "ended by a signal at the time limit (status 85), checkpoint" in play.ledger()[-1]
    play.checkpoint(6)
    assert "requeued" in play.start(5, 85)


def test_preemptions_before_the_limit_are_counted_as_before(play):
    for start in range(1, 10):
        assert "ended by a signal (status 85); requeued" in play.start(start, 85)


@pytest.mark.parametrize(
    "run",
    ["runs/with a space", "'a quoted # one'", "${data.tokenizer}/x", "lr=1e-4; touch oops", "$HOME/x", '"dou\'ble"'],
)
def test_the_run_folder_is_that_of_the_configuration(play, run):
    config = play.folder / "conf=1" / "run.yaml"
    config.parent.mkdir()
    config.write_text(f"run: {run}\ndata: {{shards: codes, tokenizer: tok}}\n")
    play.install_megastar()
    play.script = ["slurm/train_b.sh", str(config)]
    asked = subprocess.run(
        [sys.executable, "-m", "megastar", "train", "--print-run-folder", str(config)], cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert asked.returncode == 0 and asked.stdout.startswith(f"{ROOT}/"), asked.stderr
    told = play.start(1, 0)
    assert f"run folder {asked.stdout.strip()}, last checkpoint none" in told and play.status == 0


def test_a_run_folder_with_a_space_keeps_its_list_of_requeues(play):
    play.install_megastar()
    play.run = play.folder / "a run"
    play.run.mkdir()
    play.script = ["slurm/train_b.sh", f"run={play.run}"]
    assert "requeued" in play.start(1, 85) and len(play.ledger()) == 1


def test_a_faulty_configuration_ends_the_job_before_srun(play):
    play.install_megastar()
    play.script.append("optim.lrr=1")
    told = play.start(1, 0)
    assert "did you mean optim.lr?" in told and "ended by a user error (status 2); not requeued" in told
    assert play.status == 2 and play.calls() == []


def test_a_node_without_megastar_is_a_crash_not_a_user_error(play):
    (play.folder / "bin/megastar").write_text("#!/bin/bash\nexit 127\n")
    assert "requeued" in play.start(1, 0) and play.status == 127 and play.calls() == ["requeue 417"]


def answer(play: Play, text: str) -> None:
    (play.folder / "bin/megastar").write_text(f"#!/bin/bash\n{text}\n")


def test_lines_of_a_prefix_around_the_run_folder_are_ignored(play):
    answer(play, f"echo loading modules; echo {play.run}; echo container done")
    assert f"run folder {play.run}, last checkpoint none" in play.start(1, 85) and len(play.ledger()) == 1


@pytest.mark.parametrize(
    ("text", "seconds", "sentence"),
    [("true", "60", "did not print the run folder"), ("sleep 60", "1", "status 124; 124: no answer within 1 s")],
)
def test_no_answer_about_the_run_folder_is_an_error(play, text, seconds, sentence):
    answer(play, text)
    assert sentence in play.start(1, 0, MEGASTAR_ASK_TIMEOUT=seconds) and play.status != 0


def test_the_lead_of_the_signal_is_that_of_the_submission(play):
    play.limit = "00:10:00"
    assert "the last 580 s of the time limit of 600 s" in play.start(1, 0, SBATCH_SIGNAL="USR1@580")


def test_a_run_folder_that_is_not_utf_8_or_has_a_newline(tmp_path):
    config = tmp_path / "run.yaml"
    for name, status in ((b"x\xffy", 0), (b"a\nb", 2)):
        words = [sys.executable, "-m", "megastar", "train", "--print-run-folder", str(config)]
        config.write_text("data: {shards: codes, tokenizer: tok}\n")
        done = subprocess.run([*words, b"run=" + os.fsencode(tmp_path) + b"/" + name], cwd=ROOT, capture_output=True)
        assert done.returncode == status, done.stderr
        assert done.stdout == (b"" if status else os.fsencode(tmp_path) + b"/" + name + b"\n")
