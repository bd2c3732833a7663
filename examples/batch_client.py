"""Send a batch to a running server (`switchgear serve`): `python examples/batch_client.py [URL]`."""

import sys

from switchgear import Client, SamplingParams


def main() -> None:
    client = Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
    prompts = [f"{a} * {b} =" for a in range(2, 10) for b in range(2, 6)]
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1, stop=["\n"])
    for output in client.generate(prompts, params):
        print(output.prompt, output.outputs[0].text.strip(), f"({output.outputs[0].finish_reason})")
    client.close()


if __name__ == "__main__":
    main()
