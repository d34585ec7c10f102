"""The launchers "tpu" (all hosts of a TPU VM, by ssh) and "gke" (a JobSet).

Both need the checkout and its environment in place: in the VM's folder, or in the container image.
"""

import functools
import json
import pathlib
import re
import shlex
from collections.abc import Collection, Sequence
from typing import Any

from tl_jax.core import messages
from tl_jax.studies.cluster.launchers import Plan, hand_out, parse_settings

PORT = 12321  # of process 0 in a JobSet, where every pod has its own address
TPU = (("name", "zone", "directory"), ("project", "python"))
GKE = (
    ("name", "image", "processes", "claim", "mount"),
    ("namespace", "directory", "python", "restarts", "limit.*", "selector.*"),
)


def tpu(
    arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path | None = None, jobs: int = 0
) -> Plan:
    """`python ARGUMENTS... KEYS...` on every host of a TPU VM; jax finds the other hosts by itself.

    settings: name, zone and project of the TPU VM; directory: of the checkout there; python: the interpreter there
    (default .venv/bin/python). Raises ValueError that lists all settings that do not fit.
    """
    given = _settings(settings, jobs, *TPU)
    run = shlex.join([given.get("python", ".venv/bin/python"), *arguments, *keys])
    return Plan([
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", given["name"], f"--zone={given['zone']}",
        *([f"--project={given['project']}"] if "project" in given else []),
        "--worker=all", f"--command=cd {shlex.quote(given['directory'])} && exec {run}",
    ])  # fmt: skip


def gke(
    arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path | None = None, jobs: int = 0
) -> Plan:
    """`python ARGUMENTS... KEYS...` in the pods of a JobSet, which starts all anew when one fails: the run resumes.

    settings: name; image; processes: pods, one process each; claim: a PersistentVolumeClaim that all can write to,
    mounted at mount, where the workdir lies; namespace; directory: of the checkout in the image; python (default
    python3); restarts (default 3); limit.RESOURCE=N, such as limit.nvidia.com/gpu=1; selector.LABEL=VALUE, of nodes.
    Raises ValueError that lists all settings that do not fit.
    """
    given = _settings(settings, jobs, *GKE)
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
    text = json.dumps(_job_set([*arguments, *keys], given), indent=1)
    return Plan(["kubectl", "apply", *namespace, "-f", "-"], text)


def _settings(text: str, jobs: int, needed: Collection[str], known: Collection[str]) -> dict[str, str]:
    """The settings; one ValueError names all that are missing, empty or unknown. Known ones may end in `*`."""
    if jobs > 1:
        raise ValueError(f"--jobs {jobs}: this launcher does the runs of a study one after the other; leave --jobs out")
    given = parse_settings(text)
    problems = [f"  {name} is missing" for name in needed if not given.get(name)]
    prefixes, names = tuple(name[:-1] for name in known if name.endswith("*")), {*needed, *known}
    unknown = [name for name in given if name not in names and not (prefixes and name.startswith(prefixes))]
    problems += [f"  {name} is unknown{messages.nearest(name, names)}" for name in unknown]
    if problems:
        expected = f"{', '.join(needed)}; possible: {', '.join(known)}"
        raise ValueError("--cloud does not fit:\n" + "\n".join(problems) + f"\nneeded: {expected}")
    return given


def _job_set(arguments: Sequence[str], given: dict[str, str]) -> dict[str, Any]:
    """assets/job_set.json with what is given filled in; JSON data, and so YAML."""
    job_set = json.loads((pathlib.Path(__file__).parents[2] / "assets" / "job_set.json").read_text())
    name, processes, spec = given["name"], int(given["processes"]), job_set["spec"]
    together = ["--coordinator", f"{name}-run-0-0.{name}:{PORT}", "--num-processes", str(processes), "--process-id",
                "$(PROCESS_ID)"]  # fmt: skip
    words = [word.replace("$", "$$") for word in (given.get("python", "python3"), *arguments)]
    job_set["metadata"]["name"] = name
    spec["failurePolicy"]["maxRestarts"] = int(given.get("restarts", "3"))
    job = spec["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = job["completions"] = processes
    pod = job["template"]["spec"]
    pod["nodeSelector"] = _prefixed(given, "selector.")
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = given["claim"]
    container = pod["containers"][0]
    # Kubernetes replaces $(NAME) in a command, and $$ by $.
    container |= {"image": given["image"], "command": words + (together if processes > 1 else [])}
    container["resources"]["limits"] = _prefixed(given, "limit.")
    container["volumeMounts"][0]["mountPath"] = given["mount"]
    if "directory" in given:
        container["workingDir"] = given["directory"]
    return job_set


def _prefixed(given: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


launch_tpu, launch_gke = functools.partial(hand_out, tpu), functools.partial(hand_out, gke)
