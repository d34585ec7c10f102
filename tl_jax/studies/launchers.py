"""From the command line to a study under way, on this machine or on a cluster.

A cluster's launcher is a function (arguments of python, keys of runs that follow them, settings, workdir, jobs) ->
(command, its input); the workdir is the same folder here and there. It raises one ValueError for all settings that do
not fit; docs/clusters.md has their meaning.
"""

import argparse
import fnmatch
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tl_jax.core import messages
from tl_jax.core.files import write_text
from tl_jax.studies import store
from tl_jax.studies import study as studies

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
LARGEST_ARRAY = 1000  # SLURM's default MaxArraySize is 1001
GRACE = 120  # seconds before a SLURM job's time limit at which it is asked to save and end
OURS = ("array", "chdir", "wrap", "requeue", "no-requeue")  # options of sbatch that resuming depends on
PORT = 12321  # of process 0 in a JobSet, where every pod has its own address
NEEDED = {"tpu": ("name", "zone", "directory"), "gke": ("name", "image", "processes", "claim", "mount")}
POSSIBLE = {
    "tpu": ("project", "python"),
    "gke": ("namespace", "directory", "python", "restarts", "limit.*", "selector.*"),
}
FORMS = {  # of gke's settings
    "processes": (r"0*[1-9]\d*", "a whole number of at least 1"),
    "restarts": (r"\d+", "a whole number of at least 0"),
    "name": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "up to 40 of a-z, 0-9 and -, first a letter, last no -"),
}


Plan = tuple[list[str], str]


