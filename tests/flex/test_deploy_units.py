"""The systemd units that `flex deploy init` writes: systemd itself has nothing to say against them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flex.deploy.units import FLEX, server_unit, site_units

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze, of Debian's package systemd")


def complaints(folder: Path, units: dict[str, str]) -> str:
    """What `systemd-analyze verify` says of units, whose program is here rather than where the units name it."""
    for name, text in units.items():
        (folder / name).write_text(text.replace(FLEX, sys.executable))
    env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_LOG_COLOR": "0"}
    done = subprocess.run(
        [ANALYZE, "verify", *(str(folder / name) for name in units)], env=env, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 or said, "it failed without a word"
    return "\n".join(line for line in said.splitlines() if any(name in line for name in units))


def all_units(anchored: bool) -> dict[str, str]:
    return {"flex-server.service": server_unit("/srv/fed", "0.0.0.0"), **site_units("north", anchored)}


@needs_systemd
@pytest.mark.parametrize("anchored", [False, True])
def test_systemd_has_nothing_to_say_against_the_units(tmp_path, anchored):
    assert complaints(tmp_path, all_units(anchored)) == ""


@needs_systemd
def test_what_systemd_would_ignore_is_seen(tmp_path):
    units = {name: text.replace("PrivateTmp=", "PrivateTemp=") for name, text in all_units(False).items()}
    assert complaints(tmp_path, units).count("'PrivateTemp'") == 3
