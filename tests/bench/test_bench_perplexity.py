"""`switchgear bench perplexity`: its rows, what it refuses, and the bounds that quantisation has to keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear_bench import perplexity

OVER_PLAIN_MAX = {"int8": 0.002, "int4": 0.02}


def measure(output: Path, *arguments: str) -> dict[str, dict[str, object]]:
    assert main(["bench", "perplexity", *arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["header"]["hardware"]
    return {row["quantization"]: row for row in report["rows"]}


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path / "rows.json", "--row-tokens", "128", "--rows-per-text", "2")
    assert list(rows) == ["none", "int8", "int4"]
    assert rows["none"]["over_plain"] == 0.0
    for name, row in rows.items():
        assert row["num_tokens"] == 2 * 2 * 127
        assert set(row["over_plain_by_text"]) == {"arithmetic", "verse"}  # type: ignore[call-overload]
        assert 5.0 < float(str(row["perplexity"])) < 60.0, name
    assert "int4: perplexity" in capsys.readouterr().out


def test_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("In the beginning")
    assert main(["bench", "perplexity", "--text", str(tmp_path / "short.txt")]) == 2
    assert "row_tokens=512 is more than a held-out text has" in capsys.readouterr().err


def test_a_setting_that_did_nothing_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_logprobs", lambda *_: {"text": [-1.0, -2.0]})
    rows = perplexity.run(str(bundled_model()), {"text": ""}, ["int8"], row_tokens=3, rows_per_text=1, settings={})
    assert next(rows)["num_tokens"] == 2
    with pytest.raises(RuntimeError, match="gave the logprobs of unquantised weights"):
        next(rows)


@pytest.mark.slow
def test_quantised_perplexity_is_within_bounds(tmp_path: Path) -> None:
    rows = measure(tmp_path / "rows.json")
    for name, most in OVER_PLAIN_MAX.items():
        assert float(str(rows[name]["over_plain"])) <= most
