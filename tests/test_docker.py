"""The files in docker/: well-formed, complete, and of one mind about versions. No container engine is needed."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from fedsim.engine.session import HEALTH
from tests.cli import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
README = (DOCKER / "README.md").read_text(encoding="utf-8")


def instructions(text: str = DOCKERFILE) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile with its arguments."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


def name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def pinned() -> dict[str, str]:
    """Versions in requirements.txt."""
    lines = (DOCKER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def argument(key: str) -> str:
    """The default of a build argument."""
    (value,) = [rest.partition("=")[2] for what, rest in instructions() if what == "ARG" and rest.startswith(f"{key}=")]
    return value


def documents(file: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / file).read_text(encoding="utf-8")))


# --- the image --------------------------------------------------------------------------------------------


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    rules = [r for r in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"
    sources = [w for what, rest in instructions() if what == "COPY" for w in shlex.split(rest)[:-1] if w[:2] != "--"]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in rules, f"{source} is ignored"
    assert sorted(r[1:] for r in rules if r.startswith("!")) == sorted(sources)


def test_the_image_has_every_folder_of_the_package() -> None:
    copied = {word for what, rest in instructions() if what == "COPY" for word in shlex.split(rest)[:-1]}
    links = {os.path.basename(os.readlink(p)) for p in (ROOT / "fedsim").iterdir() if p.is_symlink()}
    assert links | {"fedsim", "pyproject.toml", "README.md", "LICENSE"} <= copied and len(links) == 4


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    found = list(instructions())
    users = [rest for what, rest in found if what == "USER"]
    assert users == ["fedsim"] and found.index(("USER", "fedsim")) > max(
        i for i, (what, _) in enumerate(found) if what in ("RUN", "COPY")
    )
    assert [rest for what, rest in found if what == "FROM"] == ["${BASE}"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", argument("BASE"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", argument("TORCH_VERSION"))
    assert any(what == "HEALTHCHECK" for what, _ in found)
    assert not any(what == "ADD" for what, _ in found)


def test_every_dependency_is_pinned_within_the_range_that_fedsim_asks_for() -> None:
    versions = pinned() | {"torch": argument("TORCH_VERSION")}
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    for requirement in map(Requirement, wanted):
        assert versions[name(str(requirement))] in requirement.specifier, requirement
    missing = {
        name(needed)
        for package in versions
        for needed in requires(package) or []
        if (marker := Requirement(needed).marker) is None or marker.evaluate({"extra": ""})
    } - set(versions)
    assert not {m for m in missing if not m.startswith(("nvidia", "cuda", "triton"))}  # torch's own, for GPUs


def test_versions_are_the_same_everywhere() -> None:
    launcher, kubernetes = documents("ray-cluster.yaml")[0], documents("kuberay.yaml")
    assert f"torch=={argument('TORCH_VERSION')}" in "".join(launcher["setup_commands"])
    (cluster,) = [d for d in kubernetes if d["kind"] == "RayCluster"]
    assert cluster["spec"]["rayVersion"] == pinned()["ray"]
    assert f"ray[default]=={pinned()['ray']}" in README
    (gpu,) = documents("compose.gpu.yaml")
    for value in gpu["x-gpu"]["build"]["args"].values():
        assert value in DOCKERFILE and value in README


def test_clusters_notice_a_lost_node_as_those_of_fedsim_do() -> None:
    launcher = " ".join(documents("ray-cluster.yaml")[0]["head_start_ray_commands"])
    for key, value in HEALTH.items():
        assert f"RAY_{key}={value}" in DOCKERFILE and f"RAY_{key}={value}" in launcher


# --- the script of a container ----------------------------------------------------------------------------


def node(tmp_path: Path, *args: str, **env: str) -> tuple[int, list[str], str]:
    """Runs it with commands that only say what they were called with."""
    for command in ("ray", "fedsim", "getent", "sleep"):
        path = tmp_path / command
        if not path.exists():
            path.write_text(f'#!/bin/sh\necho "{command} $*" >> {tmp_path}/calls\n')
            path.chmod(0o755)
    (tmp_path / "getent").write_text('#!/bin/sh\necho "10.1.2.3        STREAM $2"\n')
    (tmp_path / "calls").write_text("")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
    done = subprocess.run(["sh", DOCKER / "fedsim-node", *args], env=env, capture_output=True, text=True, timeout=30)
    return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stderr


def test_a_node_is_a_head_a_worker_a_driver_or_any_command(tmp_path: Path) -> None:
    here = "10.1.2.3:6379"
    status, calls, _ = node(tmp_path, "head", "--num-cpus=2")
    assert status == 0 and calls == ["ray start --head --port=6379 --block --include-dashboard=false --num-cpus=2"]
    status, calls, _ = node(tmp_path, "worker", "--num-cpus=1")
    assert calls == [f"ray health-check --address={here}", f"ray start --address={here} --block --num-cpus=1"]
    status, calls, _ = node(tmp_path, "run", "rounds=3", "name=a b")
    assert calls[1] == f"ray start --address={here} --num-cpus=0 --num-gpus=0"
    assert calls[2:] == [f"fedsim engine=ray engine.address={here} rounds=3 name=a b"]
    assert node(tmp_path, "fedsim", "list")[1] == ["fedsim list"]
    assert node(tmp_path)[1] == ["fedsim --help"]


def test_a_node_gives_up_in_one_line_when_no_head_answers(tmp_path: Path) -> None:
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    status, _, error = node(tmp_path, "worker", FEDSIM_WAIT_S="4", FEDSIM_HEAD="elsewhere")
    assert status == 2 and error.count("\n") == 1 and "elsewhere:6379" in error


# --- the descriptions of clusters -------------------------------------------------------------------------


def test_compose_starts_what_the_image_has() -> None:
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    assert set(services) == {"head", "worker", "driver"}
    roles = re.findall(r"^    (\w+)\)$", (DOCKER / "fedsim-node").read_text(), re.MULTILINE)
    assert {services["head"]["command"][0], services["worker"]["command"][0]} <= set(roles)
    assert services["driver"]["entrypoint"] == ["fedsim-node", "run"] and "run" in roles
    named = {v.partition(":")[0] for s in services.values() for v in s["volumes"]}
    assert named == set(compose["volumes"]) == {"data", "runs"}
    for service in services.values():
        assert "ports" not in service and "expose" not in service
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{service['secrets'][0]}"
        assert service["environment"]["FEDSIM_HEAD"] in services
        assert set(service["secrets"]) <= set(compose["secrets"])
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert set(service["build"]["args"]) <= {r.partition("=")[0] for w, r in instructions() if w == "ARG"}
    (gpu,) = documents("compose.gpu.yaml")
    assert set(gpu["services"]) == set(services)


def test_every_variable_of_compose_is_explained() -> None:
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert used == set(re.findall(r"`([A-Z_]+)`", "".join(re.findall(r"^\| `[^|]+\|", README, re.MULTILINE))))


def test_ray_accepts_its_cluster_file() -> None:
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents("ray-cluster.yaml")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"]) == config["min_workers"]
    with pytest.raises(Exception, match="no_such_key"):  # it looks at all
        validate_config(prepared | {"no_such_key": 1})
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "\n" not in commands[-1].strip()
    sources = {source for source in config["file_mounts"].values() if source != "docker/ray_token"}
    assert sources == {"."}


def test_kuberay_gives_every_container_the_token_and_its_limits() -> None:
    found = {d["kind"]: d for d in documents("kuberay.yaml")}
    assert list(found) == ["PersistentVolumeClaim", "RayCluster", "Job"]
    spec = found["RayCluster"]["spec"]
    pods = [spec["headGroupSpec"]["template"]["spec"], spec["workerGroupSpecs"][0]["template"]["spec"]]
    pods.append(found["Job"]["spec"]["template"]["spec"])
    for pod in pods:
        (container,) = pod["containers"]
        environment = {e["name"]: e for e in container["env"]}
        secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in README
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert pod["securityContext"]["runAsUser"] == int(argument("UID")) and pod["securityContext"]["runAsNonRoot"]
        assert container["image"] in README
    driver = pods[2]["containers"][0]
    assert f"{found['RayCluster']['metadata']['name']}-head-svc" == driver["env"][0]["value"]
    assert driver["args"][0] == "run"
    group = spec["workerGroupSpecs"][0]
    workers = int(re.findall(r"engine.workers=(\d+)", " ".join(driver["args"]))[0])
    cpus = group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert workers <= cpus
    volumes = {v["name"] for v in pods[2]["volumes"]}
    assert {m["name"] for m in driver["volumeMounts"]} == volumes
    claim = pods[2]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]


def test_no_token_is_in_the_repository() -> None:
    assert "ray_token" in (DOCKER / ".gitignore").read_text().split()
    for path in DOCKER.iterdir():
        if path.name != "ray_token":
            assert not re.search(r"\b[0-9a-f]{32,}\b", path.read_text(encoding="utf-8")), path


def test_the_readme_names_every_file_and_its_links_lead_somewhere() -> None:
    for path in DOCKER.iterdir():
        assert path.name in README or fnmatch(path.name, "*ignore") or path.name in ("README.md", "ray_token"), path
    anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^## (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (DOCKER / target).resolve().exists(), target
