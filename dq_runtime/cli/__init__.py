"""The command line ``dq-runtime``. Each command's module is imported when the command runs."""
