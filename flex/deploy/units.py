"""systemd units, for an administrator to read and install: two users at a site, one at the coordinator's."""

SERVER = """[Unit]
Description=FLEx federation: the SuperLink of {folder}
After=network-online.target
Wants=network-online.target

[Service]
User=flex-server
ExecStart={flex} deploy server {folder} --listen {listen}
Restart=on-failure
RestartSec=10
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={folder}
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""

# The worker's user owns model, data and state; `flex-site` is a group of the two users and of nobody else.
WORKER = """[Unit]
Description=FLEx site {name}: the worker

[Service]
User=flex-worker
Group=flex-site
UMask=0077
# Where the model and the data of this site are:
Environment=MODEL=/srv/flex/model DATA=/srv/flex/train.jsonl{anchors_at}
Environment=HOME=/var/lib/flex-worker HF_HUB_OFFLINE=1
ExecStart={flex} worker {package} --model ${{MODEL}} --data ${{DATA}}{anchors} \\
    --state /var/lib/flex-worker --socket {socket} --node-user flex-node --group flex-site
StateDirectory=flex-worker
StateDirectoryMode=0700
RuntimeDirectory=flex-worker
RuntimeDirectoryMode=0750
Restart=on-failure
RestartSec=10
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
RestrictAddressFamilies=AF_UNIX

[Install]
WantedBy=multi-user.target
"""

# The SuperNode's user has the key and the network, and can read neither model, data nor state.
NODE = """[Unit]
Description=FLEx site {name}: the SuperNode
After=network-online.target flex-worker.service
Wants=network-online.target

[Service]
User=flex-node
Group=flex-site
ExecStart={flex} node {package} --socket {socket} --home /var/lib/flex-node --key /var/lib/flex-node/node.key
Environment=HOME=/var/lib/flex-node
StateDirectory=flex-node
StateDirectoryMode=0700
Restart=always
RestartSec=10
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
InaccessiblePaths=-/var/lib/flex-worker -/srv/flex

[Install]
WantedBy=multi-user.target
"""

SOCKET = "/run/flex-worker/worker.sock"
SITE_FOLDER = "/etc/flex-site"
FLEX = "/opt/flex/bin/flex"


def server_unit(folder: str, listen: str) -> str:
    return SERVER.format(folder=folder, listen=listen, flex=FLEX)


def site_units(name: str, anchored: bool = False) -> dict[str, str]:
    """The units of a site, by file name. `anchored`: the run holds its sites to the base on texts of their own."""
    values = {"name": name, "package": SITE_FOLDER, "socket": SOCKET, "flex": FLEX, "anchors_at": "", "anchors": ""}
    if anchored:
        values |= {"anchors_at": " ANCHORS=/srv/flex/anchors.jsonl", "anchors": " --anchors ${ANCHORS}"}
    return {"flex-worker.service": WORKER.format(**values), "flex-node.service": NODE.format(**values)}
