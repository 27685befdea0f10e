"""Checks that all nodes of a cluster see the same run directory.

Stages exchange data through files of the run directory. If it is a path, the driver writes a file
with a random token; a node that cannot read the token does not share the directory. Each node is
checked before the first tasks, and each task checks again, because nodes may join later. Object
stores need no check.
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from typing import Any

from d2filter.errors import D2FilterError, UsageError
from d2filter.formats.paths import Folder

TOKEN_FILE = "logs/driver-word.json"

PAUSES = (0.0, 0.2, 0.5, 1.0)  # seconds; a network file system may show a new file late
_ANSWER_SECONDS = 60.0


def write_token(folder: Folder) -> str:
    """Write a new token into a run directory that is a path; returns it, or an empty string."""
    if folder.local is None:
        return ""
    token = secrets.token_hex(8)
    folder.publish_json(TOKEN_FILE, token)
    return token


def not_shared(folder: Folder, token: str) -> UsageError | None:
    """The error if this process does not find the token in the run directory; None if it does."""
    if not token:
        return None
    for pause in PAUSES:
        time.sleep(pause)
        # a file without read permission counts as missing
        with contextlib.suppress(D2FilterError, OSError):
            if folder.read_json(TOKEN_FILE) == token:
                return None
    return _refusal(folder, [platform.node()])


def check_nodes(ray: Any, folder: Folder, token: str) -> None:
    """Raise UsageError with the names of nodes that do not see the run directory of this process.

    A node that does not answer within a minute is skipped; its tasks check again.
    """
    if not token:
        return
    from ray.util import client
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    connected: Any = client.ray.is_connected
    # a Ray client does not run on a node of the cluster
    here = None if connected() else ray.get_runtime_context().get_node_id()
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            look = ray.remote(not_shared).options(
                num_cpus=0, max_retries=3, scheduling_strategy=there
            )  # fmt: skip
            asked[look.remote(folder, token)] = node["NodeManagerAddress"]
    if not asked:
        return
    answered, unanswered = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    blind = [asked[reference] for reference in answered if _sees_not(ray, reference)]
    for reference in unanswered:
        ray.cancel(reference)
    if blind:
        raise _refusal(folder, blind)


def _sees_not(ray: Any, reference: Any) -> bool:
    try:
        return ray.get(reference) is not None
    except ray.exceptions.RayError:
        return False  # the node was lost, or lacks d2filter: its tasks will report it


def _refusal(folder: Folder, nodes: list[str]) -> UsageError:
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return UsageError(
        f"run directory {folder.url} is not the same folder on all nodes of the cluster: "
        f"{', '.join(nodes[:3])}{more} cannot see what was written there; choose an --out-dir on "
        "storage that all nodes share, at one path, or an object store (s3://…)"
    )
