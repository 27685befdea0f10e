"""Checks of the Docker images that need no Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import d2filter

ROOT = Path(__file__).parents[2]
FLAVORS = {"gpu": "docker/Dockerfile", "cpu": "docker/Dockerfile.cpu"}
SCRIPTS = Path(sysconfig.get_path("scripts"))

Stage = list[tuple[str, str]]


def stages(flavor: str) -> dict[str, Stage]:
    """Instructions and their words, by stage, in order; the last stage is called `image`."""
    text = (ROOT / FLAVORS[flavor]).read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: dict[str, Stage] = {}
    current: Stage = []
    for line in filter(str.strip, joined.splitlines()):
        word, rest = line.split(None, 1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name or "image"] = [("FROM", base)]
        else:
            current.append((word, rest))
    return found


def words(stage: Stage, instruction: str) -> list[str]:
    return [rest for word, rest in stage if word == instruction]


def environment(stage: Stage) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in words(stage, "ENV") for pair in rest.split())


def copied(stage: Stage) -> list[tuple[list[str], str]]:
    """Sources and target of what comes from the build context."""
    lines = [rest.split() for rest in words(stage, "COPY") if not rest.startswith("--from=")]
    return [(line[:-1], line[-1]) for line in lines]


def sent(folder: Path) -> set[str]:
    """Files of a folder that a build may copy, by Docker's reading of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    files = {path for path in exclude_paths(str(folder), rules) if (folder / path).is_file()}
    return files - {".dockerignore"}  # sent along for the rules in it


@pytest.fixture(scope="module")
def context() -> set[str]:
    """Files that a build of the images may copy."""
    return sent(ROOT)


def lay(stage: Stage, context: set[str], there: Path) -> Path:
    """What the COPY lines of a stage bring from the context."""
    for sources, target in copied(stage):
        for source in sources:
            for path in (p for p in context if p == source or p.startswith(source + "/")):
                name = Path(path).name if path == source else Path(path).relative_to(source)
                place = there / target.lstrip("/") / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, place)
    return there


