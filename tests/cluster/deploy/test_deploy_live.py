"""The Ray commands of cluster/deploy, run for real on this machine: `ray symmetric-run`, `ray up`, `serve run`.

What cannot be here (Slurm, ssh, rsync) is a short program that does on this machine what it was asked to do elsewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from own_ray import OwnRay, free_port, ray_serve_python
from ray._private.services import find_gcs_addresses

from switchgear import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(500)]

DEPLOY = Path(__file__).resolve().parents[3] / "cluster" / "deploy"
PROMPT, NUM_TOKENS = "harbor (noun):", 12
SWITCHGEAR = shlex.join([sys.executable, "-m", "switchgear.cli"])
RSYNC = f"""#!{sys.executable}
import pathlib, shutil, sys
source, target = sys.argv[-2:]
source, target = pathlib.Path(source), pathlib.Path(target.partition(":")[2] or target).expanduser()
target.parent.mkdir(parents=True, exist_ok=True)
shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)
"""


@pytest.fixture(scope="module")
def expected() -> str:
    with LLM(ranks=1, launcher="local") as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=NUM_TOKENS, temperature=0), use_tqdm=False)
    return output.outputs[0].text


def test_slurm_script_on_one_node(own_ray: OwnRay, expected: str) -> None:
    """slurm.sh -> ray symmetric-run -> switchgear run, on this one node."""
    if find_gcs_addresses():
        pytest.skip("another Ray runs on this machine, and symmetric-run wants the node for itself")
    own_ray.write_program("scontrol", '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && echo "$3"\n')
    own_ray.write_program(
        "srun",
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        '[ "$1" = hostname ] && { echo 127.0.0.1; exit; }\nexec "$@"\n',
    )
    slurm = {
        "SLURM_JOB_NODELIST": socket.gethostname(), "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2",
        "RAY_PORT": str(free_port()), "SWITCHGEAR": SWITCHGEAR,
    }  # fmt: skip
    command = ("bash", str(DEPLOY / "slurm.sh"), "run", PROMPT, "--ranks", "2", "--max-tokens", str(NUM_TOKENS))
    assert PROMPT + expected + "\n" in own_ray.run(*command, more=slurm)
    _, alive = psutil.wait_procs(own_ray.processes(), timeout=20)
    assert not alive  # Ray ended with the command


def test_ray_up_and_down(own_ray: OwnRay, expected: str) -> None:
    """`ray up` starts a head with the file's own commands, `ray exec` serves one prompt on it, `ray down` ends it."""
    config = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    port, ray = free_port(), str(own_ray.folder / "bin" / "ray")
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config |= {"cluster_name": own_ray.folder.name, "min_workers": 0, "max_workers": 0}
    config |= {"file_mounts": {}, "setup_commands": []}  # they install the wheel: tests/packaging
    config["head_start_ray_commands"] = [
        line.replace("~/switchgear/bin/ray", ray).replace("--port=6379", f"--port={port} --num-cpus=2")
        for line in config["head_start_ray_commands"]
    ]
    assert all(line.startswith(ray) for line in config["head_start_ray_commands"])
    (own_ray.folder / "up.yaml").write_text(yaml.safe_dump(config))
    # ssh's last argument is quoted for the remote shell. A login shell would find another `ray` than ours.
    own_ray.write_program("ssh", '#!/bin/bash\nexec bash -c "bash -c ${@: -1}"\n')
    own_ray.write_program("rsync", RSYNC)
    own_ray.run("ray", "up", "-y", "--no-config-cache", "up.yaml")
    command = f"{SWITCHGEAR} run {shlex.quote(PROMPT)} --ranks 2 --max-tokens {NUM_TOKENS}"
    text = own_ray.run("ray", "exec", "--no-config-cache", "up.yaml", f"{command} --ray-address 127.0.0.1:{port}")
    assert expected.strip() in text
    assert own_ray.processes()
    own_ray.run("ray", "down", "-y", "up.yaml")


def test_ray_serve_deploys_the_service_file(own_ray: OwnRay, expected: str) -> None:
    """rayservice.yaml's serveConfigV2, with the bundled model and two ranks, by `serve run`."""
    python = own_ray.use(ray_serve_python())
    (document,) = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {"model": "", "ranks": 2, "served_model_name": "tiny"}
    (own_ray.folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = own_ray.folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "-m", "ray.serve.scripts", "run", "serve.yaml"],
            env=own_ray.environment | {"RAY_ADDRESS": "local"}, cwd=own_ray.folder, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        check_answers(url, expected)
        ranks = [p for p in own_ray.processes() if "RankActor" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        process.send_signal(signal.SIGINT)
        process.wait(90)
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive
    finally:
        process.kill()
        process.wait(10)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        text = log.read_text()
        assert process.poll() is None and "DEPLOY_FAILED" not in text, text[-4000:]
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


CASES: list[tuple[dict[str, Any], str]] = [
    ({"port": 1}, "comes from Ray Serve's http_options"),
    ({"ranks": "many"}, "ranks='many' must be a number"),
    ({"ranks": "0"}, "ranks=0"),
    ({"rank": 2}, "did you mean 'ranks'"),
    ({"enable_prefix_caching": "maybe"}, "must be true or false"),
]


def test_settings_of_the_adapter_fail_before_a_replica(own_ray: OwnRay) -> None:
    """And a config that is right gives an application. The Serve config is checked by Ray's own schema, too."""
    python = own_ray.use(ray_serve_python())
    (document,) = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    code = (
        "import json, sys\n"
        "from ray.serve.schema import ServeDeploySchema\n"
        "from switchgear.ray_serve import app\n"
        "from switchgear_runtime.errors import ConfigError\n"
        "config, cases = json.loads(sys.argv[1])\n"
        "(application,) = ServeDeploySchema.model_validate(config).applications\n"
        "app(application.args)\n"
        "app({name: str(value) for name, value in application.args.items()})\n"
        "for arguments, what in cases:\n"
        "    try:\n"
        "        app(arguments)\n"
        "    except ConfigError as error:\n"
        "        assert what in str(error), error\n"
        "    else:\n"
        "        raise SystemExit(f'{arguments} passed')\n"
    )
    own_ray.run(python, "-c", code, json.dumps([config, CASES]))
