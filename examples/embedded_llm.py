"""Run an embedded cluster in this process's own ranks: `python examples/embedded_llm.py`."""

from switchgear import LLM, SamplingParams


def main() -> None:
    prompts = ["harbor (noun):", "And it came to pass, when the king", "7 * 8 ="]
    with LLM(ranks=2, launcher="local") as llm:
        for output in llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0)):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
