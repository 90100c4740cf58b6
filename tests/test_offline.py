"""S13: from rows to a served answer in a network namespace of its own, and no attempt to reach anything but this machine.
Toy model."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_end_to_end import whole

from conftest import ROOT
from toys import toy_model, write_format

HOOK = """
import ipaddress, os, sys


def near(host):
    try:
        return host in ("localhost", "", None) or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def heard(event, args):
    if event == "socket.getaddrinfo" and not near(args[0]):
        told = f"looked up {args[0]}"
    elif event == "socket.connect" and isinstance(args[1], tuple) and not near(args[1][0]):
        told = f"connected to {args[1][0]}"
    else:
        return
    with open(os.environ["FTNB_TOLD"], "a") as out:
        out.write(told + "\\n")


sys.addaudithook(heard)
"""
SERVED = """
import json, sys, urllib.request
from ftnb.deploy import Artifact
from ftnb.server import serving

with serving(Artifact.load(sys.argv[1])) as url:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/chat/completions", body)) as reply:
        print(json.load(reply)["choices"][0]["finish_reason"])
"""


def alone(*command, cwd, told):
    "In a network namespace where only the loopback device is up; without the flag that forbids the hub."
    drop = (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    )
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PYTHONPATH": f"{cwd / 'hook'}{os.pathsep}{ROOT}", "FTNB_TOLD": str(told), "COLUMNS": "120"}
    inside = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *map(str, command)]
    return subprocess.run(inside, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_nothing_is_asked_of_a_network(tmp_path):
    if (
        not shutil.which("unshare")
        or not shutil.which("ip")
        or subprocess.run(["unshare", "-n", "true"]).returncode
    ):
        pytest.skip("no network namespace can be made here (unshare -n, ip)")
    told, hook = tmp_path / "told", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    probe = "import socket; socket.getaddrinfo('example.org', 80)"
    assert (
        alone(sys.executable, "-c", probe, cwd=tmp_path, told=told).returncode == 1
    )  # the hook hears, the space is shut
    assert told.read_text() == "looked up example.org\n"
    told.unlink()
    data, model = write_format("csv", tmp_path), toy_model(tmp_path / "model")
    command = "import sys; from ftnb.cli import main; sys.exit(main())"
    done = alone(
        sys.executable, "-c", command, *whole(data, model, tmp_path / "run"), cwd=tmp_path, told=told
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())
    for kind in ("adapter", "gguf-q8_0"):
        done = alone(
            sys.executable, "-c", SERVED, tmp_path / "run" / "exports" / kind, cwd=tmp_path, told=told
        )
        assert done.stdout.strip() in ("stop", "length"), done.stdout + done.stderr[-2000:]
    assert not told.exists(), told.read_text()
