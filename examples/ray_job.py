"""Submit a prompt as a Ray job to a running Ray cluster: `python examples/ray_job.py [DASHBOARD_URL] [PROMPT]`.

The job starts its ranks as actors of that cluster, prints, and gives everything back. Needs ray[default], here and on
the cluster, and switchgear on its nodes.
"""

import shlex
import sys
import time

from ray.job_submission import JobStatus, JobSubmissionClient

TIMEOUT_S = 300.0


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The LORD is my shepherd; I shall not"
    client = JobSubmissionClient(url)
    job_id = client.submit_job(
        entrypoint=f"python -m switchgear.cli run {shlex.quote(prompt)} --ranks 2 --ray-address auto --max-tokens 12"
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (status := client.get_job_status(job_id)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job_id)
        time.sleep(0.5)
    print(client.get_job_logs(job_id))
    sys.exit(0 if status == JobStatus.SUCCEEDED else f"job {job_id}: {status}")


if __name__ == "__main__":
    main()
