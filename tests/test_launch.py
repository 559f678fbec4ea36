"""Launch scripts: no faults that shellcheck knows, and the commands that they would run."""

from __future__ import annotations

from pathlib import Path
import shlex
import subprocess

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
TRAIN = ("--config=configs/deepstack.py", "--config.train.learn=('connector',)")


def said(script: str, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [LAUNCH / script, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def typed(text: str) -> list[list[str]]:
    """Words of every line, as a shell reads them."""
    return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck():
    scripts = sorted(LAUNCH.glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gke.sh", "local.sh", "slurm.sh", "tpu_vm.sh"])
def test_help_names_every_flag_and_others_are_refused(script):
    first = {"gke.sh": ["run"], "tpu_vm.sh": ["run"]}.get(script, [])
    told = said(script, *first, "--help")
    assert "--dry-run" in told and "source" not in told.splitlines()[-1]
    refused = said(script, *first, "--nmae=x", code=1)
    assert refused == "error: unknown flag --nmae; --help shows those there are\n"


def test_a_slice_of_compute_engine():
    slice_ = ("--name=pod", "--zone=us-west4-a", "--dry-run")
    where = ["pod", "--zone=us-west4-a"]
    (create,) = typed(said("tpu_vm.sh", "create", *slice_, "--type=v5p-128"))
    assert create[:6] == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "pod",
    ]
    assert {"--node-id=pod", "--accelerator-type=v5p-128", "--spot"} <= set(create)
    (run,) = typed(said("tpu_vm.sh", "run", *slice_, "--", *TRAIN))
    assert run[:8] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        *where,
        "--worker=all",
    ]
    inside = shlex.split(run[8].removeprefix("--command="))
    assert inside[-4:] == ["-m", "lmm_jax.train", *TRAIN]
    assert "LMM_JAX_DISTRIBUTED=1" in inside
    (stop,) = typed(said("tpu_vm.sh", "stop", *slice_))
    assert stop[-1] == "--command=pkill -TERM -f lmm_jax.train"
    (delete,) = typed(said("tpu_vm.sh", "delete", *slice_, "--project=p"))
    assert delete[5:] == [*where, "--project=p", "--force", "--quiet"]
    kept = typed(said("tpu_vm.sh", "keep", *slice_, "--", *TRAIN))
    assert kept[0] == [*delete[:7], "--force", "--quiet"]
    assert kept[-1] == run
    assert "--zone" in said("tpu_vm.sh", "run", "--name=pod", "--", *TRAIN, code=1)


def test_a_cluster_of_kubernetes():
    flags = ("--name=deepstack", "--image=image:1", "--topology=4x4x8", "--dry-run")
    chosen = ("--accelerator=tpu-v5p-slice", "--slices=2")
    told = said("gke.sh", "run", *flags, *chosen, "--", "lmm_jax.train", *TRAIN)
    text, _, command = told.rpartition("\nkubectl")
    assert command == " apply --filename=-\n" and "${" not in text.split("\n", 1)[1]
    (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    inner = job["template"]["spec"]
    assert inner["parallelism"] == inner["completions"] == 32  # hosts of four chips
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["lmm_jax.train", *TRAIN]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    bad = said("gke.sh", "run", "--name=Deep_Stack", "--dry-run", code=1)
    assert "lower case, digits and dashes" in bad


def test_a_cluster_of_slurm():
    (told,) = typed(said("slurm.sh", "--nodes=4", "--dry-run", "--", *TRAIN))
    assert {"--nodes=4", "--ntasks-per-node=8", "--signal=TERM@300"} <= set(told)
    inside = shlex.split(told[-1].removeprefix("--wrap="))
    assert inside[:3] == ["LMM_JAX_DISTRIBUTED=1", "srun", "--kill-on-bad-exit=1"]
    assert inside[3:8] == ["python", "-m", "lmm_jax.train", *TRAIN]
    assert said("slurm.sh", "--dry-run", code=1).startswith("error: no arguments")


def test_several_processes_here():
    told = typed(
        said("local.sh", "--processes=3", "--devices=2", "--dry-run", "a b", "c")
    )
    assert [line[-2:] for line in told] == [["a b", "c"]] * 3
    assert [line[3] for line in told] == [f"LMM_JAX_PROCESS_ID={i}" for i in range(3)]
    done = (
        "import os, sys; n = os.environ['LMM_JAX_PROCESS_ID'];"
        "print(f'I am {n}'); sys.exit(3 * (n == '1'))"
    )
    failed = said("local.sh", "--processes=2", "--", "python3", "-c", done, code=3)
    assert failed.startswith("process 1 ended with code 3")
