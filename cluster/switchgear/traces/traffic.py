"""Traffic whose mixture of domains drifts: `DriftingTraffic`, the requests of each window, from one seed.

The domains' log-weights follow a random walk that is drawn back to zero (so that one domain leads for some windows and
fades), and now and then the whole mixture is drawn anew: a switch that no history foretells.

Letters: D domains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp, sqrt

SPREAD = 1.8  # standard deviation of a log-weight: of ten domains, the leading one has about 40 % of the requests
MEMORY_WINDOWS = 25.0  # after which a log-weight has forgotten two thirds of what it was
SWITCH_EVERY = 40.0  # windows, on average
OUTPUT_TOKENS = (16, 48)  # least and most of a request


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficRequest:
    domain: str
    tenant: str
    prompt: str
    max_tokens: int
    seed: int


class DriftingTraffic:
    """`window()` gives the requests of the next window. The same arguments give the same requests anywhere."""

    def __init__(
        self,
        prompts: Mapping[str, tuple[str, ...]],
        tenant_of_domain: Mapping[str, str],
        *,
        num_requests: int,
        seed: int,
        memory_windows: float = MEMORY_WINDOWS,
        switch_every: float = SWITCH_EVERY,
    ) -> None:
        """`tenant_of_domain`: a domain that it lacks is its own tenant."""
        self._prompts = prompts
        self._domains = list(prompts)
        self._tenant_of_domain = tenant_of_domain
        self._num_requests = num_requests
        self._draw = random.Random(f"drifting traffic {seed}")
        self._keep = exp(-1.0 / memory_windows)
        self._switch_probability = 1.0 / switch_every
        self._log_weights_D = self._drawn()

    @property
    def mixture(self) -> dict[str, float]:
        """The share of each domain in the latest window's requests, as expected."""
        highest = max(self._log_weights_D)
        weights = [exp(value - highest) for value in self._log_weights_D]
        return {domain: weight / sum(weights) for domain, weight in zip(self._domains, weights, strict=True)}

    def window(self) -> list[TrafficRequest]:
        self._drift()
        mixture = self.mixture
        domains = self._draw.choices(list(mixture), list(mixture.values()), k=self._num_requests)
        return [self._request(domain) for domain in domains]

    def windows(self, num_windows: int) -> Iterator[list[TrafficRequest]]:
        for _ in range(num_windows):
            yield self.window()

    def _drift(self) -> None:
        if self._draw.random() < self._switch_probability:
            self._log_weights_D = self._drawn()
            return
        noise = SPREAD * sqrt(1 - self._keep**2)
        self._log_weights_D = [self._keep * value + noise * self._draw.gauss(0, 1) for value in self._log_weights_D]

    def _drawn(self) -> list[float]:
        return [SPREAD * self._draw.gauss(0, 1) for _ in self._domains]

    def _request(self, domain: str) -> TrafficRequest:
        return TrafficRequest(
            domain=domain,
            tenant=self._tenant_of_domain.get(domain, domain),
            prompt=self._draw.choice(self._prompts[domain]),
            max_tokens=self._draw.randint(*OUTPUT_TOKENS),
            seed=self._draw.getrandbits(63),
        )
