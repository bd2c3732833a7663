"""Print tokens as they come from a running server (`switchgear serve`): `python examples/streaming_client.py [URL] [PROMPT]`."""

import asyncio
import sys

from switchgear import AsyncClient, SamplingParams


async def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The LORD is my shepherd; I shall not"
    client = AsyncClient(url)
    print(prompt, end="")
    async for delta in client.stream(prompt, SamplingParams(max_tokens=48, temperature=0.0)):
        print(delta.text, end="", flush=True)
    print()
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
