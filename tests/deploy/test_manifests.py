"""The manifests for KubeRay, as the operator, Ray's autoscaler and d2filter read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import d2filter

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy/kuberay"
CLUSTERS = ("raycluster.yaml", "rayjob.yaml")
SIZES = {"Gi": 2**30, "Mi": 2**20}

Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    return dict(yaml.safe_load((KUBERAY / name).read_text()))


def cluster_spec(name: str) -> Manifest:
    manifest = read(name)
    spec = manifest["spec"]
    return dict(spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"])


def groups(name: str) -> dict[str, Manifest]:
    """Head and workers, by name."""
    spec = cluster_spec(name)
    return {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}


def pods(name: str) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Group, pod and its container."""
    for group, spec in groups(name).items():
        pod = spec["template"]["spec"]
        [container] = pod["containers"]
        yield group, pod, container


def quantity(text: str) -> int:
    return int(text[:-2]) * SIZES[text[-2:]]


@pytest.mark.parametrize(
    ("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")]
)
def test_a_manifest_has_the_kind_of_its_file_name(name: str, kind: str) -> None:
    manifest = read(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert manifest["metadata"].keys() & {"name", "generateName"}
    assert set(groups(name)) == {"head", "cpu", "gpu"}


def test_the_job_has_the_cluster_of_the_other_manifest() -> None:
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


@pytest.mark.parametrize("name", CLUSTERS)
def test_manifests_and_images_have_one_ray(
    name: str, pins: dict[str, Version], ray_range: Requirement
) -> None:
    version = Version(cluster_spec(name)["rayVersion"])
    assert version == pins["ray"]
    assert ray_range.specifier.contains(version)
    assert version >= Version("2.52")  # the first with the token of authOptions


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_run_the_images_of_this_version(name: str) -> None:
    flavors = {"head": "cpu", "cpu": "cpu", "gpu": "gpu"}
    for group, _, container in pods(name):
        assert container["image"] == f"d2filter:{d2filter.__version__}-{flavors[group]}"


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_autoscaler_finds_cpus_and_gpus_of_each_group(name: str) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    resource = {"metadata": {"name": "x", "namespace": "y"}, "spec": cluster_spec(name)}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    types = {k.removesuffix("group"): v for k, v in config["available_node_types"].items()}
    assert types["head"]["resources"]["CPU"] == 0  # tasks stay away from it
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] == 1
    for group in ("cpu", "gpu"):
        # a run counts the nodes and looks for GPUs as it starts
        assert 1 <= types[group]["min_workers"] < types[group]["max_workers"]
        assert types[group]["resources"]["memory"] > 2**35
    assert cluster_spec(name)["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", CLUSTERS)
def test_groups_start_between_their_bounds(name: str) -> None:
    for group in cluster_spec(name)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_the_gpu_group_takes_gpus_and_stands_their_taint(name: str) -> None:
    for group, pod, container in pods(name):
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert ("nvidia.com/gpu" in limits) == (group == "gpu")
        assert bool(pod.get("tolerations")) == (group == "gpu")
        # whole CPUs, asked for in full: Ray starts tasks for all that it counts
        assert limits["cpu"].isdigit()
        assert (requests["cpu"], requests["memory"]) == (limits["cpu"], limits["memory"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_mounts_are_of_volumes_that_the_pod_has(name: str) -> None:
    for _, pod, container in pods(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert set(mounts) == {"/data", "/scratch", "/dev/shm"}
        assert "persistentVolumeClaim" in volumes[mounts["/data"]]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_knows_its_start_options_and_its_objects_fit_in_shared_memory(
    name: str, started_ray: Callable[[list[str]], dict[str, Any]]
) -> None:
    for group, spec in groups(name).items():
        assert all(isinstance(value, str) for value in spec["rayStartParams"].values())
        given = started_ray([f"--{key}={value}" for key, value in spec["rayStartParams"].items()])
        pod = spec["template"]["spec"]
        [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert given["object_store_memory"] < quantity(shm["sizeLimit"])
        mounts = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"]]
        assert given["object_spilling_directory"].rsplit("/", 1)[0] in mounts
        assert (given["num_cpus"] == 0) == (group == "head")


@pytest.mark.parametrize("name", CLUSTERS)
def test_credentials_come_from_a_secret_and_nodes_ask_for_a_token(name: str) -> None:
    for _, _, container in pods(name):
        keys = {env["name"]: env for env in container["env"]}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"} <= keys.keys()
        for key, env in keys.items():
            if key.startswith("AWS_"):
                assert "value" not in env
                secret = env["valueFrom"]["secretKeyRef"]
                assert (secret["name"], secret["key"]) == ("d2filter-s3", key)
                assert bool(secret.get("optional")) == (key == "AWS_ENDPOINT_URL")
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    how_to = (ROOT / "deploy/README.md").read_text()
    assert "create secret generic d2filter-s3 --from-literal=AWS_ACCESS_KEY_ID=" in how_to


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_run_as_the_user_of_the_images(name: str) -> None:
    found = re.search(r"^USER (\d+):(\d+)$", (ROOT / "docker/Dockerfile").read_text(), re.M)
    assert found
    for _, pod, _ in pods(name):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (int(found[1]), int(found[2]))
        assert context["fsGroup"] == int(found[2])


def test_the_job_is_a_named_run_that_goes_on_after_a_failure(
    named_run: Callable[[str], str],
) -> None:
    spec = read("rayjob.yaml")["spec"]
    assert named_run(spec["entrypoint"]) == "datacomp_medium"
    assert "--set out-dir=/data/" in spec["entrypoint"]  # on the shared volume: pods go
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_commands_of_the_how_to_start_runs_that_there_are(
    named_run: Callable[[str], str],
) -> None:
    text = "\n".join(
        (ROOT / place).read_text() for place in ("deploy/README.md", "deploy/slurm/d2filter.sbatch")
    )
    text = re.sub(r" \\\n#? *", " ", text).replace("…", "s3://pool")
    setting = r"(?: --set [\w-]+=[^\s`]+)"
    commands = re.findall(rf"python -m jobs\.run \w+{setting}+", text)
    by_slurm = re.findall(rf"d2filter\.sbatch (\w+{setting}+)", text)
    assert len(commands) >= 3
    assert len(by_slurm) >= 2
    for command in [*commands, *(f"python -m jobs.run {words}" for words in by_slurm)]:
        named_run(command)


def test_files_that_the_how_to_names_are_there() -> None:
    text = (ROOT / "deploy/README.md").read_text() + (ROOT / "docker/README.md").read_text()
    named = set(re.findall(r"(?:deploy|docker)/[\w./-]+\.(?:yaml|sbatch)", text))
    assert {"deploy/kuberay/rayjob.yaml", "docker/compose.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []
