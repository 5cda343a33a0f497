//! Launchers: one file per kernel, which checks sizes and fills in grid and arguments.
