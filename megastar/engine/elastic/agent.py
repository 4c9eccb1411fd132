"""torch's elastic agent with megastar's exit statuses: it starts the ranks of its node, and restarts them on fewer nodes
when one is lost, on more when one joins."""

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
from megastar.engine.elastic.rendezvous import REPLY, Handler, Nodes, Timeouts, find_store, join, open_store, run_key
from megastar.engine.exit_codes import PREEMPTED, RANK_FAILURE, RESTART
from megastar.run_dir.events import append_event
from megastar.utils.process_exit import AGENT

logger = logging.getLogger(__name__)
JOINING = signal.SIGUSR2  # to the ranks: save and exit with RESTART, because a node joins
FINAL = (2, PREEMPTED)  # exit statuses of a rank that no restart follows
SAVE_TIME = 600  # seconds that ranks have to save and exit
ALONE = 8.0  # seconds that ranks have to exit by themselves once ranks of another node are gone: the watchdogs' time
LEAVING = 5.0  # seconds that a node may take from leaving a round to joining the next
SETTLED = 600.0  # seconds without a failure after which earlier ones no longer count
LINGER = 3.0  # seconds that the store outlives the run, so that waiting nodes see its end


class Agent(LocalElasticAgent):
    """The ranks of one node, of ``most``."""

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, cfg: RunConfig, handler: Handler, timeouts: Timeouts, most: int
    ):
        known = inspect.signature(LocalElasticAgent.__init__).parameters
        super().__init__(spec, logs, exit_barrier_timeout=60, **_supported(known, shutdown_timeout=SAVE_TIME))
        self.cfg, self.timeouts, self.words = cfg, timeouts, spec.args
        self.planned = most * spec.local_world_size  # ranks, if no node is missing
        self.nodes: set[Any] = set()  # of the present round
        self.handler = handler
        self.use = 0  # ranks of the present round
        self.lost_at = 0.0
        self.missing_since = time.monotonic()

    # Ranks of a round --------------------------------------------------------------------------------------------
    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        while True:
            try:
                super()._rendezvous(worker_group)
                break
            except DistStoreError:  # a node of the new round is lost before it has told where its ranks are
                logger.warning("a node has not answered within %.0f s: the others meet again", REPLY.total_seconds())
            except DistNetworkError as error:
                raise RendezvousConnectionError(str(error)) from error
        self.timeouts.started = True
        self.nodes = self.handler.participants()
        per_node = worker_group.spec.local_world_size
        group: Any = worker_group
        group.group_world_size = -(-self.use // per_node)  # nodes with ranks: those that end together

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Only as many ranks as the batch can be divided among; a node may get none."""
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

    # Their end ---------------------------------------------------------------------------------------------------
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if worker_group.workers:
            result: RunResult = super()._monitor_workers(worker_group)
        else:  # this node waits until it is needed, or the run is over
            result = RunResult(WorkerState.SUCCEEDED if self.handler.is_closed() else WorkerState.HEALTHY)
        if result.state == WorkerState.HEALTHY and (lost := self._lost()):
            self._report_lost(sorted(node.addr for node in lost))
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

    def _report_lost(self, addresses: list[str]) -> None:
        text = f"node {', '.join(addresses)} has given no sign of life: it or its network is down"
        logger.warning(text)
        if self.handler.is_first():
            append_event(Path(self.cfg.run), "lost", 0, text)

    def _shutdown(self, death_sig: signal.Signals = JOINING, timeout: int = SAVE_TIME) -> None:
        """By default the ranks save and exit, as long as those of all nodes of the round can."""
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
        """Exit statuses of the ranks that have ended, last."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [s for h in handlers.values() if (s := h.proc.poll()) is not None]


def _supported(known: Any, **options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in known}


def run_node(
    cfg: RunConfig, words: list[str], per_node: int, nodes: Nodes, max_restarts: int, module: str = "megastar"
) -> tuple[int | None, str]:
    """Run ``module WORDS`` as ``per_node`` ranks of this node until the run ends; returns (exit status, why).

    The status is None where this node had no ranks at the end: those of the others count.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a fresh store for each round, in its rank 0
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    os.environ[AGENT] = str(os.getpid())
    for name in logging.root.manager.loggerDict:  # the ranks report their errors themselves
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    key, timeouts = run_key(Path(cfg.run)), Timeouts(join=timedelta(seconds=nodes.join))
    first, own = find_store(nodes), open_store(nodes)
    with node_memory(Path(cfg.run)) as memory, tempfile.TemporaryDirectory(prefix="megastar-agent-") as logs:
        os.environ[VARIABLE] = str(memory)
        for k in (n % len(nodes.hosts) for n in range(first, first + len(nodes.hosts))):
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
                logger.warning("the nodes' store on %s is lost (%s)", nodes.hosts[k], error)
    return RANK_FAILURE, f"no host of {', '.join(nodes.hosts)} keeps the nodes' store: they or the network are down"


def _run_agent(agent: Agent, handler: Handler, nodes: Nodes) -> tuple[int | None, str]:
    """``RendezvousConnectionError``: the store is lost, the ranks have ended."""
    try:
        while True:
            try:
                result = agent.run()
                break
            except RendezvousTimeoutError:
                if not handler.participants():  # else this node has only waited too long to be needed
                    raise
    except SignalException as error:
        statuses = agent.statuses()
        return (PREEMPTED if PREEMPTED in statuses else 128 + int(error.sigval)), ""
    except RendezvousClosedError:
        return None, ""  # the run ended on the other nodes
    except RendezvousStateError as error:
        return (
            RANK_FAILURE,
            f"{error}: another program writes to the nodes' store, port {nodes.port} and above; close them to it",
        )
    except RendezvousTimeoutError:
        return RANK_FAILURE, (
            f"fewer than {nodes.least} nodes were there within {nodes.join:.0f} s: the run needs a new job, or a lower MIN "
            "in --nodes MIN:MAX"
        )
    handler.shutdown()
    if result is None or not agent.has_ranks:  # None: this node was spare to the end
        return None, ""
    if not result.is_failed():
        return 0, ""
    failure = min(result.failures.values(), key=lambda f: f.timestamp)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode, ""
