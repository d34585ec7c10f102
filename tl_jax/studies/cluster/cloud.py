"""The launchers "tpu" (all hosts of a TPU VM, by ssh) and "gke" (a JobSet): which command starts the same run there.

Both need the checkout and its environment in place: in the VM's folder, or in the container image.
"""

import functools
import json
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from tl_jax.studies.cluster.submit import Plan, carry_out, check_settings, open_runs, parse_settings, worker_arguments

PORT = 12321  # of process 0 in a JobSet, where every pod has its own address
TPU = (("name", "zone", "directory"), ("project", "python"))
GKE = (
    ("name", "image", "processes", "claim", "mount"),
    ("namespace", "directory", "python", "restarts", "limit.*", "selector.*"),
)


def launch(
    plan: Callable[[Sequence[str], str], Plan],
    workdir: pathlib.Path,
    *,
    command: Sequence[str] = (),
    settings: str = "",
    jobs: int = 0,
    submit: bool = False,
) -> int:
    """Prints the command that runs a planned study, or `python COMMAND...`, there; runs it with `submit`.

    plan: `tpu` or `gke`. The workdir is the same folder here and there. Raises ValueError for more than one job: these
    have one user.
    """
    if jobs > 1:
        raise ValueError(f"--jobs {jobs}: this launcher does the runs of a study one after the other; leave --jobs out")
    if command:
        return carry_out(plan(command, settings), submit)
    if not (keys := open_runs(workdir)):
        print(f"{workdir}: nothing to do, see python -m tl_jax report {workdir}", flush=True)
        return 0
    return carry_out(plan([*worker_arguments(workdir), *keys], settings), submit)


def tpu(arguments: Sequence[str], settings: str) -> Plan:
    """`python ARGUMENTS...` on every host of a TPU VM; jax finds the other hosts by itself.

    settings: name, zone and project of the TPU VM; directory: of the checkout there; python: the interpreter there
    (default .venv/bin/python). Raises ValueError that lists all settings that do not fit.
    """
    given = parse_settings(settings)
    check_settings("--cloud", given, *TPU)
    run = shlex.join([given.get("python", ".venv/bin/python"), *arguments])
    project = [f"--project={given['project']}"] if "project" in given else []
    return Plan([
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", given["name"]),
        f"--zone={given['zone']}",
        *project,
        "--worker=all",
        f"--command=cd {shlex.quote(given['directory'])} && exec {run}",
    ])  # fmt: skip


def gke(arguments: Sequence[str], settings: str) -> Plan:
    """`python ARGUMENTS...` in the pods of a JobSet, which starts all anew when one fails: the run resumes.

    settings: name; image; processes: pods, one process each; claim: a PersistentVolumeClaim that all can write to,
    mounted at mount, where the workdir lies; namespace; directory: of the checkout in the image; python (default
    python3); restarts (default 3); limit.RESOURCE=N, such as limit.nvidia.com/gpu=1; selector.LABEL=VALUE, of nodes.
    Raises ValueError that lists all settings that do not fit.
    """
    given = parse_settings(settings)
    check_settings("--cloud", given, *GKE)
    problems = [
        f"  {key}={given[key]}: expected a whole number of at least {least}"
        for key, least in (("processes", 1), ("restarts", 0))
        if key in given and not (given[key].isdigit() and int(given[key]) >= least)
    ]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", given["name"]):
        problems.append(f"  name={given['name']}: expected up to 40 of a-z, 0-9 and -, first a letter, last no -")
    if problems:
        raise ValueError("--cloud does not fit:\n" + "\n".join(problems))
    namespace = [f"--namespace={given['namespace']}"] if "namespace" in given else []
    return Plan(["kubectl", "apply", *namespace, "-f", "-"], json.dumps(_job_set(arguments, given), indent=1))


def _job_set(arguments: Sequence[str], given: dict[str, str]) -> dict[str, Any]:
    """The JobSet as JSON data, and so as YAML."""
    name, processes = given["name"], int(given["processes"])
    together = ["--coordinator", f"{name}-run-0-0.{name}:{PORT}", "--num-processes", str(processes)]
    container = {
        "name": "run",
        "image": given["image"],
        # Kubernetes replaces $(NAME) in a command, and $$ by $.
        "command": [
            *(word.replace("$", "$$") for word in (given.get("python", "python3"), *arguments)),
            *(together + ["--process-id", "$(PROCESS_ID)"] if processes > 1 else []),
        ],
        "env": [{"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}],
        "resources": {"limits": _prefixed(given, "limit.")},
        "volumeMounts": [{"name": "work", "mountPath": given["mount"]}],
    }
    if "directory" in given:
        container["workingDir"] = given["directory"]
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": _prefixed(given, "selector."),
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": given["claim"]}}],
    }
    job = {
        "parallelism": processes,
        "completions": processes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {"maxRestarts": int(given.get("restarts", "3"))},
            "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": job}}],
        },
    }


INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def _prefixed(given: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


launch_tpu = functools.partial(launch, tpu)
launch_gke = functools.partial(launch, gke)
