"""The ``jaxopt-suite`` command: one file per subcommand."""
