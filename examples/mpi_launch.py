"""An embedded cluster whose ranks are the processes of one MPI job: `python examples/mpi_launch.py [MPIEXEC]`.

Run it where you would run mpiexec, as a plain process: it starts the job itself. Needs switchgear[mpi] and an MPI.
"""

import sys

from switchgear import LLM, SamplingParams


def main() -> None:
    mpiexec = sys.argv[1] if len(sys.argv) > 1 else "mpiexec"
    prompts = ["harbor (noun):", "7 * 8 ="]
    with LLM(ranks=2, launcher="mpi", mpi_command=f"{mpiexec} -n {{ranks}}", transport="mpi") as llm:
        for output in llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0.0)):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
