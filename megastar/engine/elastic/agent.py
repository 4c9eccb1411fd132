"""torch's elastic agent with megastar's exit statuses: it starts the ranks of its node, and restarts them on fewer
nodes when one is lost, and on more when one joins."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousStateError,
    RendezvousTimeoutError,
)

from megastar.config.schema import RunConfig
from megastar.engine.elastic.batch import fit_batch
from megastar.engine.elastic.node_memory import VARIABLE, node_memory
from megastar.engine.elastic.rendezvous import (
    REPLY,
    Handler,
    Nodes,
    StoreChoice,
    Timeouts,
    join,
    open_store,
    run_key,
)
from megastar.engine.exit_codes import PREEMPTED, RANK_FAILURE, RESTART
from megastar.run_dir.events import append_event
from megastar.utils.process_exit import AGENT

logger = logging.getLogger(__name__)
JOINING = signal.SIGUSR2  # requests the ranks to save and exit with RESTART, because a node joins
FINAL = (2, PREEMPTED)  # exit statuses of a rank after which there is no restart
SAVE_TIME = 600  # seconds for ranks to save and exit
ALONE = 8.0  # seconds for ranks to exit by themselves once ranks of another node are lost: time for the watchdogs
LEAVING = 5.0  # seconds that a node may take from leaving a round to joining the next
SETTLED = 600.0  # seconds without a failure after which earlier ones no longer count
LINGER = 3.0  # seconds that the store outlives the run, so that waiting nodes see its end


class Agent(LocalElasticAgent):
    """Runs the ranks of one node, of at most ``most`` nodes."""

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, cfg: RunConfig, handler: Handler, timeouts: Timeouts, most: int
    ):
        known = inspect.signature(LocalElasticAgent.__init__).parameters
        super().__init__(spec, logs, exit_barrier_timeout=60, **_supported(known, shutdown_timeout=SAVE_TIME))
        self.cfg, self.timeouts, self.words = cfg, timeouts, spec.args
        self.planned = most * spec.local_world_size  # number of ranks if no node is missing
        self.nodes: set[Any] = set()  # of the current round
        self.round = 0
        self.handler = handler
        self.use = 0  # number of ranks of the current round
        self.lost_at = 0.0
        self.missing_since = time.monotonic()

    # Ranks of a round --------------------------------------------------------------------------------------------
    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        while True:
            try:
                super()._rendezvous(worker_group)
                break
            except DistStoreError:  # a node of the new round was lost before it published the places of its ranks
                logger.warning(
                    "a node has not answered within %.0f s: the others repeat the rendezvous", REPLY.total_seconds()
                )
            except DistNetworkError as error:
                raise RendezvousConnectionError(str(error)) from error
        self.timeouts.started = True
        self.nodes, self.round = self.handler.participants(), self.handler.round
        per_node = worker_group.spec.local_world_size
        group: Any = worker_group
        group.group_world_size = -(-self.use // per_node)  # nodes with ranks, which end together

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """As many ranks as the batch can be divided among; a node may get none."""
        workers: list[Worker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
        there = workers[0].world_size
        self.use, micro = fit_batch(self.cfg, there, self.planned)
        if group_rank == 0 and self.use < there:
            logger.warning(
                "%d of %d ranks are used: train.global_batch = %d cannot be divided among all", self.use, there,
                self.cfg.train.global_batch,
            )  # fmt: skip
        spec.args = (*self.words, f"train.micro_batch={micro}")
        return [
            Worker(w.local_rank, w.global_rank, w.role_rank, self.use, self.use)
            for w in workers
            if w.global_rank < self.use
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pcontext = None
        started: dict[int, Any] = super()._start_workers(worker_group) if worker_group.workers else {}
        return started

    # End of the ranks --------------------------------------------------------------------------------------------
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if worker_group.workers:
            result: RunResult = super()._monitor_workers(worker_group)
        else:  # this node waits until it is needed or the run ends
            result = RunResult(WorkerState.SUCCEEDED if self.handler.is_closed() else WorkerState.HEALTHY)
        if result.state == WorkerState.HEALTHY and (lost := self._lost()):
            self._report_lost(sorted(lost))
            self._shutdown(signal.SIGKILL, 5)  # they wait for the lost ranks
            self._remaining_restarts += 1  # torch's agent subtracts one: not counted
            return RunResult(WorkerState.UNHEALTHY)
        if result.state == WorkerState.FAILED:
            statuses = {f.exitcode for f in result.failures.values()}
            if statuses & set(FINAL):
                self._remaining_restarts = 0
            elif statuses <= {RESTART, -JOINING}:
                self._remaining_restarts += 1  # torch's agent subtracts one: not counted
            elif time.monotonic() - self.lost_at > SETTLED:
                self._remaining_restarts = worker_group.spec.max_restarts
            self.lost_at = time.monotonic()
        return result

    def _lost(self) -> set[Any]:
        """Nodes of this round that have left it without waiting for the next one: they are down."""
        missing = self.nodes - self.handler.participants() - self.handler.waiting()
        if not missing:
            self.missing_since = time.monotonic()
        return missing if time.monotonic() - self.missing_since > LEAVING else set()

    def _report_lost(self, nodes: list[Any]) -> None:
        def text(lost: list[Any]) -> str:
            return f"node {', '.join(node.addr for node in lost)} sends no heartbeat: it or its network is down"

        def name(node: Any) -> str:
            return f"lost/{self.round}/{node.addr}/{node.pid}/{node.local_id}"

        logger.warning(text(nodes))
        # The nodes detect the loss at different times, and the first node may have left the round; only one event is written.
        if new := [node for node in nodes if self.handler.is_first_to(name(node))]:
            append_event(Path(self.cfg.run), "lost", 0, text(new))

    def _shutdown(self, death_sig: signal.Signals = JOINING, timeout: int = SAVE_TIME) -> None:
        """End the ranks; by default they save and exit, as long as no node of the round is lost."""
        if death_sig == JOINING:
            handlers = getattr(self._pcontext, "subprocess_handlers", {})
            running = [h.proc for h in handlers.values() if h.proc.poll() is None]
            for process in running:
                os.killpg(process.pid, JOINING)
            now = time.monotonic()
            deadline, alone = now + timeout, now + ALONE
            while time.monotonic() < min(deadline, alone) and any(p.poll() is None for p in running):
                time.sleep(0.1)
                if self._is_round_whole():
                    alone = time.monotonic() + ALONE
            death_sig, timeout = signal.SIGKILL, 5
        super()._shutdown(death_sig, timeout)

    def _is_round_whole(self) -> bool:
        try:
            self.handler.num_nodes_waiting()  # reads the state
        except RendezvousError:
            return False
        return self.nodes <= self.handler.participants()

    @property
    def has_ranks(self) -> bool:
        return bool(self._worker_group.workers)

    def statuses(self) -> list[int]:
        """Exit statuses of the ranks that ended last."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [s for h in handlers.values() if (s := h.proc.poll()) is not None]


