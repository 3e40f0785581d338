"""The demo cut up for several sites: `flex deploy example` writes what `flex deploy init` and `flex train` take."""

import json

from flex.cli import main
from flex.config import read_config
from flex.data.clients import read_clients
from flex.demo.sites import SITES


def test_each_site_has_its_own_file_and_all_together_are_the_same_run(tmp_path, capsys):
    assert main(["deploy", "example", str(tmp_path / "trial")]) == 0
    assert "workshop" in capsys.readouterr().out
    config = read_config(tmp_path / "trial" / "flex.toml")
    assert config.data.clients == SITES
    assert config.anchors is None
    whole = {client.client_id: client for client in read_clients(config.data, [], 3)}
    for name in SITES:
        folder = tmp_path / "trial" / name
        for part in ("train", "test"):
            own = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
            assert not any("client" in record for record in own)
            assert [r["response"] for r in own] == [r["response"] for r in getattr(whole[name], part)]
    options = ["--address", "127.0.0.1:8000", "--sites", *SITES]
    assert main(["deploy", "init", str(tmp_path / "fed"), str(tmp_path / "trial" / "flex.toml"), *options]) == 0
    assert str(tmp_path) not in (tmp_path / "fed" / "packages" / "farm" / "flex.toml").read_text()
