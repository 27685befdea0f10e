"""Starts or joins Ray, and computes from its nodes how many CPUs, GPUs and bytes a task gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from d2filter import signals
from d2filter.engine import same_code, shared_folder
from d2filter.engine.fanout import Needs
from d2filter.errors import D2FilterError, StageError, UsageError
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line

# a machine that loses power closes no connection; without keepalive Ray waits seven minutes
_KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
}
_SHARED_MEMORY = "/dev/shm"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_OBJECT_STORE_BYTES = 200_000_000  # for arguments, figures and counters; samples are in files


@dataclass(slots=True)
class Runner:
    """Ray for the tasks of one run directory: started or joined when first needed. A Ray that was
    started here is stopped by `close`.
    """

    folder: Folder
    address: str = ""
    show_progress: bool | None = None
    """None: only on a terminal"""
    device: str = "auto"
    """auto: use GPUs if the cluster has any; cpu: use none; cuda: wait for GPUs"""
    _owns_ray: bool = field(default=False, init=False)
    token: str | None = field(default=None, init=False)
    """token that every node must find in the run directory; None: not checked yet; empty: no check
    is needed
    """

    def needs(
        self, tasks: int, *, cpus: float, share_node: bool, on_gpu: bool, memory: int
    ) -> Needs:
        """Resources of each of so many tasks on the cluster as it is now, see `StageRun.run`."""
        ray = self.ray()
        nodes = _alive(ray)
        asked: Needs = {"num_cpus": cpus, "num_gpus": 0}
        if on_gpu and self.uses_gpus():
            asked = {"num_cpus": _cpus_beside_gpu(nodes), "num_gpus": 1}
        elif on_gpu or share_node:
            asked["num_cpus"] = _cpus_of_task(nodes, tasks, memory)
        return {**asked, "memory": min(memory, _node_bytes(ray))} if memory else asked

    def uses_gpus(self) -> bool:
        """Whether tasks that can use GPUs request them. Raises UsageError if they must, Ray runs on
        this machine only, and the machine has no GPU. A cluster may get a node with GPUs later.
        """
        ray = self.ray()
        there = any(_count(node, "GPU") for node in _alive(ray))
        if self.device == "cuda" and not there and self._owns_ray and not self._cluster():
            raise UsageError(
                "device is cuda, and Ray finds no GPU on this machine: --device auto, or --address "
                "of a cluster with GPUs"
            )
        return self.device == "cuda" or (there and self.device == "auto")

    def resources(self) -> tuple[int, int, int]:
        """CPUs of the largest node, number of nodes, and the least memory of a node in bytes."""
        ray = self.ray()
        return _largest_node(ray), len(_alive(ray)), _node_bytes(ray)

    def processes(self, most: int, memory: int) -> int:
        """How many processes with one CPU can run at once, at least one and at most `most`. memory:
        bytes that each needs, 0 if unknown.
        """
        places = 0
        for node in _alive(self.ray()):
            cpus = _count(node, "CPU")
            places += min(cpus, _count(node, "memory") // memory) if memory else cpus
        return max(1, min(most, places))

    def close(self) -> None:
        """Stop Ray if this runner started it."""
        if self._owns_ray:
            import ray

            with signals.held(), signals.kept():
                ray.shutdown()
                self._owns_ray = False

    def ray(self) -> Any:
        """The ray module, connected to a cluster, or to a Ray that this process started.

        Raises UsageError if there is no cluster at the address, or if its nodes do not share the
        run directory, StageError if Ray cannot start on this machine.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with signals.held():  # an interrupted import would fail once more when the process ends
            import ray

        if not ray.is_initialized():
            self._start(ray)
        if self.token is None:
            # a cluster of one node that was joined may get more nodes
            joined = (self._owns_ray and bool(self._cluster())) or len(_alive(ray)) > 1
            token = shared_folder.write_token(self.folder) if joined else ""
            shared_folder.check_nodes(ray, self.folder, token)
            self.token = token
        return ray

    def _cluster(self) -> str:
        """Address of the cluster to join; empty for none. Raises UsageError for the address of a
        dashboard.
        """
        # a submitted job finds its cluster in RAY_ADDRESS; no other cluster is joined by accident
        address = self.address or os.environ.get("RAY_ADDRESS", "")
        if address.startswith(("http://", "https://")):
            raise UsageError(
                f"{'--address' if self.address else 'RAY_ADDRESS'} is {address}: that is the "
                "dashboard's address, for `ray job submit`; give the cluster's, such as "
                "HOST:6379 or ray://HOST:10001, or none to start Ray on this machine"
            )
        return address

    def _start(self, ray: Any) -> None:
        address = self._cluster()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not address.startswith("ray://"):  # the server of a Ray client configures the job
            options.update(job_config=same_code.job_config(ray))
        try:
            if address:
                _knock(address)
                for name, value in _KEEPALIVE.items():
                    os.environ.setdefault(name, value)
                with signals.kept():
                    ray.init(**options, address=address)
            else:
                obstacle = _obstacle()
                if obstacle:
                    raise StageError(f"Ray cannot start on this machine: {obstacle}")
                # without a signal in between: a half-started Ray could not be stopped
                with signals.held(), signals.kept():
                    ray.init(
                        **options, address="local", include_dashboard=False,
                        object_store_memory=_OBJECT_STORE_BYTES,
                    )  # fmt: skip
                    self._owns_ray = True
        except D2FilterError:
            raise
        except Exception as error:  # Ray raises errors of any type, also a bare Exception
            text = first_line(error)
            if address:
                raise UsageError(
                    f"no Ray cluster answers at {address} (--address or RAY_ADDRESS): {text}"
                ) from error
            logs_there = os.path.join(_temporary(), "ray/session_latest/logs")
            raise StageError(
                f"Ray does not start on this machine: {text} (its logs: {logs_there})"
            ) from error
        self._owns_ray = True


