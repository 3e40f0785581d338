"""Makes small bases: `python -m tools.pretrain`; not part of the installed packages."""
