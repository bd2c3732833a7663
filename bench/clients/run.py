"""Runs one stock client against a server on the bundled model and keeps what it reports: `run.py openai|lm-eval|aiperf`."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchgear.config import bundled_model
from switchgear_bench.machine import describe

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "clients"
PACKAGES = {"openai": "openai==3.54.0", "lm-eval": "lm-eval[api]==0.4.13", "aiperf": "aiperf==0.13.0"}
MODEL = "tiny-moe"
STOP_TIMEOUT_S = 30


def environment(folder: Path, package: str) -> Path:
    """The `bin` of a virtual environment that has `package`; made if it is not there."""
    bin_dir = folder / "bin"
    if not (folder / "installed").is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([bin_dir / "pip", "install", "--quiet", package], check=True)
        (folder / "installed").write_text(package)
    return bin_dir


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """`switchgear serve` on a free port; its URL."""
    command = [sys.executable, "-m", "switchgear.cli", "serve", "--launcher", "local", "--ranks", "2", "--port", "0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if " at " not in line:
            raise SystemExit(f"the server did not start: {line!r}")
        yield line.rsplit(" at ", 1)[1].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)
        process.stdout.close()


def run(*command: str | Path) -> int:
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=False).returncode


def openai(bin_dir: Path, url: str) -> int:
    return run(bin_dir / "python", HERE / "openai_client.py", url, MODEL, RESULTS / "openai.json")


def lm_eval(bin_dir: Path, url: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.json"
        if run(bin_dir / "python", HERE / "lm_eval_task.py", url, MODEL, samples):
            return 1
        reference = HERE / "lm_eval_reference.py"
        return run(sys.executable, reference, samples, bundled_model(), RESULTS / "lm-eval.json")


def aiperf(bin_dir: Path, url: str) -> int:
    """Its own report is the result; an error it counted is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            "--model",
            MODEL,
            "--tokenizer",
            str(bundled_model()),
            "--use-server-token-count",
            "--random-seed",
            "7",
        ]
        load = ["--concurrency", "8", "--request-count", "200", "--synthetic-input-tokens-mean", "128"]
        outputs = ["--output-tokens-mean", "32", "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:32"]
        where = ["--url", url, "--endpoint-type", "chat", "--streaming", "--artifact-dir", folder, "--ui", "none"]
        status = run(bin_dir / "aiperf", "profile", *fixed, *load, *outputs, *where)
        if status:
            return status
        report = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
        for suffix in ("json", "csv"):
            text = (Path(folder) / f"profile_export_aiperf.{suffix}").read_text()
            text = text.replace(str(bundled_model()), MODEL).replace(folder, "artifacts")  # no paths of this machine
            (RESULTS / f"aiperf.{suffix}").write_text(text)
    errors = (report.get("error_request_count") or {}).get("avg", 0)
    answered = (report.get("request_count") or {}).get("avg", 0)
    print(f"aiperf: {answered:.0f} requests answered, {errors:.0f} errors")
    return int(errors > 0 or answered < 200)


CLIENTS = {"openai": openai, "lm-eval": lm_eval, "aiperf": aiperf}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "switchgear-clients")
    parser.add_argument("--url", help="a running server; for lm-eval it must serve the bundled model in float32")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    bin_dir = environment(arguments.venvs / arguments.client, PACKAGES[arguments.client])
    client = CLIENTS[arguments.client]
    if arguments.url:
        status = client(bin_dir, arguments.url)
    else:
        with server(*(("--dtype", "float32") if arguments.client == "lm-eval" else ())) as url:
            status = client(bin_dir, url)
    (RESULTS / f"{arguments.client}.machine.json").write_text(json.dumps(describe(), indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