def _temporary() -> str:
    """The folder in which Ray creates the folders of its sessions."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _obstacle() -> str:
    """Why Ray cannot start on this machine, with a remedy; empty if nothing is known to prevent it.
    Ray itself would report most of this after a minute, or with an error that does not name the
    cause.
    """
    folder = _temporary()
    instead = "set RAY_TMPDIR to another folder, such as /tmp"
    if not folder.isascii():
        return f"its temporary folder {folder} has characters that are not ASCII: {instead}"
    # Linux takes socket names of up to 107 bytes
    if len(folder.rstrip("/")) + len(_SOCKET.format(pid=os.getpid())) > 107:
        return f"the path of its temporary folder is too long for sockets, {folder}: {instead}"
    if not os.access(_SHARED_MEMORY, os.W_OK):
        return (
            f"{_SHARED_MEMORY} cannot be written, where processes share memory: mount a tmpfs "
            "there (docker and Kubernetes: not among read-only mounts)"
        )
    return ""


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _alive(ray: Any) -> list[dict[str, Any]]:
    """Ray's descriptions of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def _count(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


def _largest_node(ray: Any) -> int:
    """CPUs of the largest node that is alive, at least 1."""
    return max([1, *(_count(node, "CPU") for node in _alive(ray))])


def _node_bytes(ray: Any) -> int:
    """Memory in bytes that Ray has for tasks on the smallest node with CPUs. A head node without
    CPUs takes no tasks.
    """
    return min((_count(n, "memory") for n in _alive(ray) if _count(n, "CPU")), default=0)


def _cpus_of_task(nodes: Sequence[dict[str, Any]], tasks: int, memory: int) -> int:
    """CPUs per task, so that `tasks` tasks, or as many as fit into memory, use all CPUs of the
    largest node.
    """
    nothing: dict[str, Any] = {"Resources": {}}
    largest = max(nodes, key=lambda node: _count(node, "CPU"), default=nothing)
    at_once = min(tasks, _count(largest, "memory") // memory) if memory else tasks
    return max(1, _count(largest, "CPU") // max(1, at_once))


def _cpus_beside_gpu(nodes: Sequence[dict[str, Any]]) -> int:
    """CPUs per GPU task, so that every node can use all of its GPUs at once."""
    shares = [_count(n, "CPU") // _count(n, "GPU") for n in nodes if _count(n, "GPU")]
    return max(1, min(shares, default=1))