def _supported(known: Any, **options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in known}


def run_node(
    cfg: RunConfig, words: list[str], per_node: int, nodes: Nodes, max_restarts: int, module: str = "megastar"
) -> tuple[int | None, str]:
    """Run ``module WORDS`` as ``per_node`` ranks of this node until the run ends; returns (exit status, reason).

    The status is None if this node had no ranks at the end: the statuses of the other nodes are used. It is 85 if the run ended
    before this node took part, and all nodes are needed.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a fresh store for each round, in its rank 0
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    os.environ[AGENT] = str(os.getpid())
    for name in logging.root.manager.loggerDict:  # the ranks report their errors themselves
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    key, timeouts = run_key(Path(cfg.run)), Timeouts(join=timedelta(seconds=nodes.join))
    choice = StoreChoice(nodes)  # before this node opens a store of its own
    choice.own = own = open_store(nodes)
    with node_memory(Path(cfg.run)) as memory, tempfile.TemporaryDirectory(prefix="megastar-agent-") as logs:
        os.environ[VARIABLE] = str(memory)
        k: int | None = choice.first
        while k is not None:
            try:
                handler = join(nodes, k, key, timeouts, own)
                spec = WorkerSpec(
                    "train", per_node, handler, max_restarts=max_restarts, monitor_interval=0.1,
                    entrypoint=sys.executable, args=("-m", module, *words), local_addr=nodes.address,
                )  # fmt: skip
                status, why = _run_agent(
                    Agent(spec, DefaultLogsSpecs(logs), cfg, handler, timeouts, nodes.most), handler, nodes
                )
                if not why and k == nodes.index:
                    time.sleep(LINGER)
                return status, why
            except RendezvousConnectionError as error:
                timeouts.started = True
                lost, k = k, choice.after(k)
                logger.warning(
                    "the nodes' store on %s %s (%s)", nodes.hosts[lost],
                    "did not answer and is tried again" if k == lost else "is lost", error,
                )  # fmt: skip
    return RANK_FAILURE, f"none of {', '.join(nodes.hosts)} hosts the nodes' store: they or the network are down"


def _run_agent(agent: Agent, handler: Handler, nodes: Nodes) -> tuple[int | None, str]:
    """Raises ``RendezvousConnectionError`` if the store is lost; the ranks have then ended."""
    try:
        while True:
            try:
                result = agent.run()
                break
            except RendezvousTimeoutError:
                if not handler.participants():  # otherwise this node waited as a spare until the timeout
                    raise
    except SignalException as error:
        statuses = agent.statuses()
        return (PREEMPTED if PREEMPTED in statuses else 128 + int(error.sigval)), ""
    except RendezvousConnectionError:
        handler.stop_heartbeats()
        raise
    except RendezvousClosedError:
        return _ended_elsewhere(agent, nodes), ""
    except RendezvousStateError as error:
        return (
            RANK_FAILURE,
            f"{error}: another program writes to the nodes' store, port {nodes.port} and up; restrict access to them",
        )
    except RendezvousTimeoutError:
        return RANK_FAILURE, (
            f"fewer than {nodes.least} nodes joined within {nodes.join:.0f} s: the run needs a new job, or a lower MIN "
            "in --nodes MIN:MAX"
        )
    handler.shutdown()
    if result is None or not agent.has_ranks:  # None: this node was a spare until the end
        return _ended_elsewhere(agent, nodes), ""
    if not result.is_failed():
        return 0, ""
    failure = min(result.failures.values(), key=lambda f: f.timestamp)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode, ""


def _ended_elsewhere(agent: Agent, nodes: Nodes) -> int | None:
    """The exit status if the run ended on the other nodes. A node that took no part in a run that needs each node is of a later
    start than the others, such as a pod that was replaced before they had ended: it must be started again, as they are."""
    return PREEMPTED if not agent.nodes and nodes.least == len(nodes.hosts) else None