def start(
    text: str, workdir: str | pathlib.Path | None, *, launcher: str = "local", jobs: int = 0, settings: str = "",
    submit: bool = False, dry_run: bool = False, retry: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Plans the study `experiments/NAME[:argument]` in its workdir (default: workdirs/NAME) and launches it.

    Returns the exit code. A dry run prints the grid and its cost, and writes nothing. ValueError as of `store.plan`.
    """
    name, question, study = studies.load(text)
    workdir = pathlib.Path(workdir or f"workdirs/{name}")
    if dry_run:
        from tl_jax.studies import estimate

        runs = studies.grid(study)
        store.check_workdir(workdir, name, runs)
        estimate.show(workdir, name, study, runs, jobs)
        return 0
    store.plan(workdir, name, question, study)
    if retry and (count := store.retry(workdir)):
        print(f"{count} failed run(s) will be tried again", flush=True)
    if launcher != "local":
        return hand_out(launcher, workdir, settings=settings, jobs=jobs, submit=submit)
    from tl_jax.studies import local

    return local.launch(workdir, jobs=jobs, stop_requested=stop_requested)


def hand_out(
    launcher: str, workdir: pathlib.Path, *, command: Sequence[str] = (), settings: str = "", jobs: int = 0,
    submit: bool = False,
) -> int:  # fmt: skip
    """Prints the command that hands a planned study, or `python COMMAND...`, to a cluster; runs it with `submit`.

    Returns the exit code. Raises ValueError for settings that do not fit or a missing program.
    """
    keys, report = [] if command else store.open_runs(workdir), f"python -m tl_jax report {workdir}"
    if not command and not keys:
        print(f"{workdir}: nothing to do, see {report}", flush=True)
        return 0
    worker = ["-m", "tl_jax.studies.worker", str(workdir.absolute()), "--only"]
    words, stdin = CLUSTERS[launcher](command or worker, keys, settings, workdir, jobs)
    print(shlex.join(words) + (f" <<'EOF'\n{stdin}\nEOF" if stdin else ""), flush=True)
    try:
        code = subprocess.run(words, input=stdin or None, text=True).returncode if submit else 0
    except FileNotFoundError:
        raise ValueError(f"there is no program {words[0]!r} here; run this where the scheduler is") from None
    if not submit:
        print("# not run: add --submit, or run it yourself", flush=True)
    if keys:
        print(f"# afterwards: {report}", flush=True)
    return code


def slurm(arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path, jobs: int = 0) -> Plan:
    """The sbatch command of a job that is requeued when stopped with everything saved; writes workdir/slurm/job.sh.

    keys: shared among `jobs` array tasks (0: one task for each, up to LARGEST_ARRAY); none for a single job. settings:
    options of sbatch word for word, an empty value for one that takes none.
    """
    options = parse_settings(settings)
    if taken := [name for name in options if name in OURS]:
        raise ValueError(f"--slurm sets {', '.join(taken)}, which the launcher decides; leave out: {', '.join(OURS)}")
    tasks = max(1, min(len(keys), jobs or len(keys), LARGEST_ARRAY))
    place = workdir.absolute() / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "job.sh", (ASSETS / "job.sh").read_text())
    logs = str(place).replace("\\", "\\\\").replace("%", "%%")
    fixed = [sys.executable, *arguments]
    return [
        "sbatch", f"--job-name={workdir.absolute().name}", f"--chdir={pathlib.Path.cwd()}",
        f"--output={logs}/{'%A_%a' if keys else '%j'}.log", "--open-mode=append", "--requeue", f"--signal=TERM@{GRACE}",
        *([f"--array=0-{tasks - 1}"] if keys else []),
        *(f"--{name}={value}" if value else f"--{name}" for name, value in options.items()),
        str(place / "job.sh"), str(tasks), str(len(fixed)), *fixed, *keys,
    ], ""  # fmt: skip


def tpu(arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path, jobs: int = 0) -> Plan:
    """The command on every host of a TPU VM, by ssh; jax finds the other hosts by itself."""
    given = _cloud_settings("tpu", settings, jobs)
    run = shlex.join([given.get("python", ".venv/bin/python"), *arguments, *keys])
    return [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", given["name"], f"--zone={given['zone']}",
        *([f"--project={given['project']}"] if "project" in given else []),
        "--worker=all", f"--command=cd {shlex.quote(given['directory'])} && exec {run}",
    ], ""  # fmt: skip


def gke(arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path, jobs: int = 0) -> Plan:
    """The command in the pods of a JobSet, which starts all anew when one fails: the run resumes."""
    given = {"restarts": "3", "python": "python3", **_cloud_settings("gke", settings, jobs)}
    wrong = [key for key, (pattern, _) in FORMS.items() if not re.fullmatch(pattern, given[key])]
    if wrong:
        problems = [f"  {key}={given[key]}: expected {FORMS[key][1]}" for key in wrong]
        raise ValueError("\n".join(["--cloud does not fit:", *problems]))
    namespace = [f"--namespace={given['namespace']}"] if "namespace" in given else []
    job_set = _job_set([given["python"], *arguments, *keys], given)
    return ["kubectl", "apply", *namespace, "-f", "-"], json.dumps(job_set, indent=1)


CLUSTERS = {"slurm": slurm, "tpu": tpu, "gke": gke}


def _cloud_settings(launcher: str, text: str, jobs: int) -> dict[str, str]:
    """The settings; one ValueError names all that are missing, empty or unknown."""
    if jobs > 1:
        raise ValueError(f"--jobs {jobs}: this launcher does the runs of a study one after the other; leave --jobs out")
    given, needed, possible = parse_settings(text), NEEDED[launcher], POSSIBLE[launcher]
    problems, known = [f"  {name} is missing" for name in needed if not given.get(name)], (*needed, *possible)
    unknown = [name for name in given if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]
    problems += [f"  {name} is unknown{messages.nearest(name, known)}" for name in unknown]
    if problems:
        expected = f"needed: {', '.join(needed)}; possible: {', '.join(possible)}"
        raise ValueError("\n".join(["--cloud does not fit:", *problems, expected]))
    return given


def _job_set(words: Collection[str], given: dict[str, str]) -> dict[str, Any]:
    """assets/job_set.json with what is given filled in; JSON data, and so YAML."""
    job_set, name, processes = json.loads((ASSETS / "job_set.json").read_text()), given["name"], int(given["processes"])
    job_set["metadata"]["name"] = name
    job_set["spec"]["failurePolicy"]["maxRestarts"] = int(given["restarts"])
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = job["completions"] = processes
    pod = job["template"]["spec"]
    pod["nodeSelector"] = _prefixed(given, "selector.")
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = given["claim"]
    container = pod["containers"][0]
    command = [word.replace("$", "$$") for word in words]  # Kubernetes replaces $(NAME) in a command, and $$ by $
    if processes > 1:
        command += ["--coordinator", f"{name}-run-0-0.{name}:{PORT}", "--num-processes", str(processes)]
        command += ["--process-id", "$(PROCESS_ID)"]
    container |= {"image": given["image"], "command": command}
    container["resources"]["limits"] = _prefixed(given, "limit.")
    container["volumeMounts"][0]["mountPath"] = given["mount"]
    if "directory" in given:
        container["workingDir"] = given["directory"]
    return job_set


def _prefixed(given: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def parse_settings(text: str) -> dict[str, str]:
    """ "key=value,key=value" as a table; a value may hold commas. ValueError lists what is no key=value."""
    pairs = [pair for pair in re.split(r",(?=[\w./-]+=)", text) if pair]
    if wrong := [pair for pair in pairs if not re.match(r"[\w./-]+=", pair)]:
        raise ValueError(f"expected key=value,key=value; these are not: {wrong}")
    return dict(pair.split("=", 1) for pair in pairs)


def own_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without the flags that hand it to a launcher."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--launcher", "--slurm", "--cloud"):
        parser.add_argument(flag)
    parser.add_argument("--submit", action="store_true")
    return parser.parse_known_args(argv)[1]
