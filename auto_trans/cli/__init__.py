"""``auto-trans``, one module per subcommand."""
