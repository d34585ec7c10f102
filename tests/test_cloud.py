"""The tpu and gke launchers: what gcloud and kubectl get, with recorders in their place."""

import re
import subprocess

import pytest
import yaml
from test_slurm import HOSTILE, make_study, recorder, words_of  # noqa: F401

from tl_jax.studies import launchers

TPU = "name=pod,zone=here-a,directory=/data/my checkout"
GKE = "name=digits,image=img:1,processes=2,claim=work,mount=/data"


def kubernetes(word, environ):
    """What becomes of a word of a container's command: $(NAME) is replaced where NAME is known, $$ is one $."""

    def replace(match):
        text = match[0]
        return "$" + text[2:] if text.startswith("$$") else environ.get(text[2:-1], text)

    return re.sub(r"\$\$|\$\([^)]*\)", replace, word)


def printed(launcher, tmp_path, capfd, settings, command):
    assert launchers.hand_out(launcher, tmp_path, command=command, settings=settings) == 0
    return capfd.readouterr().out


def test_tpu_hosts_get_the_words_as_they_are(tmp_path, recorder, capfd):  # noqa: F811
    (tmp_path / "my checkout").mkdir()
    settings = f"name=po'd,zone=$(z),project=a b,directory={tmp_path}/my checkout,python=python3"
    text = printed("tpu", tmp_path, capfd, settings, ["launch.py", *HOSTILE])
    assert recorder() == []
    subprocess.run(["bash", "-c", text], check=True, stdin=subprocess.DEVNULL)
    (call,) = recorder()
    *words, command = words_of(call)
    assert words == ["compute", "tpus", "tpu-vm", "ssh", "po'd", "--zone=$(z)", "--project=a b", "--worker=all"]
    # ssh hands the words of --command to the shell of the host.
    subprocess.run(["sh", "-c", command.removeprefix("--command=")], check=True, stdin=subprocess.DEVNULL)
    (call,) = recorder()
    assert call[0] == "python3" and words_of(call) == ["launch.py", *HOSTILE]


def test_pods_get_the_words_as_they_are_and_their_places(tmp_path, recorder, capfd):  # noqa: F811
    settings = f"{GKE},namespace=my space,python=py $x,limit.nvidia.com/gpu=1,selector.pool=big 'one',restarts=7"
    text = printed("gke", tmp_path, capfd, settings, ["launch.py", *HOSTILE])
    subprocess.run(["bash", "-c", text], check=True, stdin=subprocess.DEVNULL)
    (call,) = recorder()
    assert words_of(call) == ["apply", "--namespace=my space", "-f", "-"]
    job_set = yaml.safe_load(call[-1]["stdin"])
    assert job_set["metadata"] == {"name": "digits"} and job_set["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 2 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "big 'one'"}
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}} and container["image"] == "img:1"
    words = [kubernetes(word, {"PROCESS_ID": "1", "x": "no"}) for word in container["command"]]
    places = ["--coordinator", "digits-run-0-0.digits:12321", "--num-processes", "2", "--process-id", "1"]
    assert words == ["py $x", "launch.py", *HOSTILE, *places]
    assert container["env"][0]["name"] == "PROCESS_ID"


def test_words_that_kubernetes_would_replace_are_kept(tmp_path):
    words = ["$(PROCESS_ID)", "$$(PROCESS_ID)", "$", "a$", "$$$", "$(", "${HOME}"]
    job_set = yaml.safe_load(launchers.gke(words, (), GKE, tmp_path)[1])
    command = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [kubernetes(word, {"PROCESS_ID": "1"}) for word in command[1 : len(words) + 1]] == words


def test_one_pod_needs_no_place(tmp_path):
    settings = GKE.replace("processes=2", "processes=1")
    assert "--coordinator" not in launchers.gke(["launch.py"], (), settings, tmp_path)[1]


@pytest.mark.parametrize("launcher", ["tpu", "gke"])
def test_a_study_hands_over_its_open_runs_and_submits_only_when_told(tmp_path, recorder, capfd, launcher):  # noqa: F811
    workdir = make_study(tmp_path / "w", {"k0": "config.json", "k1": "result.json", "k2": "claim.json"})
    settings = TPU if launcher == "tpu" else GKE
    assert launchers.hand_out(launcher, workdir, settings=settings) == 0 and recorder() == []
    assert launchers.hand_out(launcher, workdir, settings=settings, submit=True) == 0
    (call,) = recorder()
    everything = " ".join(words_of(call)) + re.sub(r'",\s+"', " ", call[-1]["stdin"])
    assert f"-m tl_jax.studies.worker {workdir} --only k0 k2" in everything
    with pytest.raises(ValueError, match="one after the other"):
        launchers.hand_out(launcher, workdir, settings=settings, jobs=2)


@pytest.mark.parametrize(
    ("launcher", "settings", "message"),
    [
        ("tpu", "", r"name is missing\n  zone is missing\n  directory is missing"),
        ("tpu", f"{TPU},zon=x", "zon is unknown .did you mean 'zone'"),
        (
            "gke",
            "name=x,procesess=2",
            r"image is missing\n  processes is missing[\s\S]*procesess is unknown",
        ),
        ("gke", GKE.replace("=2", "=two"), "processes=two: expected a whole number"),
        ("gke", GKE.replace("=2", "=0"), "processes=0: expected a whole number"),
        ("gke", GKE.replace("digits", "My_run"), "name=My_run: expected up to 40 of"),
        ("gke", "image", "these are not: .'image'."),
    ],
)
def test_all_settings_that_do_not_fit_are_named_at_once(tmp_path, launcher, settings, message):
    with pytest.raises(ValueError, match=message):
        launchers.hand_out(launcher, tmp_path, command=["launch.py"], settings=settings)
