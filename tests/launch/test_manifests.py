"""Files for Kubernetes, Compose, shells and image builders: valid and consistent."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from harness.cli import add_run_arguments
from harness.config.command_line import parse_args
from harness.errors import ConfigError, HarnessError, NonFiniteError, RunDirectoryGone
from tests.support.helpers import ROOT

MANIFESTS = sorted((ROOT / "launch/k8s").glob("*.yaml"))
SCRIPTS = sorted(
    path
    for folder in ("docker", "launch", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())

JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": {
                            "type": "string",
                            "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
                        },
                    },
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "action"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string"},
                                    "action": {"enum": ["FailJobSet", "RestartJobSet"]},
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {"enum": ["PodFailurePolicy"]},
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 0},
                            "template": {
                                "type": "object",
                                "required": ["spec"],
                                "additionalProperties": False,
                                "properties": {"metadata": {}, "spec": {"type": "object"}},
                            },
                        },
                    },
                },
            },
        },
    },
}
"""What we use of JobSet's v1alpha2 (jobset.x-k8s.io_jobsets.yaml in kubernetes-sigs/jobset)."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def jobs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The Jobs that a manifest leads to."""
    if document["kind"] == "Job":
        return [document]
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{document['metadata']['name']}-{job['name']}-0"},
            "spec": job["template"]["spec"],
        }
        for job in document["spec"].get("replicatedJobs", [])
    ]


ALL_JOBS = [job for path in MANIFESTS for document in documents(path) for job in jobs(document)]


def check(document: dict[str, Any]) -> None:
    """Raises ValidationError of its own kind unless the document is what Kubernetes accepts."""
    if document["kind"] != "JobSet":
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(document, JOBSET)
    for job in jobs(document):
        check(job)


@pytest.mark.parametrize("job", ALL_JOBS, ids=lambda job: job["metadata"]["name"])
def test_only_what_a_restart_cannot_mend_fails_a_job_permanently(job: dict[str, Any]) -> None:
    (rule,) = [r for r in job["spec"]["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    errors = [HarnessError, *HarnessError.__subclasses__()]
    permanent = {e for e in errors if e.code in rule["onExitCodes"]["values"]}
    assert permanent == {ConfigError, NonFiniteError, RunDirectoryGone}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path: Path) -> None:
    for document in documents(path):
        check(document)


def test_an_error_in_a_manifest_is_found() -> None:
    """Also deep in the Job of a JobSet."""
    for spoil in ("imgae", "terminationGracePeriod"):
        (document,) = documents(ROOT / "launch/k8s/jobset.yaml")
        pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        pod["containers"][0][spoil] = "x"
        with pytest.raises(kubernetes_validate.ValidationError, match=spoil):
            check(document)
    document["spec"]["replicas"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replicas"):
        check(document)


@pytest.mark.parametrize("job", ALL_JOBS, ids=lambda job: job["metadata"]["name"])
def test_a_pod_matches_the_image(job: dict[str, Any]) -> None:
    """Its user, its runs, its health check; shared memory, and time to save."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    uid = re.search(r"^USER (\d+):", DOCKERFILE, re.MULTILINE)
    assert uid and pod["securityContext"]["fsGroup"] == int(uid[1])
    assert f"CMD {container['readinessProbe']['exec']['command']}".replace("'", '"') in DOCKERFILE
    (claim,) = documents(ROOT / "launch/k8s/runs.yaml")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    runs = mounts["/harness/runs"]["persistentVolumeClaim"]
    assert runs["claimName"] == claim["metadata"]["name"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["terminationGracePeriodSeconds"] > save_seconds(command(job))


def command(job: dict[str, Any]) -> list[str]:
    """What the second pod of a Job runs; without `harness run`, which ends with its exit code."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    if words[0] != "harness":
        assert words[0] == "python"
        return words
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    assert words[1] == "run"
    return parser.parse_args(words[2:]).words[1:]


def save_seconds(words: list[str]) -> int:
    """What torchrun leaves its ranks after a signal; DeepSpeed's launcher, or none, 30."""
    return torchrun(words).shutdown_timeout if words[0] == "torchrun" else 30


def torchrun(words: list[str]) -> Any:
    """torchrun's own reading of its command line."""
    return get_args_parser().parse_args(words[1:])


COMMANDS = [command(job) for job in ALL_JOBS]
COMMANDS += [service["command"] for service in COMPOSE["services"].values()]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_command_is_parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher, and by the entry point, whose config it leads to."""
    monkeypatch.chdir(ROOT)
    if words[0] == "torchrun":
        torchrun(words)
    entry = words.index("launch/train.py")
    assert parse_args(words[entry + 1 :]).run_dir.parts[0] == "runs"


def test_a_permanent_failure_of_a_job_is_one_of_the_jobset() -> None:
    (document,) = documents(ROOT / "launch/k8s/jobset.yaml")
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_pods_of_the_jobset_connect() -> None:
    """As many nodes as pods, at the name that JobSet gives the first one."""
    (document,) = documents(ROOT / "launch/k8s/jobset.yaml")
    (job,) = jobs(document)
    words = torchrun(command(job))
    assert words.nnodes == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert job["spec"]["completionMode"] == "Indexed"
    first_pod = f"{job['metadata']['name']}-0"
    assert words.master_addr == f"{first_pod}.{document['spec']['network']['subdomain']}"


def test_the_containers_of_compose_connect() -> None:
    nodes = COMPOSE["services"]
    for number, node in enumerate(nodes.values()):
        words = torchrun(node["command"])
        assert words.nnodes == str(len(nodes))
        assert words.master_addr == next(iter(nodes.values()))["hostname"]
        assert node["environment"]["PET_NODE_RANK"] == number
        assert node["stop_grace_period"] == "2m" and words.shutdown_timeout < 120
        assert node["volumes"] == [f"{next(iter(COMPOSE['volumes']))}:/harness/runs"]


def run(tool: str, *words: str | Path) -> None:
    """Runs a linter of the dev extra; what it finds is the failure."""
    path = shutil.which(tool, path=Path(sys.executable).parent) or shutil.which(tool)
    assert path, f"{tool} is not installed: pip install -e '.[dev]'"
    done = subprocess.run([path, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    run("shellcheck", path)


def test_hadolint_finds_nothing() -> None:
    run("hadolint", ROOT / "docker/Dockerfile")


def test_make_train_takes_a_free_port_unless_one_is_given() -> None:
    def printed(*words: str) -> list[str]:
        command = ["make", "--dry-run", "--old-file=.venv/.installed", "train", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        return re.findall(r"--master_port (\d+) ", done.stdout)

    (one,), (other,) = printed(), printed()
    assert {one, other}.isdisjoint({"29500"}) and one != other
    assert printed("MASTER_PORT=1234") == printed("PORT=1234") == ["1234"]
