"""Errors of the launchers before they launch; the files for Kubernetes and SkyPilot are consistent."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_lm.common.environment import AGENT_VARIABLES, Machine, settings
from moe_lm.common.exits import MISUSED, STOPPED
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
NEEDED = ("bash", "dirname", "ssh", "pdsh", "deepspeed", "moe-lm", "python")


def programs(folder: Path, missing: str = "") -> str:
    """A search path on which every program that the scripts need seems to be there, but the `missing` one."""
    folder.mkdir()
    for name in NEEDED:
        if name in ("bash", "dirname"):
            (folder / name).symlink_to(f"/usr/bin/{name}")
        elif name != missing:
            (folder / name).write_text(f'#!/bin/sh\necho {name} "$@"\n', encoding="utf-8")
            (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts in a folder of their own, which has no .venv."""
    folder = tmp_path / "project" / "launch"
    folder.mkdir(parents=True)
    for script in ("deepspeed.sh", "torchrun.sh"):
        (folder / script).write_bytes((LAUNCH / script).read_bytes())
    return folder.parent


def launch(project: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/bash", str(project / "launch" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("script", "config", "missing", "environment", "message"),
    [
        ("deepspeed.sh", "", "", {}, "no config named; run: bash launch/deepspeed.sh CONFIG [key=value ...]"),
        ("deepspeed.sh", "c.yaml", "ssh", {}, "ssh is not installed; run: apt-get install openssh-client"),
        ("deepspeed.sh", "c.yaml", "pdsh", {}, "pdsh is not installed; run: apt-get install pdsh"),
        ("deepspeed.sh", "c.yaml", "deepspeed", {}, "moe-lm is not installed; run: bash launch/setup.sh"),
        (
            "deepspeed.sh", "c.yaml", "", {"HOSTFILE": "nowhere"},
            "there is no hostfile nowhere; copy launch/hostfile.example there, or set HOSTFILE",
        ),
        ("torchrun.sh", "", "", {}, "no config named; run: bash launch/torchrun.sh CONFIG [key=value ...]"),
        ("torchrun.sh", "c.yaml", "moe-lm", {}, "moe-lm is not installed; run: bash launch/setup.sh"),
        ("torchrun.sh", "c.yaml", "", {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR, the machine where all meet"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_a_sentence(
    project: Path, tmp_path: Path, script: str, config: str, missing: str, environment: dict[str, str], message: str
) -> None:
    done = launch(project, script, *config.split(), PATH=programs(tmp_path / "bin", missing), **environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_the_script_for_slurm_says_so_outside_of_it() -> None:
    done = subprocess.run(
        ["/usr/bin/bash", str(LAUNCH / "slurm.sbatch"), "c.yaml"], capture_output=True, text=True, env={}
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: this is a script for Slurm; run: sbatch --nodes=2")


def test_both_scripts_run_their_verb_with_what_they_were_given(project: Path, tmp_path: Path) -> None:
    path = programs(tmp_path / "bin")
    (project / "launch" / "hostfile").write_bytes((LAUNCH / "hostfile.example").read_bytes())
    for script in ("deepspeed.sh", "torchrun.sh"):
        done = launch(project, script, "c.yaml", "train.steps=3", PATH=path)
        assert done.stderr == ""
        assert done.stdout.endswith(" --module moe_lm pretrain c.yaml train.steps=3\n")
        for verb in ("finetune", "prepare", "data verify"):
            done = launch(project, script, "c.yaml", PATH=path, VERB=verb)
            assert done.stdout.endswith(f" --module moe_lm {verb} c.yaml\n")


@pytest.mark.parametrize("verb", ["finetune", "prepare", "data verify"])
def test_under_slurm_every_verb_is_run_and_those_that_train_are_tried_before(tmp_path: Path, verb: str) -> None:
    path = programs(tmp_path / "bin")
    for name, script in {"moe-lm": 'echo "$@" >&2', "srun": 'echo "$@"', "squeue": ""}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["/usr/bin/bash", str(LAUNCH / "slurm.sbatch"), "c.yaml", "data.workers=2"]
    environment = job | {"PATH": f"{path}:/usr/bin:/bin", "VERB": verb}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    tried = f"{verb} c.yaml data.workers=2 --dry-run --processes 4\n" if verb == "finetune" else ""
    assert (done.returncode, done.stderr) == (0, tried)
    assert done.stdout == f"--kill-on-bad-exit=1 moe-lm {verb} c.yaml data.workers=2\n"


def run_config(command: str) -> Path:
    """The config that a line with launch/torchrun.sh names."""
    (config,) = re.findall(r"launch/torchrun\.sh (\S+)", command)
    return ROOT / config


def test_the_image_is_installed_by_the_setup_script_where_kubernetes_looks_for_it() -> None:
    """Read, not built: what needs a GPU comes with torch's wheels and the machine's driver."""
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    steps = [tuple(line.split(" ", 1)) for line in lines if line]
    assert [name for name, _ in steps] == ["FROM", "RUN", "WORKDIR", "COPY", "ARG", "RUN", "ENV", "CMD"]
    (base, packages, folder, copied, extra, installed, path, _) = [value for _, value in steps]
    version = re.fullmatch(r"python:3\.(\d+)-slim-bookworm", base)
    assert version is not None
    assert f"python3.{version[1]}" in (LAUNCH / "setup.sh").read_text(encoding="utf-8")  # one that setup.sh takes
    assert re.fullmatch(r"apt-get update && apt-get install --yes --no-install-recommends g\+\+ && rm -rf .*", packages)
    assert (copied, extra, installed) == (". .", "EXTRA=", 'bash launch/setup.sh "$EXTRA"')
    assert path == f"PATH={folder}/.venv/bin:$PATH"
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == folder
    assert f"docker build -f launch/Dockerfile -t {container['image']} ." in text
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", ".git", "runs", "hub", "data"} <= set(ignored)  # where the docs put runs, models and tasks
    assert not [
        name for name in ("launch", "moe_lm", "pyproject.toml", "constraints.txt", "configs") if name in ignored
    ]


def test_kubernetes_file_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], service["apiVersion"]) == ("Service", "v1")
    assert (job["kind"], job["apiVersion"]) == ("Job", "batch/v1")
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    runs = next(item["mountPath"] for item in container["volumeMounts"] if item["name"] == "runs")
    assert Path(environment["HF_HOME"]).is_relative_to(runs)
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert subdomain == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{subdomain}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["NPROC"])
    assert {item["name"] for item in container["volumeMounts"]} == {item["name"] for item in pod["volumes"]}
    assert run_config(" ".join(container["command"])).is_file()
    agent = {setting.name: setting.value for setting in settings(AGENT_VARIABLES, Machine(8, 8))}
    assert pod["terminationGracePeriodSeconds"] > int(agent["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert codes == {MISUSED: "FailJob", STOPPED: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # else Kubernetes refuses the policy


def test_the_job_that_prepares_fills_the_volume_of_the_run() -> None:
    _, run = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    prepare = yaml.safe_load((LAUNCH / "kubernetes-prepare.yaml").read_text(encoding="utf-8"))
    pods = [job["spec"]["template"]["spec"] for job in (run, prepare)]
    (of_run,), (own,) = (pod["containers"] for pod in pods)
    for name in ("image", "imagePullPolicy", "workingDir", "envFrom"):
        assert own[name] == of_run[name]
    assert all(entry in of_run["env"] for entry in own["env"])
    assert own["volumeMounts"] == of_run["volumeMounts"][:1]
    assert pods[1]["volumes"] == pods[0]["volumes"][:1]
    config = run_config(" ".join(of_run["command"]))
    assert f"moe-lm prepare {config.relative_to(ROOT)}\n" in own["command"][-1]
    assert re.findall(r"moe-lm tokenizer .*", own["command"][-1])[0] in config.read_text(encoding="utf-8")


def test_the_skypilot_file_trains_from_a_bucket_and_into_it(project: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == STOPPED
    assert {source.partition("/")[0] for source in task["file_mounts"].values()} == {"${BUCKET}"}
    _, script, extra = task["setup"].split()
    assert (ROOT / script).is_file()
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    environment = task["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "PATH": programs(tmp_path / "bin")}
    command = ["/usr/bin/bash", "-c", task["run"]]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    options, _, arguments = done.stdout.partition(" --module moe_lm pretrain ")
    assert "--nnodes 1 --nproc-per-node 8" in options
    config, *overrides = arguments.split()
    loaded = load_config(PretrainConfig, ROOT / config, overrides)
    assert {str(loaded.data.tokenizer), str(loaded.data.shards)} == set(task["file_mounts"])
    assert loaded.checkpoint.upload_to == f"{task['envs']['BUCKET']}/runs/{loaded.run_dir.name}"
