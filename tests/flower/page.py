"""docs/deploy.md: the commands of its first part, exactly as they stand there, from nothing to a report."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from harness import ROOT, RUN_S, environment

from flex.deploy.processes import free_port


def test_the_commands_of_the_page(tmp_path):
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)[1]
    commands = block.splitlines()
    assert len(commands) <= 10
    assert commands[-1].startswith("kill")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    flex = bin_folder / "flex"
    flex.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flex.cli "$@"\n')
    flex.chmod(0o755)
    # The page's port may be somebody's here.
    script = "set -e\n" + block.replace(":8443", f":{free_port()}") + "wait\n"
    env = {**environment(), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    log = tmp_path / "said.log"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = shell.wait(RUN_S)
            leftover = [line for line in _processes() if str(tmp_path / "fed") in line]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    said = log.read_text(errors="replace")
    assert code == 0, said
    assert "FLEx" in said
    assert (tmp_path / "fed" / "run" / "report.html").exists()
    assert "what was asked, and what left this site" in said
    assert not leftover


def _processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found
