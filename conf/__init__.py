"""The config tree: one folder per group, one file per option."""
