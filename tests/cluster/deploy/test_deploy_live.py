"""The Ray commands of cluster/deploy, run for real on this machine: `ray symmetric-run`, `ray up`, Ray Serve.

Each Ray has a token, a port and a folder of its own. What cannot be here (Slurm, ssh, rsync) is a short program that
does on this machine what it was asked to do elsewhere. `ray` is Ray's own, but for `ray stop`, which would end every
Ray of this user, also those of other tests: here it ends those of its test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray._private.services import find_gcs_addresses

from switchgear import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "cluster" / "deploy"
PROMPT, NUM_TOKENS = "harbor (noun):", 12
RAY_PROGRAM = f"""#!{sys.executable}
import os, signal, sys
import psutil
if sys.argv[1:2] != ["stop"]:
    os.execv(sys.executable, [sys.executable, "-m", "ray.scripts.scripts", *sys.argv[1:]])
for process in psutil.process_iter():
    try:
        words = " ".join(process.cmdline())
        ours = process.environ().get("SG_TEST_FOLDER") == os.environ["SG_TEST_FOLDER"]
        if ours and any(word in words for word in ("raylet", "gcs_server", "ray::", "ray/_private", "ray/dashboard")):
            process.send_signal(signal.SIGKILL)
    except psutil.Error:
        continue
"""
SWITCHGEAR = shlex.join([sys.executable, "-m", "switchgear.cli"])
NEEDS_SERVE = pytest.mark.skipif(
    importlib.util.find_spec("grpc") is None, reason="Ray Serve is not installed: make test-deploy"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def descendants_of_session(folder: Path) -> list[psutil.Process]:
    """Processes whose environment carries this test's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SG_TEST_FOLDER") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for Ray's sockets; whatever a test leaves running in it is ended."""
    path = Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp"))
    yield path
    for _ in range(5):  # Ray's processes start others while they end
        for process in (left := descendants_of_session(path)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    write_program(folder / "bin" / "ray", RAY_PROGRAM)
    (folder / ".bashrc").touch()  # what `ray up` runs starts by reading it
    python_path = os.pathsep.join(str(ROOT / name) for name in ("runtime", "cluster", "bench"))
    (folder / "token").write_text("5" * 64)
    own = {
        "HOME": str(folder),
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": python_path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SG_TEST_FOLDER": str(folder),
        "TMPDIR": str(folder),
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own


@pytest.fixture(scope="module")
def expected() -> str:
    with LLM(ranks=1, launcher="local") as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=NUM_TOKENS, temperature=0), use_tqdm=False)
    return output.outputs[0].text


def run(command: list[str], environment: dict[str, str], cwd: Path, timeout_s: float = 200) -> str:
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_slurm_script_on_one_node(folder: Path, environment: dict[str, str], expected: str) -> None:
    """slurm.sh -> ray symmetric-run -> switchgear run, on this one node."""
    if find_gcs_addresses():
        pytest.skip("another Ray runs on this machine, and symmetric-run wants the node for itself")
    write_program(folder / "bin" / "scontrol", '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && echo "$3"\n')
    write_program(
        folder / "bin" / "srun",
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        '[ "$1" = hostname ] && { echo 127.0.0.1; exit; }\nexec "$@"\n',
    )
    slurm = {
        "SLURM_JOB_NODELIST": socket.gethostname(), "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2",
        "RAY_PORT": str(free_port()), "SWITCHGEAR": SWITCHGEAR,
    }  # fmt: skip
    command = ["bash", str(DEPLOY / "slurm.sh"), "run", PROMPT, "--ranks", "2", "--max-tokens", str(NUM_TOKENS)]
    text = run(command, environment | slurm, folder)
    assert PROMPT + expected + "\n" in text
    _, alive = psutil.wait_procs(descendants_of_session(folder), timeout=20)
    assert not alive  # Ray ended with the command


def test_ray_up_and_down(folder: Path, environment: dict[str, str], expected: str) -> None:
    """`ray up` starts a head with the file's own commands, `ray exec` serves one prompt on it, `ray down` ends it."""
    config = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    port = free_port()
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config |= {
        "cluster_name": folder.name,
        "min_workers": 0,
        "max_workers": 0,
        "file_mounts": {},
        "setup_commands": [],
    }  # the wheel: tests/packaging
    ray = str(folder / "bin" / "ray")
    config["head_start_ray_commands"] = [
        line.replace("~/switchgear/bin/ray", ray).replace("--port=6379", f"--port={port} --num-cpus=2")
        for line in config["head_start_ray_commands"]
    ]
    assert all(line.startswith(ray) for line in config["head_start_ray_commands"])
    (folder / "up.yaml").write_text(yaml.safe_dump(config))
    # ssh's last argument is quoted for the remote shell. A login shell would find another `ray` than ours.
    write_program(folder / "bin" / "ssh", '#!/bin/bash\nexec bash -c "bash -c ${@: -1}"\n')
    copy = (
        "#!/usr/bin/env python3\nimport pathlib, shutil, sys\n"
        "source, target = sys.argv[-2:]\ntarget = pathlib.Path(target.partition(':')[2] or target).expanduser()\n"
        "source = pathlib.Path(source)\ntarget.parent.mkdir(parents=True, exist_ok=True)\n"
        "shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)\n"
    )
    write_program(folder / "bin" / "rsync", copy)
    run([ray, "up", "-y", "--no-config-cache", "up.yaml"], environment, folder)
    command = (
        f"{SWITCHGEAR} run {shlex.quote(PROMPT)} --ranks 2 --max-tokens {NUM_TOKENS} --ray-address 127.0.0.1:{port}"
    )
    text = run([ray, "exec", "--no-config-cache", "up.yaml", command], environment, folder)
    assert expected.strip() in text
    assert descendants_of_session(folder)
    run([ray, "down", "-y", "up.yaml"], environment, folder)


@NEEDS_SERVE
def test_ray_serve_deploys_the_service_file(folder: Path, environment: dict[str, str], expected: str) -> None:
    """rayservice.yaml's serveConfigV2, with the bundled model and two ranks, by `serve run`."""
    (document,) = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    arguments: dict[str, Any] = config["applications"][0]["args"]
    arguments |= {"model": "", "ranks": 2, "trusted_network": False, "start_timeout_s": 120}
    arguments["served_model_name"] = "tiny"
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", "serve.yaml"],
            env=environment | {"RAY_ADDRESS": "local"}, cwd=folder, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        check_answers(url, expected)
        ranks = [p for p in descendants_of_session(folder) if "RankActor" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        process.send_signal(signal.SIGINT)
        process.wait(90)
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive
    finally:
        process.kill()
        process.wait(10)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("not ready in time:\n" + log.read_text()[-4000:])


def check_answers(url: str, expected: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.json()["choices"][0]["text"] == expected
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == expected
    assert httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"] == "tiny"
    refused = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": -1}, timeout=10)
    assert refused.status_code == 400
    assert re.search("max_tokens", refused.json()["error"]["message"])


@NEEDS_SERVE
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's own import
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"port": 1}, "comes from Ray Serve's http_options"),
        ({"ranks": "many"}, "ranks='many' must be a number"),
        ({"ranks": "0"}, "ranks=0"),
        ({"rank": 2}, "did you mean 'ranks'"),
        ({"enable_prefix_caching": "maybe"}, "must be true or false"),
    ],
)
def test_settings_of_the_adapter(arguments: dict[str, Any], what: str) -> None:
    from switchgear.ray_serve import app
    from switchgear_runtime.errors import ConfigError

    with pytest.raises(ConfigError, match=re.escape(what)):
        app(arguments)
