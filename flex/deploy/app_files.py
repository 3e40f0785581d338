"""The Flower app that travels to the sites: a few lines that name what is installed there."""

from pathlib import Path

PYPROJECT = """[project]
name = "flexsite"
version = "1.0.0"
description = "FLEx at several sites: the shim that travels"
license = {{ text = "Apache-2.0" }}
dependencies = ["flwr>=1.41,<2"]

[tool.flwr.app]
publisher = "flex"

[tool.flwr.app.components]
serverapp = "flexsite.server:app"
clientapp = "flexsite.client:app"

[tool.flwr.app.config]
{config}
"""
SERVER = '"""The server\'s half."""\n\nfrom flex.deploy.server_app import app\n\n__all__ = ["app"]\n'
CLIENT = '"""A site\'s half."""\n\nfrom {module} import app\n\n__all__ = ["app"]\n'
SHIM = "flex.deploy.shim"
CONFIG = {"folder": '""', "wait": "600.0", "sites": '""'}  # what a run may set, see `server_app.py`


def write_app(folder: Path, client: str = SHIM) -> Path:
    """Writes the app into `folder`; `client` is the module that answers at a site."""
    package = folder / "flexsite"
    package.mkdir(parents=True, exist_ok=True)
    config = "\n".join(f"{key} = {value}" for key, value in CONFIG.items())
    (folder / "pyproject.toml").write_text(PYPROJECT.format(config=config))
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(SERVER)
    (package / "client.py").write_text(CLIENT.format(module=client))
    return folder
