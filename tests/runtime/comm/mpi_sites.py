"""The MPIs that the tests find: `make mpi` puts PyPI's MPICH and Open MPI, with mpi4py, under build/mpi."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}


@dataclass(frozen=True)
class MpiSite:
    """One installation. mpi4py loads the library that MPI4PY_LIBMPI names."""

    name: str
    prefix: Path

    @property
    def mpiexec(self) -> str:
        return str(self.prefix / "bin" / "mpiexec")

    @property
    def packages(self) -> str:
        return str(self.prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages")

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """As root, and with more ranks than cores: neither is Open MPI's idea of a default."""
        return {
            **base,
            "PYTHONPATH": os.pathsep.join([self.packages, base.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "MPI4PY_LIBMPI": str(self.prefix / "lib" / LIBRARIES[self.name]),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }


def mpi_site(name: str) -> MpiSite:
    """The installation, or a skipped test."""
    for prefix in (ROOT / "build" / "mpi" / name, Path(sys.prefix)):
        site = MpiSite(name, prefix)
        parts = [Path(site.mpiexec), prefix / "lib" / LIBRARIES[name], Path(site.packages, "mpi4py")]
        if all(part.exists() for part in parts):
            return site
    pytest.skip(f"no {name} with mpi4py under build/mpi or in this environment; `make mpi` installs both")