def make_wheel(source: Path, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = folder.glob("d2filter-*.whl")
    return wheel


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


@pytest.fixture(scope="module")
def wheel(context: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from only the files that its stage copies."""
    there = tmp_path_factory.mktemp("wheel")
    return make_wheel(lay(stages("gpu")["wheel"], context, there / "src"), there)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_hadolint_finds_nothing(flavor: str) -> None:
    found = subprocess.run(
        [SCRIPTS / "hadolint", "--no-color", ROOT / FLAVORS[flavor]], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_everything_that_is_copied_is_in_the_build_context(flavor: str, context: set[str]) -> None:
    parts = stages(flavor)
    sources = [s for stage in parts.values() for found, _ in copied(stage) for s in found]
    assert {"d2filter", "jobs", "docker/constraints.txt"} <= set(sources)
    missing = [s for s in sources if not any(p == s or p.startswith(s + "/") for p in context)]
    assert missing == []


@pytest.mark.parametrize("flavor", FLAVORS)
def test_stages_take_only_from_stages_before_them(flavor: str) -> None:
    before: list[str] = []
    for name, stage in stages(flavor).items():
        taken = re.findall(r"from=([\w-]+)", " ".join(rest for _, rest in stage))
        base = stage[0][1]
        assert set(taken) <= set(before), name
        assert base in before or ":" in base, f"{name}: {base} has no version"
        before.append(name)


def test_nothing_private_or_left_over_is_sent_to_a_build(tmp_path: Path) -> None:
    wanted = {"d2filter/a.py", "d2filter/models/w.safetensors", "jobs/run.py", "pyproject.toml"}
    unwanted = {
        ".git/config", "docker/s3.env", "s3.env", "tests/test_a.py", "jobs/results/bench.md",
        "jobs/__pycache__/run.pyc", "d2filter/algorithm/__pycache__/cut.1.nbc", "out/subset.npy",
    }  # fmt: skip
    for name in wanted | unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sent(tmp_path) == wanted


def test_the_build_context_is_small_and_contains_the_weights(context: set[str]) -> None:
    assert "d2filter/models/tiny/weights.safetensors" in context
    assert sum((ROOT / path).stat().st_size for path in context) < 20_000_000


@pytest.mark.parametrize(("flavor", "extras"), [("gpu", {"gpu", "s3"}), ("cpu", {"cpu", "s3"})])
def test_images_install_extras_that_the_project_has(
    flavor: str, extras: set[str], project: dict[str, Any]
) -> None:
    installed = re.findall(r'"\$1\[([\w,]+)\]"', " ".join(words(stages(flavor)["packages"], "RUN")))
    assert [set(found.split(",")) for found in installed] == [extras]
    assert extras <= set(project["optional-dependencies"])


def test_every_pin_is_one_that_the_project_allows(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["gpu"], *extras["s3"]]
    asked = [Requirement(one) for one in [*wanted, *project["build"], "ray[default]"]]
    missing = [one.name for one in asked if canonicalize_name(one.name) not in pins]
    assert missing == [], "the head of docker/constraints.txt says how to add them"
    for one in asked:
        assert one.specifier.contains(pins[canonicalize_name(one.name)]), one


def test_the_cuda_of_the_base_is_that_of_the_pinned_torch(pins: dict[str, Version]) -> None:
    base = stages("gpu")["image"][0][1]
    match = re.fullmatch(r"nvidia/cuda:([\d.]+)-runtime-ubuntu24\.04", base)
    assert match, base
    assert Version(match[1]) == pins["cuda-toolkit"]  # a requirement of torch, exact in its wheel


def test_both_images_differ_only_in_what_they_install() -> None:
    """Ray refuses a node with another Python: both take that of one Ubuntu release."""
    images = [stages(flavor)["image"] for flavor in FLAVORS]
    assert images[1][0][1].startswith("ubuntu:noble-")  # noble is 24.04, as in the CUDA base's tag
    same = [[line for line in image if line[0] not in ("FROM", "LABEL")] for image in images]
    assert same[0] == same[1]
    assert stages("gpu")["wheel"] == stages("cpu")["wheel"]
    assert stages("gpu")["build"] == stages("cpu")["build"]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_an_image_has_the_libraries_that_wheels_take_from_the_system(flavor: str) -> None:
    """numba's OpenMP threads and FAISS load libgomp, which a slim image lacks."""
    [installed] = [run for run in words(stages(flavor)["image"], "RUN") if "apt-get install" in run]
    packages = installed.partition("--no-install-recommends")[2].partition("&&")[0].split()
    assert {"libgomp1", "python3.12", "tini", "wget"} <= set(packages)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_an_image_prints_its_version(flavor: str) -> None:
    [label] = words(stages(flavor)["image"], "LABEL")
    tag = f"{d2filter.__version__}-{flavor}"
    assert f'version="{tag}"' in label
    assert f"-t d2filter:{tag} ." in (ROOT / FLAVORS[flavor]).read_text()


@pytest.mark.parametrize("flavor", FLAVORS)
def test_an_image_runs_d2filter_as_a_user_whose_folders_are_writable(flavor: str) -> None:
    image = stages(flavor)["image"]
    # exec form, and tini: SIGTERM arrives
    assert json.loads(words(image, "ENTRYPOINT")[0]) == ["tini", "--", "d2filter"]
    [user] = words(image, "USER")
    uid, gid = user.split(":")
    [setup] = [run for run in words(image, "RUN") if "useradd" in run]
    assert uid == gid
    assert int(uid) > 1000
    assert f"--uid {uid} --user-group" in setup
    match = re.search(r"install -d -o d2filter -g d2filter ([/\w ]+) &&", setup)
    assert match
    assert {"/cache", "/data"} <= set(match[1].split())  # volumes are mounted there
    env = environment(image)
    for name in ("NUMBA_CACHE_DIR", "HF_HOME", "TMPDIR"):
        assert env[name] in match[1].split(), name
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert words(image, "WORKDIR") == ["/opt/d2filter"]
    assert ("jobs", "/opt/d2filter/jobs") in [(s[0], target) for s, target in copied(image)]
    assert env["PYTHONPATH"] == "/opt/d2filter"


def test_the_wheel_holds_every_module_and_the_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "d2filter").rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix not in (".nbi", ".nbc")
    }
    assert inside == there
    assert "d2filter/models/tiny/weights.safetensors" in inside


def test_packages_are_installed_for_the_requirements_of_the_wheel(
    wheel: Path, context: set[str], tmp_path: Path
) -> None:
    source = lay(stages("gpu")["packages"], context, tmp_path / "src")
    assert not (source / "README.md").exists()
    (source / "README.md").touch()  # as its first RUN does
    empty = make_wheel(source, tmp_path)
    assert empty.name == wheel.name
    assert requirements(empty) == requirements(wheel)
    assert empty.stat().st_size < 100_000


