"""The stock `openai` package against a running server (`switchgear serve`): `python examples/openai_client.py [URL]`."""

import sys

from openai import OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")  # the server's --api-key, if it has one
    model = client.models.list().data[0].id
    completion = client.completions.create(
        model=model, prompt="harbor (noun):", max_tokens=16, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
    )
    choice = completion.choices[0]
    print(repr(choice.text), f"{completion.usage.total_tokens} tokens, logprobs {choice.logprobs.token_logprobs[:3]}")
    for chunk in client.completions.create(
        model=model, prompt="And it came to pass", max_tokens=24, temperature=0, seed=1, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
