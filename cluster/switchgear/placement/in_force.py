"""What ranks compute with: `InForce`, an expert map and the model versions beside it."""

from __future__ import annotations

from dataclasses import dataclass

from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    expert_map: ExpertMap
    versions: ModelVersions

    def begin(self, descriptor: GenerationDescriptor) -> BeginGeneration:
        """Of a generation of the map's epoch."""
        return BeginGeneration(descriptor, self.expert_map.to_json(), self.versions.to_json())
