"""Times every op beside the code that people write without it: ``python -m bench``. Read docs/benchmarks.md first."""
