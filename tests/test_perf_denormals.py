from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError
from efficientnet.measuring.programs import read_program
from perf.studies.denormals_cost import INPUTS, DenormalsCost, denormal_share, require_switch
from perf.studies.denormals_cost import white_noise as noise


def test_each_program_is_measured_with_denormals_and_without_and_published(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
):
    (tmp_path / "r.md").write_text("<!-- denormals: by a command -->\n<!-- /denormals -->\n")
    flags = ["--seconds", "0.2", "--turns", "2", "--publish", "--readme", "r.md", "--json"]
    done = run("perf/denormals.py", tiny_checkpoint, tiny_artifact, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = DenormalsCost.model_validate_json(done.stdout)
    assert [times.input for times in found.times] == [*INPUTS, *INPUTS]
    assert all(len(times.kept_ms) == len(times.flushed_ms) == 2 for times in found.times)
    (record,) = (tmp_path / "reports/published").glob("*/denormals-tiny-32px.json")
    assert DenormalsCost.model_validate_json(record.read_text()) == found
    assert "**tiny, trained on digits, 32 px, batch 1**" in (tmp_path / "r.md").read_text()


def test_a_program_that_always_flushes_is_refused(tiny_artifact: Path):
    program = read_program(tiny_artifact)
    require_switch(program)
    with raises_naming(ArtifactError, program.path):
        require_switch(replace(program, runtime="native"))


def test_denormals_of_convolutions_are_counted(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    # So small that the first convolution gives nothing else.
    monkeypatch.setattr(
        "perf.studies.denormals_cost.white_noise", lambda *size: np.float32(1e-38) * noise(*size)
    )
    assert denormal_share(tiny_checkpoint) > 0.001
