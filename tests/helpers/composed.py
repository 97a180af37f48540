"""For a server that processes are forked from: Hydra has looked for its plugins, and its own files have been read."""

from onlinenorm.cli.compose import load_config

load_config([])