def test_wheel_and_named_runs_start_in_an_empty_folder(
    wheel: Path, context: set[str], tmp_path: Path
) -> None:
    """In an environment of its own, which borrows all packages but d2filter; the named runs from
    where the image has them.
    """
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile",
         "--no-deps", "--no-index", str(wheel)],
        check=True,
    )  # fmt: skip
    [site] = venv.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    image = stages("cpu")["image"]
    laid = lay(image, context, tmp_path / "image" / "root")
    env = os.environ | {"PYTHONPATH": f"{laid}{environment(image)['PYTHONPATH']}"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    where = run(python, "-c", "import d2filter; print(d2filter.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert run(venv / "bin/d2filter", "--version").split()[-1] == d2filter.__version__
    assert "usage: d2filter status" in run(venv / "bin/d2filter", "status", "--help")
    assert run(python, "-m", "jobs.run", "--list").startswith("datacomp_small ")
    assert list(folder.iterdir()) == []


@pytest.mark.nightly  # torch: gigabytes
@pytest.mark.timeout(3000)
def test_the_wheel_with_its_extra_and_the_pins_runs_the_demo(
    wheel: Path, pins: dict[str, Version], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = str(venv / "bin/python")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "docker/constraints.txt"),
         f"{wheel}[cpu,s3]", "ray[default]"],
        check=True,
    )  # fmt: skip
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    installed = {canonicalize_name(p["name"]): p["version"] for p in json.loads(listed.stdout)}
    ours = {"d2filter", "pip"}
    if sys.version_info[:2] == (3, 12):  # the images'; others need a package more or less
        assert installed.keys() - ours <= pins.keys()
    assert all(Version(v) == pins[n] for n, v in installed.items() if n in pins)
    folder = tmp_path / "empty"
    folder.mkdir()
    shown = subprocess.run(
        [venv / "bin/d2filter", "demo", "--pairs", "600"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "D2 as published" in shown.stdout


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker/compose.yaml").read_text()))


def test_compose_builds_and_starts_the_images_of_this_version(compose: dict[str, Any]) -> None:
    flavors = {"head": "cpu", "worker": "cpu", "worker-gpu": "gpu"}
    assert compose["services"].keys() == flavors.keys()
    for name, flavor in flavors.items():
        service = compose["services"][name]
        assert service["image"] == f"d2filter:{d2filter.__version__}-{flavor}"
        assert service["build"] == {"context": "..", "dockerfile": FLAVORS[flavor]}


def test_compose_starts_ray_with_existing_options(
    compose: dict[str, Any], started_ray: Callable[[list[str]], dict[str, Any]]
) -> None:
    gigabyte = 2**30
    for name, service in compose["services"].items():
        line = [*service["entrypoint"], *service["command"]]
        assert line[:4] == ["tini", "--", "ray", "start"]
        given = started_ray(line[4:])
        assert given["block"]
        assert given["head"] == (name == "head")
        assert given["address"] == (None if name == "head" else "head:6379")
        if name == "head":
            assert given["port"] == 6379
        assert given["object_store_memory"] < int(service["shm_size"].removesuffix("gb")) * gigabyte
        assert given["object_spilling_directory"].startswith(environment(
            stages("cpu")["image"])["TMPDIR"])  # fmt: skip


def test_compose_checks_nodes_with_the_health_endpoints_of_ray(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        test = service["healthcheck"]["test"]
        assert test[:2] == ["CMD", "wget"]
        wanted = ":8265/api/gcs_healthz" if name == "head" else ":52365/api/local_raylet_healthz"
        assert test[-1] == f"http://localhost{wanted}"
        if name != "head":
            assert service["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert " wget" in words(stages("cpu")["image"], "RUN")[0]


def test_compose_holds_no_secret_and_opens_nothing_to_the_network(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        token = service["environment"]["RAY_AUTH_TOKEN"]
        assert token.startswith("${RAY_AUTH_TOKEN:?")  # compose stops where there is none
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert not any(name.startswith("AWS_") for name in service["environment"])
        assert [file["required"] for file in service["env_file"]] == [False]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_compose_limits_workers_and_gives_gpus_to_the_one_for_them(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    reserved = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in reserved] == [["gpu"]]
    for name in ("worker", "worker-gpu"):
        assert re.fullmatch(r"\$\{D2FILTER_\w*CPUS:-\d+\}", services[name]["cpus"])
        assert re.fullmatch(r"\$\{D2FILTER_\w*MEMORY:-\d+g\}", services[name]["mem_limit"])
    mounts = {name: [v.rsplit(":", 1) for v in s["volumes"]] for name, s in services.items()}
    assert all([place for _, place in m] == ["/data", "/cache"] for m in mounts.values())
    assert set(compose["volumes"]) == {"data", "cache"}
