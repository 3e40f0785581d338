"""`make test-flower`: three engines give the same bits, through a killed worker, a killed SuperLink and a wrong key."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import END_S, RUN_S, SITES, Federation, assert_same_run, children, environment, federation, until

from flex.config import config_text, read_config
from flex.deploy.app_files import write_app
from flex.deploy.certificates import make_node_key
from flex.deploy.processes import free_port, program

JOBS = ("flex-seed3", "scaffold-seed3")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """The run on one machine that both of Flower's engines are held against."""
    folder = tmp_path_factory.mktemp("embedded")
    Federation.flex(None, "deploy", "example", folder)
    score_every_round(folder)
    Federation.flex(None, "train", folder / "flex.toml", "--output", folder / "run")
    return folder / "run"


def score_every_round(example: Path) -> None:
    """So that scores ride in turns, are lost with them, and are asked for again."""
    path = example / "flex.toml"
    path.write_text(config_text(read_config(path).with_values(evaluate={"every": 1})))


def test_deployment_through_accidents_gives_the_bits_of_one_machine(embedded, tmp_path):
    with federation(tmp_path) as sites:
        score_every_round(sites.example)
        sites.init()
        server = sites.server()
        sites.workers()
        for name in SITES:
            sites.node(name)

        # A key that nobody registered.
        make_node_key(tmp_path / "odd", tmp_path / "odd.pub")
        odd = sites.node("farm", "--key", tmp_path / "odd", "--home", tmp_path / "odd-home", "--wait", 0)
        sites.running["odd"] = odd
        until("the odd key is refused", odd.ended)
        assert odd.said("does not know the key"), odd.log.read_text()

        # A worker hangs in its turn of round 2 and is killed there.
        first = sites.start("run", "deploy", "run", sites.fed)
        server_files = sites.fed / "run" / JOBS[0] / "server"
        until("round 1", (server_files / "round-0001.safetensors").exists, RUN_S)
        clinic = sites.running["worker-clinic"]
        os.kill(clinic.pid, signal.SIGSTOP)
        until("farm has done round 2", lambda: trained(sites, "farm", 2), RUN_S)
        time.sleep(2)
        clinic.kill()
        until("the run ends", first.ended, RUN_S)
        assert first.popen.returncode == 2
        assert first.said("client 'clinic' failed in round 2 (train): "), first.log.read_text()
        assert first.said("goes on from the last round that is whole")

        # It starts again; the run goes on; then the SuperLink is killed in the middle of the second job.
        again = sites.worker("clinic")
        until("clinic is back", lambda: again.said("site clinic:"))
        second = sites.start("run", "deploy", "run", sites.fed)
        until("job 2", (sites.fed / "run" / JOBS[1] / "server" / "round-0001.safetensors").exists, RUN_S)
        superlink = next(pid for pid in children(server.pid))
        os.kill(superlink, signal.SIGKILL)
        until("the server says so", server.ended, END_S)
        assert server.said("the SuperLink ended with code -9"), server.log.read_text()
        until("the run says so", second.ended, RUN_S)
        assert second.popen.returncode == 2
        assert second.said("the run ended at the server without a word"), second.log.read_text()

        # With its database it is the same SuperLink: the sites come back by themselves.
        sites.server()
        said = sites.run()
        assert "FLEx" in said
        assert_same_run(embedded, sites.fed / "run", sites.state, JOBS)
        assert (sites.fed / "run" / "report.html").exists()
        assert "report" in sites.flex("report", "--run", sites.fed / "run")
        assert "135168" in sites.flex("worker", sites.package("farm"), "--log")


def trained(sites: Federation, site: str, at: int) -> bool:
    path = sites.package(site) / "state" / "record.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return any(e["asked"] == "train" and e["round"] == at and not e["refused"] for e in entries)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray, flwr's simulation backend")
def test_flowers_simulation_gives_the_bits_of_one_machine(embedded, tmp_path):
    with federation(tmp_path) as sites:
        score_every_round(sites.example)
        sites.init()
        app = write_app(tmp_path / "app", client="flex.deploy.simulated")
        home, port = tmp_path / "home", free_port()
        home.mkdir()
        env = {**environment(), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
        env |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        log = (tmp_path / "superlink.log").open("wb")
        superlink = subprocess.Popen(
            [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            until("the simulation's SuperLink", lambda: b"Uvicorn running" in (tmp_path / "superlink.log").read_bytes())
            settings = f'folder="{sites.fed}" sites="{sites.example / "flex.toml"}"'
            command = [program("flwr"), "run", str(app), "here", "--stream", "--run-config", settings]
            command += ["--federation-config", f"num-supernodes={len(SITES)} client-resources-num-cpus=1"]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_S)
            log_text = (tmp_path / "superlink.log").read_text(errors="replace")
            assert done.returncode == 0, done.stdout + done.stderr + log_text
            last = (sites.fed / "progress.jsonl").read_text().splitlines()[-1]
            assert json.loads(last)["ended"] == "done", last + log_text
        finally:
            superlink.terminate()
            try:
                superlink.wait(END_S)
            finally:
                os.killpg(superlink.pid, signal.SIGKILL) if superlink.poll() is None else None
            log.close()

        def personal(site: str, job: str) -> Path:
            return sites.fed / "simulated" / job / "clients" / site

        assert_same_run(embedded, sites.fed / "run", personal, JOBS)
